"""What stands beside the texts of a row: the margin and ranks of a ranking, and the label of an unpaired answer."""

from collections.abc import Mapping
from typing import Any

from jrlhf.data.errors import BadRow, absent

LARGEST = 2**31
"""Ranks and margins stay below it, as they become int32 and float32."""

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def label_of(value: Any) -> bool:
    """Whether an answer is a good one: true or false, 1 or 0, also as CSV has them."""
    if (good := LABELS.get(str(value).strip().lower())) is None:
        raise BadRow("label", "expected true or false", f", found {value!r}")
    return good


def is_verdict(value: Any) -> bool:
    """Whether a label is the word true or false, also as CSV has it, and no number: that may be a class."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def margin_of(value: Any) -> float:
    """A number, also as CSV has it; 0 where there is none."""
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        margin = None
    if margin is None or not abs(margin) < LARGEST:
        raise BadRow("margin", "expected a number", f", found {value!r}")
    return margin


def ranks_of(row: Mapping[str, Any], count: int) -> list[int]:
    """The ranks of so many completions."""
    ranks = row.get("ranks")
    if ranks is None:
        raise absent(row, "ranks", rest="; give each completion its rank, 0 for the best")
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadRow("ranks", f"expected {count} ranks, one a completion")
    if any(isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < LARGEST for rank in ranks):
        raise BadRow("ranks", "expected whole numbers, 0 for the best", f", found {ranks}")
    return ranks
