"""Tables of encoded rows as flat arrays, written a block at a time to memory or to files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jrlhf.data.errors import Skips
from jrlhf.data.ragged import Column, Flat

BLOCK_VALUES, BLOCK_ROWS = 2**20, 2**12
"""Number of values and of rows after which a block is written."""


class Encoded(NamedTuple):
    """One encoded row of a source: the arrays to append to each column.

    Each array in ``ragged`` is one row of its column and has its own length. Arrays in ``flat`` are appended as they
    are. ``unread`` names the row's columns and message fields that nothing reads.
    """

    ragged: Mapping[str, list[Any]]
    flat: Mapping[str, Any]
    notes: Sequence[str] = ()
    """Notes on the row, such as that it was cut; ``Notes`` counts them."""
    unread: Sequence[str] = ()


class Schema(NamedTuple):
    """The columns of a kind of rows and their NumPy types."""

    ragged: Mapping[str, type]
    flat: Mapping[str, type]

    def files(self) -> dict[str, np.dtype]:
        """Return the type of each flat array by name; a ragged column has three: values, lengths and ends."""
        types = {name: np.dtype(kind) for name, kind in (*self.ragged.items(), *self.flat.items())}
        for name in self.ragged:
            types |= {f"{name}.lengths": np.dtype(np.int32), f"{name}.ends": np.dtype(np.int64)}
        return types


class Table(NamedTuple):
    """The rows of one source in columns, with the counts of skipped rows and of notes."""

    ragged: Mapping[str, Column]
    flat: Mapping[str, Flat]
    rows: int
    skipped: dict[str, int]
    notes: dict[str, int]
    digest: str = ""
    """Digest of the rows, from ``Writer.digest``."""

    @classmethod
    def from_arrays(cls, schema: Schema, arrays: Mapping[str, Flat], rows: int, skips: Skips) -> "Table":
        """Build a table and log what was skipped and noted; raise ``DataError`` if no rows remain."""
        skipped = skips.close(rows)
        ragged = {
            n: Column(arrays[n], arrays[f"{n}.lengths"].values, arrays[f"{n}.ends"].values) for n in schema.ragged
        }
        return cls(ragged, {name: arrays[name] for name in schema.flat}, rows, skipped, skips.notes.counts)


class Writer:
    """Collects rows into blocks; ``write(name, values)`` appends a block to the array of that name."""

    def __init__(self, schema: Schema, write: Callable[[str, np.ndarray], None]) -> None:
        self._types = schema.files()
        self._write = write
        self._parts: dict[str, list[Any]] = {name: [] for name in self._types}
        self._ends = dict.fromkeys(schema.ragged, 0)
        self._gathered = 0
        self._digests = {name: xxhash.xxh3_128() for name in self._types}
        self.rows = 0

    def add(self, row: Encoded) -> None:
        """Append a row to every column."""
        for name, arrays in row.ragged.items():
            for array in arrays:
                self._ends[name] += len(array)
                self._gathered += len(array)
                self._parts[name].append(array)
                self._parts[f"{name}.lengths"].append((len(array),))
                self._parts[f"{name}.ends"].append((self._ends[name],))
        for name, values in row.flat.items():
            self._parts[name].append(values)
        self.rows += 1
        if self._gathered >= BLOCK_VALUES or self.rows % BLOCK_ROWS == 0:
            self.flush()

    def flush(self) -> None:
        """Write the collected block."""
        for name, parts in self._parts.items():
            if parts:
                values = np.concatenate([np.asarray(part, self._types[name]) for part in parts])
                self._digests[name].update(values.data)
                self._write(name, values)
                parts.clear()
        self._gathered = 0

    def digest(self) -> str:
        """Return the digest of all written rows; it depends on the rows and their order, not on the blocks."""
        columns = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(self._digests.items()))
        return xxhash.xxh3_128_hexdigest(columns.encode())


def memory_table(schema: Schema, fill: Callable[[Writer], Skips]) -> Table:
    """Return the rows that ``fill`` adds as a table in memory."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in schema.files()}
    writer = Writer(schema, lambda name, values: parts[name].append(values))
    skips = fill(writer)
    writer.flush()
    if writer.rows == 0:
        skips.close(0)
    flats = {name: Flat(np.concatenate(arrays)) for name, arrays in parts.items()}
    return Table.from_arrays(schema, flats, writer.rows, skips)._replace(digest=writer.digest())


def mapped_table(schema: Schema, folder: Path, rows: int, skips: Skips) -> Table:
    """Return a table whose arrays are mapped files of a folder."""
    arrays = {name: Flat.from_file(folder / name, dtype) for name, dtype in schema.files().items()}
    return Table.from_arrays(schema, arrays, rows, skips)


def concatenate(flats: Iterable[Flat]) -> np.ndarray:
    """Concatenate the arrays of all sources; a single array is returned without a copy."""
    arrays = [flat.values for flat in flats]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
