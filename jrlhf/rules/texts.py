"""Rules for the length, the repetition and the wording of an answer."""

import re
from collections.abc import Sequence
from typing import Any

import regex

from jrlhf.system.errors import UsageError

WORD = re.compile(r"\w+")
REFUSALS = (
    r"(?i)\b(?:i|we) (?:cannot|can not|can['’]t|won['’]t|will not|must decline|have to decline)(?! wait)\b",
    r"(?i)\b(?:i['’]m|i am|we['’]re|we are) (?:sorry, but|unable|not able)\b",
    r"(?i)\b(?:i|we) (?:refuse|decline) to\b",
)
"""Patterns of English refusals."""

OPENING = 400
"""Number of characters at the start of an answer to search for a refusal; later phrases have other topics."""


def words(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case."""
    return WORD.findall(text.lower())


def length_band(length: int, *, low: int, high: int) -> float:
    """Return 1 from ``low`` to ``high``, length / low below, and high / length above."""
    if length < low:
        return length / low
    return 1.0 if length <= high else high / length


def repetition(text: str, *, n: int) -> float:
    """Return minus the fraction of the runs of ``n`` words that repeat an earlier one; 0 for a text without runs.

    "a b a b" has three runs of two (a b, b a, a b), of which one is a repetition: -1/3.
    """
    tokens = words(text)
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return (len(set(runs)) - len(runs)) / len(runs) if runs else 0.0


def matching_fraction(text: str, patterns: Sequence["regex.Pattern[str]"], *, timeout: float) -> float:
    """Return the fraction of the patterns that occur in the text.

    A pattern that takes more than ``timeout`` seconds raises TimeoutError, which names it.
    """
    return sum(occurs(text, pattern, timeout=timeout) for pattern in patterns) / len(patterns)


def occurs(text: str, pattern: "regex.Pattern[str]", *, timeout: float) -> bool:
    """Whether the pattern occurs in the text. TimeoutError if that takes more than ``timeout`` seconds."""
    try:
        return pattern.search(text, timeout=timeout) is not None
    except TimeoutError as error:
        raise TimeoutError(
            f"{pattern.pattern!r} took more than {timeout:g} s on an answer of {len(text)} characters"
        ) from error


def refuses(text: str, patterns: Sequence["regex.Pattern[str]"], *, timeout: float) -> bool:
    """Whether a pattern occurs at the start of the text. TimeoutError if one takes more than ``timeout`` seconds."""
    return any(occurs(text[:OPENING], pattern, timeout=timeout) for pattern in patterns)


def refusal(
    text: str, patterns: Sequence["regex.Pattern[str]"], *, expected: bool, penalty: float, timeout: float
) -> float:
    """Return 1 for an expected refusal, minus ``penalty`` for an unexpected one, and 0 for other answers."""
    return 0.0 if not refuses(text, patterns, timeout=timeout) else 1.0 if expected else -penalty


def yes_or_no(value: Any) -> bool:
    """Read a truth value of JSON or CSV; an empty cell is false. UsageError for any other text."""
    cell = str(value).strip().lower()
    if cell not in {"true", "false", "1", "0", "1.0", "0.0", "yes", "no", "none", ""}:
        raise UsageError(f"expected true or false, got {value!r}")
    return cell in {"true", "1", "1.0", "yes"}
