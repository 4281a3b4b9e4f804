"""Bounds on a stage's held-out figures, which a model must meet before it is passed on. Imports no JAX."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jrlhf.system.errors import RunError, UsageError

HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*(?P<metric>[\w/.-]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[-+.\deE]+)\s*")
FORM = "a metric, one of < <= >= >, and a number, such as 'accuracy >= 0.6'"


class Gate(NamedTuple):
    """One bound. ``metric`` is a name from the stage's evaluation without its ``eval/``."""

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


class Verdict(NamedTuple):
    """Result of one gate. ``missed_by`` is 0 if it passed."""

    gate: str
    value: float
    passed: bool
    missed_by: float


class GatesFailed(RunError):
    """Gates failed, so the stage's model is not passed on. The message is a table of the failed gates and their
    distances."""


def parse_gate(text: str) -> Gate:
    """Parse a gate such as ``"accuracy >= 0.6"``; UsageError for any other form."""
    match = _GATE.fullmatch(text)
    try:
        bound = math.nan if match is None else float(match["bound"])
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise UsageError(f"{text!r} is not a gate: expected {FORM}")
    return Gate(match["metric"], match["sign"], bound)


def is_gate(text: str) -> bool:
    """Whether a text has the form of a gate."""
    try:
        parse_gate(text)
    except ValueError:
        return False
    return True


def unknown_metrics(gates: Sequence[str], figures: Mapping[str, float]) -> list[str]:
    """Return the metrics that gates name but the evaluation lacks."""
    return [name for name in (parse_gate(gate).metric for gate in gates) if f"eval/{name}" not in figures]


def judge(gates: Sequence[str], figures: Mapping[str, float]) -> list[Verdict]:
    """Test each gate on the figures of an evaluation. A figure that is missing or not finite passes no gate."""
    return [_judge_one(parse_gate(gate), figures) for gate in gates]


def _judge_one(gate: Gate, figures: Mapping[str, float]) -> Verdict:
    value = float(figures.get(f"eval/{gate.metric}", math.nan))
    passed = bool(HOLDS[gate.sign](value, gate.bound))
    return Verdict(str(gate), value, passed, 0.0 if passed else abs(value - gate.bound))


def all_pass(gates: Sequence[str], figures: Mapping[str, float]) -> bool:
    """Whether the figures of an evaluation pass every gate."""
    return all(verdict.passed for verdict in judge(gates, figures))


def failure(stage: str, verdicts: Sequence[Verdict]) -> GatesFailed:
    """Build the error for the verdicts that did not pass."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    width = max(len(verdict.gate) for verdict in failed)
    rows = [f"  {v.gate:<{width}}  got {v.value:.4g}, missed by {v.missed_by:.4g}" for v in failed]
    summary = f"{stage}: {len(failed)} of {len(verdicts)} gates failed; its model is not passed on"
    return GatesFailed("\n".join([summary, *rows]))
