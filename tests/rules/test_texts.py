"""Length and wording, each against texts made by hand."""

import pytest
import regex

from jrlhf.rules import REFUSALS, length_band, matching_fraction, refusal, repetition, words, yes_or_no


@pytest.mark.parametrize(
    ("length", "score"), [(0, 0.0), (5, 0.5), (10, 1.0), (15, 1.0), (20, 1.0), (40, 0.5), (20_000_000, 1e-6)]
)
def test_length_band(length: int, score: float) -> None:
    assert length_band(length, low=10, high=20) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", []), ("  ?! ", []), ("Ein Ärger, 2 mal", ["ein", "ärger", "2", "mal"]), ("日本 語", ["日本", "語"])],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "n", "score"),
    [
        ("", 3, 0.0),
        ("one two", 3, 0.0),
        ("a b a b", 2, -1 / 3),
        ("A b, a B", 2, -1 / 3),
        ("a b c d", 1, 0.0),
        ("ja ja ja ja", 1, -3 / 4),
        ("größe über größe über größe", 2, -0.5),
        ("x " * 100_000, 3, -1 + 1 / 99_998),
    ],
)
def test_repetition(text: str, n: int, score: float) -> None:
    assert repetition(text, n=n) == pytest.approx(score)


def patterns(*texts: str) -> list[regex.Pattern[str]]:
    return [regex.compile(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("a cat", 0.5), ("a cat and a Dog", 1.0), ("\u00fc", 0.0), ("cat" * 100_000, 0.5)],
)
def test_matching_fraction(text: str, share: float) -> None:
    assert matching_fraction(text, patterns("cat", "(?i)dog"), timeout=10.0) == share


def test_a_pattern_that_does_not_end_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"'\(a\|aa\)\+\$' took more than 0\.05 s on an answer of 41 characters"):
        matching_fraction("a" * 40 + "!", patterns("(a|aa)+$"), timeout=0.05)


ANSWERED = [
    ("I cannot help with that.", True),
    ("I'm sorry, but that is not something to do.", True),
    ("I’m unable to say.", True),
    ("We will not tell.", True),
    ("I must decline.", True),
    ("I refuse to.", True),
    ("", False),
    ("I can't wait to tell you!", False),
    ("Sorry seems to be the hardest word.", False),
    ("Sure, here it is.", False),
    ("x" * 1000 + " I cannot say", False),
]


@pytest.mark.parametrize(("text", "refuses"), ANSWERED)
def test_a_refusal_is_good_where_it_is_wanted(text: str, refuses: bool) -> None:
    known = patterns(*REFUSALS)
    assert refusal(text, known, expected=True, penalty=0.5, timeout=10.0) == float(refuses)
    assert refusal(text, known, expected=False, penalty=0.5, timeout=10.0) == -0.5 * refuses


@pytest.mark.parametrize(
    ("cell", "meant"),
    [(True, True), (False, False), (None, False), ("", False), ("True", True), (" no ", False), (1, True), (1.0, True)],
)
def test_cells_of_truth(cell: object, meant: bool) -> None:
    assert yes_or_no(cell) == meant


def test_a_cell_of_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="expected true or false, got 'maybe'"):
        yes_or_no("maybe")
