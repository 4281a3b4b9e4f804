"""Whether an answer has the form that was asked for."""

import json
import re
from collections.abc import Callable
from typing import Any

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
