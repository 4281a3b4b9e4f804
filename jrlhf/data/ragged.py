"""Rows of different lengths in flat arrays, in memory or mapped from files; texts among them."""

import json
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Int


class Flat:
    """A flat array: in memory, or a file that is mapped, of which only what was just read is in memory."""

    def __init__(self, values: np.ndarray, mapped: mmap.mmap | None = None) -> None:
        self.values = values
        self._mapped = mapped

    @classmethod
    def mapped(cls, path: Path, dtype: np.dtype) -> "Flat":
        """The numbers in a file."""
        if path.stat().st_size == 0:
            return cls(np.empty(0, dtype))
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are read here and there: what stands around one is no use.
        pages.madvise(mmap.MADV_RANDOM)
        return cls(np.frombuffer(pages, dtype), pages)

    def release(self) -> None:
        """Let go of the pages that were read: they stay in the system's cache, but in no process's memory."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Column(NamedTuple):
    """Rows of one source: their values one after the other, and where each ends."""

    flat: Flat
    lengths: Int[np.ndarray, "N"]
    ends: Int[np.ndarray, "N"]


class Ragged:
    """Rows of different lengths, of one source or of several one after the other."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._flats = [column.flat for column in columns]
        self._firsts = list(accumulate((len(column.lengths) for column in columns), initial=0))
        self._ends = [column.ends for column in columns]
        # Of one source the lengths stay in their file; the numbers of several are few beside their tokens.
        self.lengths = columns[0].lengths if len(columns) == 1 else np.concatenate([c.lengths for c in columns])

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        """Rows that are in memory."""
        lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
        return cls([Column(Flat(np.concatenate(rows)), lengths, np.cumsum(lengths, dtype=np.int64))])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        source = bisect_right(self._firsts, row) - 1
        end = int(self._ends[source][row - self._firsts[source]])
        return self._flats[source].values[end - int(self.lengths[row]) : end]

    def start(self, row: int) -> int:
        """How many values there are before the row's."""
        source = bisect_right(self._firsts, row) - 1
        before = sum(int(ends[-1]) for ends in self._ends[:source])
        return before + int(self._ends[source][row - self._firsts[source]]) - int(self.lengths[row])

    def padded(
        self, rows: Sequence[int] | np.ndarray, width: int, *, fill: int, left: bool = False
    ) -> tuple[np.ndarray, Bool[np.ndarray, "B T"]]:
        """``(values, mask)``, both ``[B, width]``; the mask is True at the row's own values."""
        values = np.full((len(rows), width), fill, self._flats[0].values.dtype)
        mask = np.zeros((len(rows), width), np.bool_)
        for place, row in enumerate(rows):
            length = int(self.lengths[row])
            columns = slice(width - length, width) if left else slice(0, length)
            values[place, columns] = self[int(row)]
            mask[place, columns] = True
        self.release()
        return values, mask

    def release(self) -> None:
        """Let go of what was read; what ``[row]`` gave stays good, and is read again when it is looked at."""
        for flat in self._flats:
            flat.release()


class Objects(Sequence[dict[str, Any]]):
    """Objects that are kept as JSON texts and read when they are asked for."""

    def __init__(self, texts: Ragged) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        text = self._texts[index % len(self)].tobytes()
        self._texts.release()
        return json.loads(text)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
