"""What a rule may know of an answer."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Episode(NamedTuple):
    """A prompt and what was answered to it."""

    row: Mapping[str, Any]
    """The prompt's row: ``prompt`` as it was given, and the other columns that some rule asks for."""
    completion: str
    tokens: int
    """Sampled, the stop token included."""
    stopped: bool
    """Whether a stop token ended the answer; else the length limit did."""
