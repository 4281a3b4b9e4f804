"""Rules for the form of an answer: JSON and Markdown."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
"""Pattern of a text that is a single fenced block."""


def valid_json(text: str, *, fenced: bool, fits: Callable[[Any], bool] | None = None) -> float:
    """Return 1.0 for JSON by RFC 8259 (no NaN, no text around it) that also satisfies ``fits``, else 0.0.

    ``fenced`` also accepts JSON inside a Markdown code fence.
    """
    if fenced and (inside := FENCE.fullmatch(text)):
        text = inside[1]
    try:
        value = json.loads(text, parse_constant=_refuse)
        return float(fits is None or fits(value))
    except (ValueError, RecursionError):
        # RecursionError: the nesting is too deep for this reader, or for that of the schema.
        return 0.0


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


BLOCKS = MarkdownIt("commonmark").disable("inline")
"""Parser of blocks only; text within a line is not part of the structure."""


def markdown(text: str, *, headings: int, lists: int) -> float:
    """Return the fraction of requirements that hold: closed code fences, minimum numbers of headings and list items.

    A minimum of 0 is no requirement. A blank text scores 0.
    """
    if not text.strip():
        return 0.0
    # A newline at the end makes the last line complete.
    blocks = BLOCKS.parse(text + "\n")
    kinds = Counter(block.type for block in blocks)
    passes = [all(_is_closed(block) for block in blocks if block.type == "fence")]
    passes += [kinds["heading_open"] >= headings] * (headings > 0) + [kinds["list_item_open"] >= lists] * (lists > 0)
    return sum(passes) / len(passes)


def _is_closed(fence: Token) -> bool:
    """Whether a fence has another line besides its opening and its content."""
    first, end = fence.map or (0, 0)
    return end - first - 1 > fence.content.count("\n")
