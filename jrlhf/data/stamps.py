"""By what a file is known to be as it was without being read, and what rows are known by."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

Stamp = list[int]
"""Bytes, time of change, time of the last change of content, name or rights, and number of a file: that second time
is the system's own, and nobody can set it back."""


def stamps(files: Iterable[Path]) -> dict[str, Stamp]:
    """The stamp of each file by its absolute path; FileNotFoundError for one that is not there."""
    return {str(path.resolve()): stamp(path) for path in files}


def stamp(path: Path) -> Stamp:
    """The stamp of the file that a path leads to."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class SourceRows(NamedTuple):
    """What the rows of one source are known by."""

    source: str
    digest: str
    """Of the rows as they were tokenised."""
    files: dict[str, Stamp]
    """What they were read from, as it was before it was read; nothing for standard input."""
    local: bool
    """Whether the source is a file's name or a pattern, not a data set on the hub."""
