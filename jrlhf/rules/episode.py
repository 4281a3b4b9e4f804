"""Input of a rule."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Episode(NamedTuple):
    """A prompt and its answer."""

    row: Mapping[str, Any]
    """Row of the prompt: ``prompt`` as in the data, and the other columns that some rule reads."""
    completion: str
    tokens: int
    """Number of sampled tokens, including the stop token."""
    stopped: bool
    """Whether a stop token ended the answer; otherwise it reached the length limit."""
