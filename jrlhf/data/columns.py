"""Rows on their way into flat arrays, a block at a time: into memory, or into files that are mapped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jrlhf.data.errors import Skips
from jrlhf.data.ragged import Column, Flat

BLOCK_VALUES, BLOCK_ROWS = 2**20, 2**12
"""As much is gathered before it is written."""


class Encoded(NamedTuple):
    """What one row of a source becomes: arrays by the column they are appended to.

    ``ragged``: each array is a row of its column, with a length of its own; ``flat``: values one after the other;
    ``unread``: names of columns and message fields of the row that nothing reads.
    """

    ragged: Mapping[str, list[Any]]
    flat: Mapping[str, Any]
    notes: Sequence[str] = ()
    """Notes on the row, which ``Notes`` counts."""
    unread: Sequence[str] = ()


class Schema(NamedTuple):
    """The columns of a kind of rows, and what they hold."""

    ragged: Mapping[str, type]
    flat: Mapping[str, type]

    def files(self) -> dict[str, np.dtype]:
        """The flat arrays of all columns by name: a ragged column has its values, their lengths and their ends."""
        found = {name: np.dtype(kind) for name, kind in (*self.ragged.items(), *self.flat.items())}
        for name in self.ragged:
            found |= {f"{name}.lengths": np.dtype(np.int32), f"{name}.ends": np.dtype(np.int64)}
        return found


class Table(NamedTuple):
    """The rows of one source in columns, what was left out of them, and what is noted of the others."""

    ragged: Mapping[str, Column]
    flat: Mapping[str, Flat]
    rows: int
    skipped: dict[str, int]
    notes: dict[str, int]
    digest: str = ""
    """Of the rows, as ``Writer.digest``."""

    @classmethod
    def of(cls, schema: Schema, arrays: Mapping[str, Flat], rows: int, skips: Skips) -> "Table":
        """Says what was left out and what is noted; an error where nothing remains."""
        skipped = skips.close(rows)
        ragged = {
            n: Column(arrays[n], arrays[f"{n}.lengths"].values, arrays[f"{n}.ends"].values) for n in schema.ragged
        }
        return cls(ragged, {name: arrays[name] for name in schema.flat}, rows, skipped, skips.notes.counts)


class Writer:
    """Gathers rows into blocks and hands them on: ``write(name, values)`` appends to the array of that name."""

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
        """Hand on what was gathered."""
        for name, parts in self._parts.items():
            if parts:
                values = np.concatenate([np.asarray(part, self._types[name]) for part in parts])
                self._digests[name].update(values.data)
                self._write(name, values)
                parts.clear()
        self._gathered = 0

    def digest(self) -> str:
        """The digest of all that was handed on, in whatever blocks: equal rows in equal order have equal ones."""
        columns = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(self._digests.items()))
        return xxhash.xxh3_128_hexdigest(columns.encode())


def in_memory(schema: Schema, fill: Callable[[Writer], Skips]) -> Table:
    """The rows that ``fill`` adds, in memory."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in schema.files()}
    writer = Writer(schema, lambda name, values: parts[name].append(values))
    skips = fill(writer)
    writer.flush()
    if writer.rows == 0:
        skips.close(0)
    flats = {name: Flat(np.concatenate(arrays)) for name, arrays in parts.items()}
    return Table.of(schema, flats, writer.rows, skips)._replace(digest=writer.digest())


def mapped(schema: Schema, folder: Path, rows: int, skips: Skips) -> Table:
    """The rows whose arrays are files in a folder."""
    arrays = {name: Flat.mapped(folder / name, dtype) for name, dtype in schema.files().items()}
    return Table.of(schema, arrays, rows, skips)


def joined(flats: Iterable[Flat]) -> np.ndarray:
    """The numbers of all sources, one source after the other; of one source they stay where they are."""
    arrays = [flat.values for flat in flats]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
