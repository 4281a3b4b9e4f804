"""Parsers of a row's annotations: the margin and ranks of a ranking, and the label of a single answer."""

from collections.abc import Mapping
from typing import Any

from jrlhf.data.errors import BadRow, missing_value

MAX_MAGNITUDE = 2**31
"""Upper bound of ranks and margins, which become int32 and float32."""

UNPAIRED = (
    "an answer by itself makes no pair; a ranking needs chosen and rejected, or completions and ranks, and only "
    "dpo.loss kto learns from labelled answers"
)

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def label_of(value: Any) -> bool:
    """Parse whether an answer is good: true or false, 1 or 0, or their texts in CSV."""
    if (good := LABELS.get(str(value).strip().lower())) is None:
        raise BadRow("label", "expected true or false, or 1 or 0", f", found {value!r}")
    return good


def is_verdict(value: Any) -> bool:
    """Tell whether a label is true or false, or its text in CSV; a number may be a class."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def margin_of(value: Any) -> float:
    """Parse a margin from a number or its text in CSV; a missing one is 0."""
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        margin = None
    if margin is None or not abs(margin) < MAX_MAGNITUDE:
        raise BadRow("margin", "expected a number", f", found {value!r}")
    return margin


def ranks_of(row: Mapping[str, Any], count: int) -> list[int]:
    """Parse the ranks of ``count`` completions; 0 is the best."""
    ranks = row.get("ranks")
    if ranks is None:
        raise missing_value(row, "ranks", rest="; give each completion its rank, 0 for the best")
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadRow("ranks", f"expected {count} ranks, one per completion")
    if any(isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < MAX_MAGNITUDE for rank in ranks):
        raise BadRow("ranks", "expected whole numbers, 0 for the best", f", found {ranks}")
    return ranks
