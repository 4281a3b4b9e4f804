"""Comparison of an answer with a reference in GSM8K's form: text, then "#### 42"."""

import re
from fractions import Fraction

from jrlhf.system.errors import UsageError

MARK = "####"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\$?(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<power>[eE][-+]?[0-9]{1,3})?(?:/(?P<below>[0-9]+))?"
)
"""Numbers such as -1,234.50, $5, 1e3 and 3/4. The minus in "7-3" is not a sign."""


def number_in(text: str) -> Fraction | None:
    """Return the first number after the last "####", or without that mark the last number; None if there is no
    number."""
    _, mark, after = text.rpartition(MARK)
    matches = list(NUMBER.finditer(after))
    if not matches:
        return None
    match = matches[0 if mark else -1]
    try:
        value = Fraction(match["value"].replace(",", "") + (match["power"] or ""))
        value = value / int(match["below"]) if match["below"] else value
    except (ValueError, ZeroDivisionError):
        # The number has more digits than Python reads, or it is x/0.
        return None
    return -value if match["sign"] else value


def text_in(text: str) -> str:
    """Return the text after the last "####", else all of it: in lower case, with single spaces."""
    return " ".join(text.rpartition(MARK)[2].lower().split())


def same_number(text: str, reference: str) -> float:
    """Return 1.0 if the text has the number of the reference, else 0.0. UsageError for a reference without a number."""
    expected = number_in(reference)
    if expected is None:
        raise UsageError(f"the reference has no number: {reference[-80:]!r}")
    return float(number_in(text) == expected)


def same_text(text: str, reference: str) -> float:
    """Return 1.0 if the text is the reference apart from case and white space, else 0.0. UsageError for an empty
    reference."""
    expected = text_in(reference)
    if not expected:
        raise UsageError("the reference is empty")
    return float(text_in(text) == expected)
