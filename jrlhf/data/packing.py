"""Packing of several sequences into one row, and batches of packed rows."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from jrlhf.data.order import Part
from jrlhf.data.ragged import Ragged
from jrlhf.data.rows import RankingRows, SFTRows
from jrlhf.types import PackedRankingBatch, SFTBatch


def pack(lengths: Int[np.ndarray, "N"], capacity: int) -> list[list[int]]:
    """Pack sequences into rows of at most ``capacity`` tokens by best fit, longest first (Johnson et al. 1974).

    Returns the indices of the sequences in each row. Raises ValueError if a sequence is longer than ``capacity``.
    """
    if len(lengths) and int(np.max(lengths)) > capacity:
        raise ValueError(f"a sequence of {int(np.max(lengths))} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    # Rows with room left, keyed by their room, and the sorted list of these keys.
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return rows


def pack_parts(lengths: Int[np.ndarray, "N"], parts: Sequence[Part], capacity: int) -> tuple[Ragged, list[Part]]:
    """Pack within each source; return the members of every packed row and the sources counted in packed rows."""
    members: list[np.ndarray] = []
    packed: list[Part] = []
    first = 0
    for part in parts:
        rows = pack(lengths[first : first + part.rows], capacity)
        members += [np.asarray(row, np.int64) + first for row in rows]
        packed.append(Part(len(rows), part.weight))
        first += part.rows
    return Ragged.from_rows(members), packed


def _concatenate(
    contents: Iterable[Sequence[np.ndarray]], count: int, width: int, pad: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], list[list[int]]]:
    """Return ``(tokens, segments, ends)`` for ``count`` rows, each of which holds its sequences one after the other.

    Segments number the sequences of a row from 1 (0: padding); ends are the positions of their last tokens.
    """
    tokens, segments = np.full((count, width), pad, np.int32), np.zeros((count, width), np.int32)
    ends: list[list[int]] = []
    for row, sequences in enumerate(contents):
        start = 0
        ends.append([])
        for number, sequence in enumerate(sequences, start=1):
            here = slice(start, start + len(sequence))
            tokens[row, here], segments[row, here] = sequence, number
            start += len(sequence)
            ends[row].append(start - 1)
    return tokens, segments, ends


@dataclass(frozen=True)
class _Packed:
    """Packed rows of ``width`` tokens. Which rows share a packed row is fixed; the order of packed rows is not."""

    width: int
    members: Ragged
    parts: Sequence[Part]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Lengths for ``Order``: all equal to ``width``, since packed rows need no sorting by length."""
        return np.full(len(self), self.width, np.int32)

    def members_of(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Return the members of these packed rows."""
        return [[int(row) for row in self.members[int(index)]] for index in indices]


@dataclass(frozen=True)
class PackedSFTRows(_Packed):
    """``SFTRows`` packed several to a row."""

    rows: SFTRows

    def batch(self, indices: Sequence[int] | np.ndarray) -> SFTBatch:
        """Return the batch of these packed rows."""
        members = self.members_of(indices)
        contents = ([self.rows.tokens[row] for row in rows] for rows in members)
        tokens, segments, _ = _concatenate(contents, len(members), self.width, self.rows.pad)
        learnt = ([self.rows.loss_mask[row] for row in rows] for rows in members)
        loss_mask, _, _ = _concatenate(learnt, len(members), self.width, 0)
        for column in (self.rows.tokens, self.rows.loss_mask):
            column.release()
        return SFTBatch(tokens, segments, loss_mask.astype(np.bool_))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class PackedRankingRows(_Packed):
    """``RankingRows`` packed several to a row; all completions of a ranking share a row."""

    rows: RankingRows

    def places(self, indices: Sequence[int] | np.ndarray) -> Int[np.ndarray, "B G K"]:
        """Return the index in ``rows.tokens`` of each completion in this batch; -1 where there is none."""
        places = np.full((len(indices), int(self.members.lengths.max()), self.rows.max_completions), -1, np.int64)
        for place, rows in enumerate(self.members_of(indices)):
            places[place, : len(rows)] = self.rows.places(rows)
        return places

    def batch_loss_mask(self, indices: Sequence[int] | np.ndarray) -> Bool[np.ndarray, "B T"]:
        """Return the mask of the completions' own tokens in the batch of these packed rows."""
        members = self.members_of(indices)
        contents = ([self.rows.loss_mask[c] for row in rows for c in self.rows.completions(row)] for rows in members)
        marks, _, _ = _concatenate(contents, len(members), self.width, 0)
        self.rows.loss_mask.release()
        return marks.astype(np.bool_)

    def batch(self, indices: Sequence[int] | np.ndarray) -> PackedRankingBatch:
        """Return the batch of these packed rows."""
        members = self.members_of(indices)
        contents = ([self.rows.tokens[c] for row in rows for c in self.rows.completions(row)] for rows in members)
        tokens, segments, flat_ends = _concatenate(contents, len(members), self.width, self.rows.pad)
        shape = len(members), int(self.members.lengths.max()), self.rows.max_completions
        ends, ranks, valid = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        margin = np.zeros(shape[:2], np.float32)
        for place, rows in enumerate(members):
            rest = iter(flat_ends[place])
            for number, row in enumerate(rows):
                ranks_of_row = self.rows.ranks[row]
                here = place, number, slice(0, len(ranks_of_row))
                ends[here] = [next(rest) for _ in ranks_of_row]
                ranks[here], valid[here] = ranks_of_row, True
                margin[place, number] = self.rows.margin[row]
        self.rows.tokens.release()
        return PackedRankingBatch(tokens, segments, ends, ranks, valid, margin)  # pyright: ignore[reportArgumentType]


def pack_sft(rows: SFTRows, width: int) -> PackedSFTRows:
    """Pack SFT rows to ``width`` tokens; raise ValueError if a row is longer."""
    members, parts = pack_parts(rows.lengths, rows.parts, width)
    return PackedSFTRows(width, members, parts, rows.skipped, rows)


def pack_rankings(rows: RankingRows, width: int) -> PackedRankingRows:
    """Pack rankings to ``width`` tokens; raise ValueError if the completions of one are longer together."""
    totals = [int(rows.tokens.lengths[list(rows.completions(row))].sum()) for row in range(len(rows))]
    members, parts = pack_parts(np.asarray(totals, np.int64), rows.parts, width)
    return PackedRankingRows(width, members, parts, rows.skipped, rows)
