"""The loop on a state of three numbers: it comes back to the bit, from whatever broke it off."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import CanaryConfig, CheckpointConfig, ConfigError, LogConfig
from jrlhf.config.watch import GuardConfig, GuardsConfig
from jrlhf.runs.checkpoints import CheckpointError, Checkpoints
from jrlhf.runs.metrics import read_metrics
from jrlhf.train.guards import GuardStop, Watch
from jrlhf.train.loop import Outcome, run_loop
from jrlhf.train.optim import rate_factor
from jrlhf.train.signals import Interrupted
from jrlhf.train.state import RunState
from tests.support import ROOT
from tests.support.loops import OFF, TOTAL, advance, evaluate, fake_loop, new_state, run, update


def lines(folder: Path) -> list[dict[str, float]]:
    measured = ("time", "share/", "compile/", "n_per_second")
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def bits(state: RunState) -> list[bytes]:
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def board(folder: Path) -> list[tuple[int, str, float]]:
    """All scalars in TensorBoard's files, in the order they were written."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            # A line after a save tells what the save took; a run that came from that save did not make it.
            told = [value for value in event.summary.value if not value.tag.startswith("share/")]
            found += [(event.step, value.tag, value.simple_value) for value in told]
            data = data[16 + size :]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def assert_ends_as(unbroken: tuple[Path, Outcome], folder: Path, outcome: Outcome) -> None:
    assert bits(outcome.state) == bits(unbroken[1].state)
    assert (outcome.first, outcome.last) == (unbroken[1].first, unbroken[1].last)
    assert lines(folder) == lines(unbroken[0])
    told = [(step, tag) for step, tag, _ in board(folder)]
    assert len(set(told)) == len(told), "no step twice"
    assert told == [(step, tag) for step, tag, _ in board(unbroken[0])], "and none missing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["step", "evaluation", "save"])
def test_a_signal_in_any_step_of_any_phase_costs_nothing(
    phase: str, number: int, unbroken: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten runs a case: the first signal comes in the first step, evaluation or save, the next in the one after it."""
    count, due = 0, 0

    def asking(function: Any) -> Any:
        def asked(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == due:
                signal.raise_signal(number)
            return function(*arguments, **named)

        return asked

    changes: dict[str, Any] = {}
    match phase:
        case "step":
            changes["advance"] = asking(advance)
        case "evaluation":
            changes["evaluate"] = asking(evaluate)
        case "save":
            monkeypatch.setattr(Checkpoints, "save", asking(Checkpoints.save))
    for due in range(1, {"step": 11, "evaluation": 5, "save": 3}[phase]):
        folder, count = tmp_path / str(due), 0
        asked_too_late = (phase, due) in {("step", TOTAL), ("evaluation", 4), ("save", 2)}
        with nullcontext() if asked_too_late else pytest.raises(Interrupted, match="saved in") as stopped:
            run(folder, **changes)
        assert stopped is None or stopped.value.number == number
        assert_ends_as(unbroken, folder, run(folder))


def test_broken_off_at_any_step_it_ends_as_the_unbroken_run(unbroken: tuple[Path, Outcome], tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    for last in range(1, TOTAL + 1):

        def dying(state: RunState, number: int, last: int = last) -> tuple[RunState, dict[str, Any]]:
            if number == last:
                raise Killed
            return advance(state, number)

        folder = tmp_path / str(last)
        if last < TOTAL:
            with pytest.raises(Killed):
                run(folder, advance=dying)
        assert_ends_as(unbroken, folder, run(folder))


def test_a_damaged_checkpoint_is_gone_back_from(
    unbroken: tuple[Path, Outcome], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "10" / "notes.json", 5)
    assert_ends_as(unbroken, tmp_path, run(tmp_path))
    assert "checkpoints/10 is damaged (notes.json: 5 bytes" in caplog.text
    for step in (5, 10):
        os.truncate(tmp_path / "checkpoints" / str(step) / "notes.json", 5)
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        run(tmp_path)


SLEEPER = """
    import sys
    from pathlib import Path
    import numpy as np
    sys.path.insert(0, sys.argv[2])
    from tests.support.loops import advance, run

    def long(state, number):
        if number == 7:
            print("working", flush=True)
            a = np.ones((3000, 3000))
            for _ in range(1000):
                a = a @ a * 0  # in C, where no handler of Python's runs
        return advance(state, number)

    run(Path(sys.argv[1]), advance=long)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once(
    number: int, code: int, unbroken: tuple[Path, Outcome], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SLEEPER), str(tmp_path), str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.stderr.readline().startswith("jrlhf: stopping when this step is done")
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.communicate()
    assert_ends_as(unbroken, tmp_path, run(tmp_path))


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from tests.support.loops import advance, run

    def slow(state, number):
        time.sleep(0.03)
        return advance(state, number)

    print("up", flush=True)
    run(Path(sys.argv[1]), advance=slow)
"""


def test_ten_kills_at_random_moments_cost_nothing(unbroken: tuple[Path, Outcome], tmp_path: Path) -> None:
    """SIGKILL, in a save too: a run is started again until it ends, and another one begun, until there were ten."""
    random, kills, runs = np.random.default_rng(0), 0, 0
    for _ in range(40):
        folder = tmp_path / str(runs)
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(ROOT)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.wait(random.uniform(0.2, 2.0) if kills < 10 else 60)
        except subprocess.TimeoutExpired:
            kills += 1
        finally:
            process.kill()
            process.communicate()
        if (folder / "checkpoints" / str(TOTAL)).exists():
            assert_ends_as(unbroken, folder, run(folder))
            runs += 1
            if kills >= 10:
                return
    pytest.fail(f"{kills} kills and {runs} whole runs in 40 starts")


def skipping(*which: int) -> Any:
    """``advance`` that leaves the state as it was in those steps."""

    def bad(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        after, metrics = advance(state, number)
        if number + 1 not in which:
            return after, metrics
        return after._replace(train=state.train), metrics | {"loss": jnp.float32(jnp.nan), "skipped": jnp.float32(1)}

    return bad


def test_skipped_steps_are_counted_and_no_mean_is_theirs(unbroken: tuple[Path, Outcome], tmp_path: Path) -> None:
    run(tmp_path, advance=skipping(2, 8, 9))
    assert [(row["step"], row["event"], row["in_a_row"]) for row in events(tmp_path)] == [
        (2, "skipped", 1),
        (8, "skipped", 1),
        (9, "skipped", 2),
    ]
    told = {row["step"]: row for row in lines(tmp_path) if "loss" in row}
    assert [told[step]["skipped"] for step in (3, 5, 6, 9, 10)] == [1, 0, 0, 2, 0]
    assert all(np.isfinite(row["loss"]) for row in told.values())


def test_a_made_step_s_nan_is_not_excused_by_a_skipped_one(tmp_path: Path) -> None:
    def broken(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        after, metrics = skipping(1)(state, number)
        return after, metrics | ({"kl": jnp.float32(jnp.nan)} if number == 1 else {})

    with pytest.raises(FloatingPointError, match="step 3: kl not finite; the state is not saved"):
        run(tmp_path, advance=broken)
    assert not (tmp_path / "checkpoints").exists()


def test_too_many_in_a_row_end_the_run_with_what_it_read(tmp_path: Path) -> None:
    """Also where a restart comes between: the count is part of what is saved."""

    def stopped(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
        return skipping(5, 6, 7, 8)(state, number)

    with pytest.raises(Interrupted, match="stopped at step 6"):
        run(tmp_path, advance=stopped)
    with pytest.raises(FloatingPointError, match=r"step 7: loss or gradient not finite, 3 steps in a row"):
        run(tmp_path, advance=skipping(5, 6, 7, 8))
    with np.load(tmp_path / "skipped-7.npz", allow_pickle=False) as dump:
        np.testing.assert_array_equal(dump["rows"], np.arange(3) + 6)
    with Checkpoints(tmp_path / "checkpoints", keep=9, keep_best=0, best_metric=None, best_mode="max") as saved:
        assert saved.latest_step() == 6
        kept = saved.restore(6, new_state())
    four = run(tmp_path / "four", total=4).state
    assert bits(kept)[:6] == bits(four)[:6], "the parameters are those after the fourth step"


def healthy(**changes: float) -> dict[str, float]:
    usual = {"kl": 1.0, "entropy": 2.0, "length/mean": 20.0, "repetition": 0.1, "value/explained_variance": 0.5}
    return usual | {"sampler/max_abs_logprob_diff": 0.0} | changes


@pytest.mark.parametrize(
    ("guard", "bound", "bad", "good"),
    [
        ("kl", 5.0, {"kl": 5.1}, {"kl": 4.9}),
        ("negative_kl", -1.0, {"kl": -1.1}, {"kl": -0.9}),
        ("sampler", 0.5, {"sampler/max_abs_logprob_diff": 0.6}, {"sampler/max_abs_logprob_diff": 0.4}),
        ("entropy", 0.5, {"entropy": 0.4}, {"entropy": 0.6}),
        ("length", 2.0, {"length/mean": 41.0}, {"length/mean": 39.0}),
        ("length", 2.0, {"length/mean": 9.0}, {"length/mean": 11.0}),
        ("repetition", 0.2, {"repetition": 0.31}, {"repetition": 0.29}),
        ("explained_variance", -0.5, {"value/explained_variance": -0.6}, {"value/explained_variance": -0.4}),
    ],
)
def test_a_guard_fires_at_the_last_of_its_patience_and_once(
    guard: str, bound: float, bad: dict[str, float], good: dict[str, float]
) -> None:
    off = {name: GuardConfig(action="off") for name in ("kl", *OFF)}
    config = GuardsConfig(**(off | {guard: GuardConfig(bound=bound, patience=2, action="stop")}))

    def fired(watch: Watch, rollouts: list[dict[str, float]]) -> list[list[str]]:
        return [[alarm.guard for alarm in watch.check(healthy(**changes))] for changes in rollouts]

    watch = Watch(config, None)
    assert fired(watch, [{}, bad, good, bad]) == [[], [], [], []]
    assert watch.crossings == 1
    # What it remembers goes through JSON, as into a checkpoint.
    again = Watch(config, json.loads(json.dumps(watch.keep())))
    assert fired(again, [bad, bad, good, bad, bad]) == [[guard], [], [], [], [guard]]
    assert fired(again, [dict.fromkeys(healthy(), float("nan"))]) == [[]]


def straying(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
    """Its KL grows by the learning rate it is run with; 0.5 a step at first. It is of the state before the step."""
    after, metrics = advance(state, number)
    kl = 5.0 * (state.train.step.astype(jnp.float32)) * 0.1 * rate_factor(state.train.opt_state)
    return after, metrics | {name: jnp.float32(v) for name, v in healthy().items()} | {"kl": kl}


def test_a_run_that_strays_goes_back_slower_and_under_a_shorter_leash(tmp_path: Path) -> None:
    guards = GuardsConfig(kl=GuardConfig(bound=2.9, action="rollback"), **OFF)
    outcome = run(tmp_path, advance=straying, guards=guards)
    guard, back = events(tmp_path)
    assert (guard["event"], guard["guard"], guard["step"], guard["action"]) == ("guard", "kl", 7, "rollback")
    assert (back["event"], back["step"], back["to"], back["rate_factor"]) == ("rollback", 7, 5, 0.5)
    at_five = run(tmp_path / "five", total=5).state
    assert back["kl_coef"] == pytest.approx(2 * float(at_five.kl_coef), rel=1e-6)
    # The state of the sixth step is the one that crossed the bound. From that of the fifth, at the data of the eighth,
    # with half the rate.
    expected = at_five._replace(kl_coef=at_five.kl_coef * 2)
    for number in range(7, TOTAL):
        halved = update(expected.train, jax.random.fold_in(expected.key, number))[0]
        moved = jax.tree.map(lambda a, b: a + 0.5 * (b - a), expected.train.params, halved.params)
        expected = expected._replace(train=halved._replace(params=moved), kl_coef=expected.kl_coef * 1.1)
    assert int(outcome.state.cursor) == TOTAL
    assert int(outcome.state.train.step) == TOTAL - 2
    for got, want in zip(
        jax.tree.leaves(outcome.state.train.params), jax.tree.leaves(expected.train.params), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert float(outcome.state.kl_coef) == pytest.approx(float(expected.kl_coef), rel=1e-5)
    lr = [row["lr"] for row in read_metrics(tmp_path / "metrics.jsonl") if "lr" in row]
    assert lr[-1] == pytest.approx(0.5 * 0.1)


def test_a_rollback_too_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    guards = GuardsConfig(kl=GuardConfig(bound=1.4, action="rollback"), rollbacks=9, **OFF)
    whole = tmp_path / "whole", run(tmp_path / "whole", advance=straying, guards=guards)
    assert next(e["to"] for e in events(whole[0]) if e["event"] == "rollback") == 0, "what it began with is kept"

    def stopped(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return straying(state, number)

    with pytest.raises(Interrupted):
        run(tmp_path / "broken", advance=stopped, guards=guards)
    outcome = run(tmp_path / "broken", advance=straying, guards=guards)
    assert_ends_as(whole, tmp_path / "broken", outcome)
    assert [e | {"time": 0} for e in events(tmp_path / "broken")] == [e | {"time": 0} for e in events(whole[0])]


def test_it_goes_back_so_often_and_no_more(tmp_path: Path) -> None:
    guards = GuardsConfig(kl=GuardConfig(bound=0.4, action="rollback"), rollbacks=1, rollback_lr=1.0, **OFF)
    with pytest.raises(GuardStop, match="rolled back 1 times"):
        run(tmp_path, advance=straying, guards=guards)
    stop = replace(guards, kl=GuardConfig(bound=0.4, action="stop"))
    with pytest.raises(GuardStop, match=r"step 2: kl guard \(stop\): 0.5, bound 0.4: the policy has left"):
        run(tmp_path / "stop", advance=straying, guards=stop)


CALM = {"kl": GuardConfig(action="off"), **OFF}
CANARY = CanaryConfig(action="rollback", errors=2.0)


def rising_then_falling(state: RunState, number: int) -> dict[str, float]:
    """Rises with the steps that the parameters have seen up to four of them, and falls after that."""
    seen = int(state.train.step)
    return {"eval/w_mean": float(seen if seen <= 4 else 4 - 3 * (seen - 4)), "eval/w_stderr": 0.5}


def watched_run(folder: Path, **changes: Any) -> Outcome:
    """Evaluations and checkpoints every 2 of 10 steps."""
    parts = {
        "guards": GuardsConfig(**CALM),
        "canary": CANARY,
        "evaluate": rising_then_falling,
        "best_metric": "eval/w_mean",
    }
    return run_loop(
        fake_loop(**(parts | {"advance": straying} | changes)),
        new_state(),
        folder=folder,
        log=LogConfig(every=2, eval_every=2, progress=False, tensorboard=False),
        checkpoint=CheckpointConfig(every=2, keep=1, keep_best=1),
        metadata={},
    )


def test_a_regression_goes_back_to_the_best_state_and_the_best_comes_out(tmp_path: Path) -> None:
    outcome = watched_run(tmp_path)
    told = [(e["event"], e["step"]) for e in events(tmp_path)]
    # Steps 5 and 6 make it worse, beyond two standard errors of the difference (1.41): back to 4. So do 7 and 8, and
    # 9 and 10; two rollbacks are all there are, and the third time the run ends.
    assert told == [
        ("canary", 6), ("rollback", 6), ("canary", 8), ("rollback", 8), ("canary", 10), ("ended", 10),
    ]  # fmt: skip
    assert [e["to"] for e in events(tmp_path) if e["event"] == "rollback"] == [4, 4]
    fall = next(e for e in events(tmp_path) if e["event"] == "canary")
    assert (fall["value"], fall["best"], fall["best_step"]) == (-2.0, 4.0, 4)
    assert fall["margin"] == pytest.approx(2 * np.hypot(0.5, 0.5))
    assert outcome.step == 4
    assert outcome.last == {"eval/w_mean": 4.0, "eval/w_stderr": 0.5}
    at_four = run(tmp_path / "four", total=4).state
    assert bits(outcome.state._replace(kl_coef=at_four.kl_coef))[:6] == bits(at_four)[:6]


def test_a_fall_within_chance_is_no_regression(tmp_path: Path) -> None:
    outcome = watched_run(tmp_path, canary=replace(CANARY, errors=40.0))
    assert events(tmp_path) == []
    assert outcome.step == 4, "the best comes out all the same"


def test_a_canary_may_only_warn_or_end_the_run_at_once(tmp_path: Path) -> None:
    watched_run(tmp_path / "warn", canary=replace(CANARY, action="warn"))
    assert [e["event"] for e in events(tmp_path / "warn")] == ["canary"] * 3
    outcome = watched_run(tmp_path / "stop", canary=replace(CANARY, action="stop"))
    assert [(e["event"], e["step"]) for e in events(tmp_path / "stop")] == [("canary", 6), ("ended", 6)]
    assert outcome.step == 4
    # The same command again does not go on with what was ended.
    again = watched_run(tmp_path / "stop", canary=replace(CANARY, action="stop"))
    assert bits(again.state) == bits(outcome.state)
    assert [(e["event"], e["step"]) for e in events(tmp_path / "stop")] == [("canary", 6), ("ended", 6)]


def test_a_watched_run_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole", watched_run(tmp_path / "whole")

    def stopped(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        if number == 6:
            signal.raise_signal(signal.SIGTERM)
        return straying(state, number)

    with pytest.raises(Interrupted, match="stopped at step 7"):
        watched_run(tmp_path / "broken", advance=stopped)
    outcome = watched_run(tmp_path / "broken")
    assert bits(outcome.state) == bits(whole[1].state)
    assert [e | {"time": 0} for e in events(tmp_path / "broken")] == [e | {"time": 0} for e in events(whole[0])]


def test_of_the_states_that_keep_the_gates_the_best_comes_out(tmp_path: Path) -> None:
    off = replace(CANARY, action="off")
    assert watched_run(tmp_path / "open", canary=off).step == 10, "without gates and canary the last one"
    gated = watched_run(tmp_path / "gated", canary=off, gates=("w_mean <= 3",))
    assert (gated.step, gated.last["eval/w_mean"]) == (2, 2.0)
    none = watched_run(tmp_path / "none", canary=off, gates=("w_mean >= 5",))
    assert none.step == 10, "where none does it is the last, which the stage then refuses"


def test_a_gate_on_a_figure_that_is_not_there_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gates: fake has no held-out figure accuracy; there are w_mean, w_stderr"):
        watched_run(tmp_path, gates=("accuracy > 0",), advance=lambda state, number: pytest.fail("a step was made"))


def test_a_resumed_run_holds_one_state(tmp_path: Path) -> None:
    """The state before the first step would take the memory of another one for the rest of the run."""
    whole, first = run(tmp_path), new_state()
    again = run_loop(
        fake_loop(),
        first,
        folder=tmp_path,
        log=LogConfig(progress=False, tensorboard=False),
        checkpoint=CheckpointConfig(every=5, keep=2, keep_best=0),
        metadata={},
    )
    assert bits(again.state) == bits(whole.state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.train))
