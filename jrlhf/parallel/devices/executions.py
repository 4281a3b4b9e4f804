"""Sums over all that a program executes: loops count as often as they run, and of branches one."""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jrlhf.parallel.devices.hlo import Computation, Instruction, Module

TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COPIES = frozenset({"copy", "bitcast", "copy-start", "copy-done", "opt-barrier"})

ALL_ALIKE: Mapping[str, float] = MappingProxyType({})
"""No loop with a number of trips of its own."""

Amounts = dict[Any, float]
"""Amounts of whatever a sum is about, such as bytes by mesh axes."""


def sum_over_executions(
    module: Module,
    of_instruction: Callable[[Computation, Instruction], Amounts | None],
    *,
    weight: Callable[[Amounts], float],
    trips: int,
    loops: Mapping[str, float] = ALL_ALIKE,
    of_body: Callable[[Instruction, Amounts], Amounts] = lambda loop, body: body,
) -> Amounts:
    """Sum ``of_instruction(computation, instruction)`` over all that one execution of the module executes.

    Where it returns None, the computations that the instruction calls are summed. A loop counts as often as it runs,
    ``trips`` times if its end depends on data, or as often as ``loops`` says of its name, the innermost scope in which
    it is built. ``of_body`` may change the sum of one iteration. Of a conditional the branch with the highest
    ``weight`` counts.
    """
    totals: dict[str, Amounts] = {}

    def of(name: str) -> Amounts:
        if name not in totals:
            computation, totals[name] = module.computations.get(name, {}), {}
            for instruction in computation.values():
                _add(totals[name], of_one(computation, instruction))
        return totals[name]

    def of_one(computation: Computation, instruction: Instruction) -> Amounts:
        part = of_instruction(computation, instruction)
        if part is not None:
            return part
        if instruction.opcode == "conditional":
            return max((of(name) for name in instruction.branches), key=weight, default={})
        inside: Amounts = {}
        for name in instruction.called.values():
            _add(inside, of(name))
        if instruction.opcode != "while":
            return inside
        known = loop_trips(module, computation, instruction)
        count = loops.get(scope_of(instruction), trips) if known is None else known
        return {key: count * value for key, value in of_body(instruction, inside).items()}

    return of(module.entry)


def _add(total: Amounts, part: Amounts) -> None:
    for key, value in part.items():
        total[key] = total.get(key, 0.0) + value


def scope_of(loop: Instruction) -> str:
    """Return the innermost scope in which a loop is built: "decode" of ``jit(f)/refill/while/body/decode/while``."""
    scopes = loop.quoted("op_name").split("/")
    return scopes[-2] if len(scopes) > 1 else ""


def loop_trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Return the number of iterations of a loop; None if data decides when it ends.

    XLA for CPU and GPU writes the number down. On a TPU it follows from the condition ``counter < bound``, from the
    counter's start, 0 where that is computed, and from its step.
    """
    if known := TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    called = loop.called
    condition, body = (module.computations.get(called.get(role, ""), {}) for role in ("condition", "body"))
    test = next((i for i in condition.values() if i.root), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition.get(name) for name in test.operands)
    if counter is None or bound is None or counter.opcode != "get-tuple-element":
        return None
    place = _index(counter)
    limit = _start(computation, loop, _index(bound)) if bound.opcode == "get-tuple-element" else _constant(bound)
    if limit is None:
        return None
    return max(0, math.ceil((limit - (_start(computation, loop, place) or 0)) / _step(body, place)))


def _index(element: Instruction) -> int:
    match = re.search(r"index=(\d+)", element.attributes)
    return int(match[1]) if match else 0


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


def _start(computation: Computation, loop: Instruction, place: int) -> int | None:
    """Return the constant with which an element of a loop's state starts."""
    state = _source(computation, loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    return _constant(_source(computation, state.operands[place]))


def _source(computation: Computation, name: str) -> Instruction | None:
    """Follow copies to the instruction that makes a value."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in COPIES:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _step(body: Computation, place: int) -> int:
    """Return the constant that an iteration adds to an element of the state; 1 if it is no constant."""
    root = next((i for i in body.values() if i.root), None)
    if root is None or root.opcode != "tuple":
        return 1
    added = body.get(root.operands[place])
    if added is None or added.opcode != "add":
        return 1
    return next((step for name in added.operands if (step := _constant(body.get(name)))), 1)
