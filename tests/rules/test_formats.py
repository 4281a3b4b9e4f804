"""Forms of an answer, each against answers made by hand."""

import pytest

from jrlhf.rules import valid_json

CASES = [
    ('{"a": 1}', 1.0, 1.0),
    ("[]", 1.0, 1.0),
    (' \n"é \U0001f600"\n', 1.0, 1.0),
    ("1e5", 1.0, 1.0),
    ("", 0.0, 0.0),
    ("   ", 0.0, 0.0),
    ("Sure: {}", 0.0, 0.0),
    ("{} {}", 0.0, 0.0),
    ("{'a': 1}", 0.0, 0.0),
    ('{"a": 1,}', 0.0, 0.0),
    ("NaN", 0.0, 0.0),
    ('{"a": [1, -Infinity]}', 0.0, 0.0),
    ("\ufeff{}", 0.0, 0.0),
    ("```json\n{}\n```", 0.0, 1.0),
    ("\n```\n[1,\n2]\n```\n", 0.0, 1.0),
    ("```json\n{}\n", 0.0, 0.0),
    ("Here:\n```json\n{}\n```", 0.0, 0.0),
    ("```json\n{}\n```\n```json\n{}\n```", 0.0, 0.0),
    ("[" * 200_000, 0.0, 0.0),
    ("[" * 200_000 + "]" * 200_000, 0.0, 0.0),
    ("9" * 100_000, 0.0, 0.0),
    ("[" + "1," * 500_000 + "1]", 1.0, 1.0),
    ("```" * 100_000, 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "bare", "fenced"), CASES, ids=[f"{text[:20]!r}-{len(text)}" for text, *_ in CASES])
def test_valid_json(text: str, bare: float, fenced: float) -> None:
    assert valid_json(text, fenced=False) == bare
    assert valid_json(text, fenced=True) == fenced


def test_it_must_fit() -> None:
    assert valid_json("3", fenced=False, fits=lambda value: value == 3) == 1.0
    assert valid_json("4", fenced=False, fits=lambda value: value == 3) == 0.0
