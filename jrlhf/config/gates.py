"""Bounds that a stage's held-out figures must keep before its model is passed on. Imports no JAX."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jrlhf.system.errors import UsageError

HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*(?P<metric>[\w/.-]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[-+.\deE]+)\s*")
FORM = "a metric, one of < <= >= >, and a number, as 'accuracy >= 0.6'"


class Gate(NamedTuple):
    """``metric`` is a name of the stage's evaluation, without its ``eval/``."""

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


class Verdict(NamedTuple):
    """What a gate found. ``missed_by`` is 0 where it passed."""

    gate: str
    value: float
    passed: bool
    missed_by: float


class GatesFailed(RuntimeError):
    """A stage's model is not passed on. The message is a table of what failed, and by how much."""


def parse_gate(text: str) -> Gate:
    """``"accuracy >= 0.6"``; UsageError for anything else."""
    match = _GATE.fullmatch(text)
    try:
        bound = math.nan if match is None else float(match["bound"])
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise UsageError(f"{text!r} is no gate: {FORM}")
    return Gate(match["metric"], match["sign"], bound)


def is_gate(text: str) -> bool:
    try:
        parse_gate(text)
    except ValueError:
        return False
    return True


def unknown_metrics(gates: Sequence[str], figures: Mapping[str, float]) -> list[str]:
    """The metrics that gates name and an evaluation does not have."""
    return [name for name in (parse_gate(gate).metric for gate in gates) if f"eval/{name}" not in figures]


def judge(gates: Sequence[str], figures: Mapping[str, float]) -> list[Verdict]:
    """Each gate on an evaluation's figures. A figure that is not finite, or not there, passes no gate."""
    return [_judge_one(parse_gate(gate), figures) for gate in gates]


def _judge_one(gate: Gate, figures: Mapping[str, float]) -> Verdict:
    value = float(figures.get(f"eval/{gate.metric}", math.nan))
    passed = bool(HOLDS[gate.sign](value, gate.bound))
    return Verdict(str(gate), value, passed, 0.0 if passed else abs(value - gate.bound))


def all_pass(gates: Sequence[str], figures: Mapping[str, float]) -> bool:
    return all(verdict.passed for verdict in judge(gates, figures))


def failure(stage: str, verdicts: Sequence[Verdict]) -> GatesFailed:
    """The error for those of ``verdicts`` that did not pass."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    width = max(len(verdict.gate) for verdict in failed)
    rows = [f"  {v.gate:<{width}}  got {v.value:.4g}, missed by {v.missed_by:.4g}" for v in failed]
    told = f"{stage}: {len(failed)} of {len(verdicts)} gates failed; its model is not passed on"
    return GatesFailed("\n".join([told, *rows]))
