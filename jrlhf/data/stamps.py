"""Stamps that tell whether a file has changed without reading it, and identities of a source's rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

Stamp = list[int]
"""A file's size in bytes, modification time, inode change time (both in ns) and inode number.

Only the system sets the inode change time, so nobody can set it back.
"""


def stamps(files: Iterable[Path]) -> dict[str, Stamp]:
    """Return each file's stamp by its absolute path; raise FileNotFoundError for a missing file."""
    return {str(path.resolve()): stamp(path) for path in files}


def stamp(path: Path) -> Stamp:
    """Return the stamp of a file, following links."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class SourceRows(NamedTuple):
    """The identity of one source's rows."""

    source: str
    digest: str
    """Digest of the tokenised rows."""
    files: dict[str, Stamp]
    """Stamps of the source's files from before they were read; empty for standard input."""
    local: bool
    """True for a file name or pattern, False for a data set on the hub."""
