"""Gates: their form, what passes, and what is said of one that does not."""

import math

import pytest

from jrlhf.config.gates import Gate, GatesFailed, all_pass, failure, is_gate, judge, parse_gate, unknown_metrics


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("accuracy >= 0.6", Gate("accuracy", ">=", 0.6)),
        ("kl<=10", Gate("kl", "<=", 10.0)),
        ("  rule/json > -1.5e-1 ", Gate("rule/json", ">", -0.15)),
        ("nll < 2", Gate("nll", "<", 2.0)),
    ],
)
def test_a_gate_is_a_metric_a_sign_and_a_number(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy = 0.6", "accuracy >= ", ">= 1", "a b >= 1", "kl <= ten", "kl <= 1e999", "x < 1 y"],
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    assert not is_gate(text)
    with pytest.raises(ValueError, match="is not a gate: expected a metric, one of"):
        parse_gate(text)


def test_a_bound_is_kept_or_missed_by_so_much() -> None:
    figures = {"eval/accuracy": 0.55, "eval/kl": 10.0, "eval/nll": math.nan}
    low, kl, strict, none, absent = judge(["accuracy >= 0.6", "kl <= 10", "kl < 10", "nll < 9", "ece < 1"], figures)
    assert (low.passed, low.missed_by) == (False, pytest.approx(0.05))
    assert (kl.passed, kl.missed_by) == (True, 0.0)
    assert (strict.passed, strict.missed_by) == (False, 0.0)
    assert not none.passed
    assert not absent.passed
    assert all_pass(["kl <= 10"], figures)
    assert not all_pass(["kl <= 10", "accuracy >= 0.6"], figures)
    assert all_pass([], {})
    assert unknown_metrics(["ece < 1", "kl < 3"], figures) == ["ece"]


def test_the_failure_is_a_table_of_what_failed() -> None:
    error = failure("ppo", judge(["accuracy >= 0.6", "kl <= 10"], {"eval/accuracy": 0.55, "eval/kl": 3.0}))
    assert isinstance(error, GatesFailed)
    assert str(error) == (
        "ppo: 1 of 2 gates failed; its model is not passed on\n  accuracy >= 0.6  got 0.55, missed by 0.05"
    )
