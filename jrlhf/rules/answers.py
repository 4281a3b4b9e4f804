"""Whether an answer is the reference's, as GSM8K keeps it: text, then "#### 42"."""

import re
from fractions import Fraction

MARK = "####"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\$?(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<power>[eE][-+]?[0-9]{1,3})?(?:/(?P<below>[0-9]+))?"
)
"""-1,234.50, $5, 1e3, 3/4. The minus of "7-3" is no sign."""


def number_in(text: str) -> Fraction | None:
    """The first number after the last "####"; without that mark the last number of all. None where there is none."""
    _, marked, after = text.rpartition(MARK)
    matches = list(NUMBER.finditer(after))
    if not matches:
        return None
    match = matches[0 if marked else -1]
    try:
        value = Fraction(match["value"].replace(",", "") + (match["power"] or ""))
        value = value / int(match["below"]) if match["below"] else value
    except (ValueError, ZeroDivisionError):
        # More digits than Python reads, or x/0.
        return None
    return -value if match["sign"] else value


def text_in(text: str) -> str:
    """What stands after the last "####", else all of it: in lower case, its white space made one space each."""
    return " ".join(text.rpartition(MARK)[2].lower().split())


def same_number(text: str, reference: str) -> float:
    """1.0 where the number in the text is the reference's, else 0.0. ValueError for a reference without one."""
    wanted = number_in(reference)
    if wanted is None:
        raise ValueError(f"no number in the reference {reference[-80:]!r}")
    return float(number_in(text) == wanted)


def same_text(text: str, reference: str) -> float:
    """1.0 where the text is the reference's, but for case and white space, else 0.0. ValueError for an empty one."""
    wanted = text_in(reference)
    if not wanted:
        raise ValueError("the reference is empty")
    return float(text_in(text) == wanted)
