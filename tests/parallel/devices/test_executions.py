"""What a program executes: trips of loops, and the dearest branch."""

import jax
import jax.numpy as jnp
import pytest

from jrlhf.parallel.devices.executions import loop_trips, sum_over_executions
from jrlhf.parallel.devices.hlo import parse_hlo


def loop(condition: str, *, start: str = "constant(2)", step: str = "constant(3)", known: str = "") -> str:
    """A loop over a counter, a bound of 20 in its state, and a flag."""
    return f"""\
HloModule jit_f

%body (s.1: (s32[], s32[], pred[])) -> (s32[], s32[], pred[]) {{
  %s.1 = (s32[], s32[], pred[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=1
  %f.1 = pred[] get-tuple-element(%s.1), index=2
  %step.1 = s32[] {step}
  %next.1 = s32[] add(%i.1, %step.1)
  ROOT %t.1 = (s32[], s32[], pred[]) tuple(%next.1, %n.1, %f.1)
}}

%condition (s.2: (s32[], s32[], pred[])) -> pred[] {{
  %s.2 = (s32[], s32[], pred[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %n.2 = s32[] get-tuple-element(%s.2), index=1
  %f.2 = pred[] get-tuple-element(%s.2), index=2
  %limit.2 = s32[] constant(12)
  {condition}
}}

ENTRY %main (flag: pred[]) -> s32[] {{
  %flag = pred[] parameter(0)
  %start = s32[] {start}
  %copied = s32[] copy(%start)
  %bound = s32[] constant(20)
  %state = (s32[], s32[], pred[]) tuple(%copied, %bound, %flag)
  %while.1 = (s32[], s32[], pred[]) while(%state), condition=%condition, body=%body{known}
  ROOT %result = s32[] get-tuple-element(%while.1), index=0
}}
"""


LESS = "ROOT %lt = pred[] compare(%i.2, %limit.2), direction=LT"


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(LESS), 4),  # 2, 5, 8, 11
        (loop(LESS, step="constant(1)"), 10),
        (loop(LESS, start="negate(%bound)"), 4),  # 0, 3, 6, 9
        (loop(LESS.replace("limit", "n")), 6),  # 2, 5, 8, 11, 14, 17
        (loop(LESS, start="constant(40)"), 0),
        (loop(LESS, known=', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}'), 7),
        (loop(LESS.replace("limit", "f")), None),
        (loop("ROOT %go = pred[] copy(%f.2)"), None),
        (loop(LESS.replace("ROOT ", "") + "\n  ROOT %both = pred[] and(%lt, %f.2)"), None),
    ],
)
def test_a_loop_runs_as_often_as_its_condition_says(text: str, trips: int | None) -> None:
    module = parse_hlo(text)
    entry = module.computations["main"]
    assert loop_trips(module, entry, entry["while.1"]) == trips


def test_the_trips_of_a_compiled_loop_are_those_of_the_program() -> None:
    fn = jax.jit(lambda x: jax.lax.fori_loop(3, 11, lambda i, c: jnp.sin(c) + i, x))
    module = parse_hlo(fn.lower(jnp.zeros(8)).compile().as_text())
    loops = [(c, i) for c in module.computations.values() for i in c.values() if i.opcode == "while"]
    assert [loop_trips(module, computation, i) for computation, i in loops] == [8]


def additions(text: str, trips: int, **more) -> float:
    """The number of additions that a program executes."""
    total = sum_over_executions(
        parse_hlo(text),
        lambda computation, instruction: {"add": 1.0} if instruction.opcode == "add" else None,
        weight=lambda amounts: amounts.get("add", 0.0),
        trips=trips,
        **more,
    )
    return total.get("add", 0.0)


def test_what_a_loop_does_counts_at_each_trip() -> None:
    assert additions(loop(LESS), 99) == 4
    assert additions(loop("ROOT %go = pred[] copy(%f.2)"), 99) == 99
    assert additions(loop(LESS, start="constant(40)"), 99) == 0
    assert additions(loop(LESS), 99, of_body=lambda loop, body: {"add": body["add"] + 0.5}) == 4 * 1.5


def test_a_loop_with_a_name_of_its_own_runs_as_often_as_is_said_of_it() -> None:
    named = ', metadata={op_name="jit(f)/outer/while/body/decode/while"}'
    text = loop("ROOT %go = pred[] copy(%f.2)", known=named)
    assert additions(text, 99, loops={"decode": 2.5, "outer": 7.0}) == 2.5
    assert additions(text, 99, loops={"tail": 3.0}) == 99
    assert additions(loop(LESS, known=named), 99, loops={"decode": 2.5}) == 4, "a number that the program says"


def test_of_branches_the_heaviest_counts() -> None:
    text = """\
%none (x: f32[]) -> f32[] {
  ROOT %x = f32[] parameter(0)
}

%twice (y: f32[]) -> f32[] {
  %y = f32[] parameter(0)
  %a = f32[] add(%y, %y)
  ROOT %b = f32[] add(%a, %y)
}

ENTRY %main (p: pred[], z: f32[]) -> f32[] {
  %p = pred[] parameter(0)
  %z = f32[] parameter(1)
  %u = f32[] conditional(%p, %z, %z), BRANCHES
  ROOT %v = f32[] fusion(%u), calls=%twice
}
"""
    for written in ("branch_computations={%none, %twice}", "true_computation=%twice, false_computation=%none"):
        assert additions(text.replace("BRANCHES", written), 1) == 4
