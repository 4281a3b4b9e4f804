"""Rows of different lengths in flat arrays, in memory or in mapped files."""

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
    """A flat array in memory or in a mapped file, whose pages are in memory only while they are in use."""

    def __init__(self, values: np.ndarray, mapped: mmap.mmap | None = None) -> None:
        self.values = values
        self._mapped = mapped

    @classmethod
    def from_file(cls, path: Path, dtype: np.dtype) -> "Flat":
        """Map the array in a file."""
        if path.stat().st_size == 0:
            return cls(np.empty(0, dtype))
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are read in random order, so reading ahead does not help.
        pages.madvise(mmap.MADV_RANDOM)
        return cls(np.frombuffer(pages, dtype), pages)

    def release(self) -> None:
        """Release the pages that were read; they stay in the system's cache but not in this process's memory."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Column(NamedTuple):
    """Rows of one source: all values one after the other, and each row's length and end."""

    flat: Flat
    lengths: Int[np.ndarray, "N"]
    ends: Int[np.ndarray, "N"]


class Ragged:
    """Rows of different lengths, from one source or from several in sequence."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._flats = [column.flat for column in columns]
        self._firsts = list(accumulate((len(column.lengths) for column in columns), initial=0))
        self._ends = [column.ends for column in columns]
        # One source's lengths stay in their file; those of several are copied, as they are small beside the tokens.
        self.lengths = columns[0].lengths if len(columns) == 1 else np.concatenate([c.lengths for c in columns])

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        """Build from arrays in memory."""
        lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
        return cls([Column(Flat(np.concatenate(rows)), lengths, np.cumsum(lengths, dtype=np.int64))])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> np.dtype:
        """The type of the values."""
        return self._flats[0].values.dtype

    def __getitem__(self, row: int) -> np.ndarray:
        source = bisect_right(self._firsts, row) - 1
        end = int(self._ends[source][row - self._firsts[source]])
        return self._flats[source].values[end - int(self.lengths[row]) : end]

    def start(self, row: int) -> int:
        """Return the number of values before the row."""
        source = bisect_right(self._firsts, row) - 1
        before = sum(int(ends[-1]) for ends in self._ends[:source])
        return before + int(self._ends[source][row - self._firsts[source]]) - int(self.lengths[row])

    def padded(
        self, rows: Sequence[int] | np.ndarray, width: int, *, fill: int, left: bool = False
    ) -> tuple[np.ndarray, Bool[np.ndarray, "B T"]]:
        """Return ``(values, mask)``, both ``[B, width]``; the mask is True at the row's own values.

        The padding is ``fill``, to the right of the values or, with ``left``, to their left.
        """
        values = np.full((len(rows), width), fill, self.dtype)
        mask = np.zeros((len(rows), width), np.bool_)
        for place, row in enumerate(rows):
            length = int(self.lengths[row])
            columns = slice(width - length, width) if left else slice(0, length)
            values[place, columns] = self[int(row)]
            mask[place, columns] = True
        self.release()
        return values, mask

    def release(self) -> None:
        """Release the pages that were read; arrays from ``[row]`` stay valid and are read again on use."""
        for flat in self._flats:
            flat.release()


class Objects(Sequence[dict[str, Any]]):
    """A sequence of objects that are stored as JSON texts and decoded on access."""

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
            raise IndexError(f"index {index} is out of range for {len(self)} rows")
        text = self._texts[index % len(self)].tobytes()
        self._texts.release()
        return json.loads(text)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
