"""Forms of an answer, each against answers made by hand."""

import pytest

from jrlhf.rules import markdown, valid_json

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


MARKDOWN = [
    ("", 0, 0, 0.0),
    ("  \n", 0, 0, 0.0),
    ("plain", 0, 0, 1.0),
    ("```py\nx\n```", 0, 0, 1.0),
    ("```py\nx", 0, 0, 0.0),
    ("```", 0, 0, 0.0),
    ("````\n```", 0, 0, 0.0),
    ("~~~\n```\n~~~\nafter", 0, 0, 1.0),
    ("- a\n\n  ```\n  x\n  ```\n- b", 0, 2, 1.0),
    ("- a\n- b", 0, 3, 0.5),
    ("# Titel Ä\n\ntext", 1, 0, 1.0),
    ("#no heading", 1, 0, 0.5),
    ("```\n# a comment\n```", 1, 0, 0.5),
    ("Title\n=====\n\n1. a\n2. b", 1, 2, 1.0),
    ("# a\n```", 1, 1, 1 / 3),
    ("[" * 50_000, 0, 0, 1.0),
    (">" * 50_000, 1, 0, 0.5),
]


@pytest.mark.parametrize(("text", "headings", "lists", "score"), MARKDOWN, ids=[repr(m[0][:12]) for m in MARKDOWN])
def test_markdown(text: str, headings: int, lists: int, score: float) -> None:
    assert markdown(text, headings=headings, lists=lists) == pytest.approx(score)
