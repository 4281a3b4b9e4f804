"""Length, repetition and wording of an answer."""

import re

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return WORD.findall(text.lower())


def length_band(length: int, *, low: int, high: int) -> float:
    """1 from ``low`` to ``high``; length / low below and high / length above: 0 for nothing, near 0 for the endless."""
    if length < low:
        return length / low
    return 1.0 if length <= high else high / length
