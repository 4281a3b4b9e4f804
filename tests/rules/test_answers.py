"""Results read out of answers, each against texts made by hand."""

from fractions import Fraction

import pytest

from jrlhf.rules import number_in, same_number, same_text, text_in

NUMBERS = [
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", 72),
    ("#### 42 apples, 3 left", 42),
    ("#### -1,000", -1000),
    ("first #### 1 then #### 2", 2),
    ("it is 1,234.50 dollars", Fraction(2469, 2)),
    ("The answer is **$18.**", 18),
    ("7-3", 3),
    ("2 - 3 = -1", -1),
    ("(-5)", -5),
    ("\u22127", -7),
    ("-$5", -5),
    ("1, 2 and 3", 3),
    ("1,2", 2),
    (".5", Fraction(1, 2)),
    ("1e3", 1000),
    ("3/4", Fraction(3, 4)),
    ("5/0", None),
    ("", None),
    ("none at all", None),
    ("12 ####", None),
    ("\u0664\u0662", None),
    ("9" * 5_000, None),
    ("1 " * 200_000 + "7", 7),
    ("1," * 200_000 + "7", 7),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS, ids=[repr(text[:16]) for text, _ in NUMBERS])
def test_the_number_of_an_answer(text: str, number: Fraction | int | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("So she has 72.", "... #### 72", 1.0),
        ("#### 72.00", "72", 1.0),
        ("1,234", "#### 1234", 1.0),
        ("73", "#### 72", 0.0),
        ("", "#### 0", 0.0),
        ("no idea", "0", 0.0),
        ("72 clips, of 80", "72", 0.0),
    ],
)
def test_same_number(answer: str, reference: str, score: float) -> None:
    assert same_number(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("paris", "Paris", 1.0),
        ("It is the capital.\n####  New   York\n", "new york", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("ÄRGER", "ärger", 1.0),
    ],
)
def test_same_text(answer: str, reference: str, score: float) -> None:
    assert same_text(answer, reference) == score


def test_a_reference_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the reference has no number: 'abc'"):
        same_number("1", "abc")
    with pytest.raises(ValueError, match="the reference is empty"):
        same_text("1", " #### ")
    assert text_in("a #### B  c") == "b c"
