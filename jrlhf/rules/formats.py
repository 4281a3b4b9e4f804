"""Whether an answer has the form that was asked for."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
"""A text that is one fenced block and nothing else."""


def valid_json(text: str, *, fenced: bool, fits: Callable[[Any], bool] | None = None) -> float:
    """1.0 for JSON as RFC 8259 has it (no NaN, no text around it) that also ``fits``, else 0.0.

    ``fenced``: the JSON may stand in a Markdown code fence.
    """
    if fenced and (inside := FENCE.fullmatch(text)):
        text = inside[1]
    try:
        value = json.loads(text, parse_constant=_refuse)
        return float(fits is None or fits(value))
    except (ValueError, RecursionError):
        # RecursionError: nested deeper than can be read, by this reader or by the schema's.
        return 0.0


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


BLOCKS = MarkdownIt("commonmark").disable("inline")
"""Reads blocks alone; what stands within a line is no part of the structure."""


def markdown(text: str, *, headings: int, lists: int) -> float:
    """The share of what is asked for that holds: all code fences closed, so many headings, so many list items.

    What is asked for 0 times does not count; a blank text has none of it.
    """
    if not text.strip():
        return 0.0
    # The end of the last line counts as one.
    blocks = BLOCKS.parse(text + "\n")
    kinds = Counter(block.type for block in blocks)
    holds = [all(_closed(block) for block in blocks if block.type == "fence")]
    holds += [kinds["heading_open"] >= headings] * (headings > 0) + [kinds["list_item_open"] >= lists] * (lists > 0)
    return sum(holds) / len(holds)


def _closed(fence: Token) -> bool:
    """A closed one has a line more than its opening and its content."""
    first, end = fence.map or (0, 0)
    return end - first - 1 > fence.content.count("\n")
