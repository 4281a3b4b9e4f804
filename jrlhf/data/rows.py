"""Tokenised rows, and the padded NumPy batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jrlhf.data.tokenizer import Tokenizer
from jrlhf.types import RankingBatch, SFTBatch


class Ragged:
    """Rows of different lengths in one flat array: as much memory as the tokens themselves."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self._ends = np.cumsum(self.lengths)
        self._flat = np.concatenate(rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        end = self._ends[row]
        return self._flat[end - self.lengths[row] : end]

    def padded(
        self, rows: Sequence[int] | np.ndarray, width: int, *, fill: int, left: bool = False
    ) -> tuple[np.ndarray, Bool[np.ndarray, "B T"]]:
        """``(values, mask)``, both ``[B, width]``; the mask is True at the row's own values."""
        values = np.full((len(rows), width), fill, self._flat.dtype)
        mask = np.zeros((len(rows), width), np.bool_)
        for place, row in enumerate(rows):
            length = int(self.lengths[row])
            columns = slice(width - length, width) if left else slice(0, length)
            values[place, columns] = self[int(row)]
            mask[place, columns] = True
        return values, mask


def bucket_lengths(longest: int, buckets: int) -> tuple[int, ...]:
    """The padded lengths that are compiled for: evenly spaced up to ``longest``, each rounded up to a multiple of 8.

    ``(100, 4) -> (32, 56, 80, 104)``.
    """
    steps = (-(-longest * (i + 1) // buckets) for i in range(buckets))
    return tuple(sorted({-(-step // 8) * 8 for step in steps}))


@dataclass(frozen=True)
class SFTRows:
    """Sequences and the tokens of them that are learnt."""

    tokens: Ragged
    loss_mask: Ragged
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.tokens.lengths

    def batch(self, rows: Sequence[int] | np.ndarray) -> SFTBatch:
        """Right-padded to the smallest bucket that fits."""
        width = _bucket(self.buckets, self.lengths[rows])
        tokens, mask = self.tokens.padded(rows, width, fill=self.pad)
        loss_mask, _ = self.loss_mask.padded(rows, width, fill=0)
        return SFTBatch(tokens, mask, loss_mask.astype(np.bool_))  # pyright: ignore[reportArgumentType]

    def prompts(self, count: int, tokenizer: Tokenizer) -> "PromptRows":
        """What stands before the first learnt token of the first ``count`` rows; at least one token."""
        heads = []
        for row in range(count):
            first = int(np.argmax(self.loss_mask[row]))
            heads.append(self.tokens[row][: max(first, 1)])
        shown = [{"prompt": tokenizer.decode(head, skip_special_tokens=True)} for head in heads]
        tokens = Ragged(heads)
        return PromptRows(tokens, shown, bucket_lengths(int(tokens.lengths.max()), 1), self.pad, {})


@dataclass(frozen=True)
class RankingRows:
    """Rankings: row i has the completions ``first[i]`` up to ``first[i + 1]``."""

    tokens: Ragged
    first: Int[np.ndarray, "N1"]
    ranks: Int[np.ndarray, "C"]
    margin: np.ndarray
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """The longest completion of each row, its prompt included."""
        return np.maximum.reduceat(self.tokens.lengths, self.first[:-1])

    def batch(self, rows: Sequence[int] | np.ndarray) -> RankingBatch:
        """Right-padded to the smallest bucket that fits; every row to the data set's largest number of completions."""
        counts = np.diff(self.first)
        shape = len(rows), int(counts.max())
        width = _bucket(self.buckets, self.lengths[rows])
        tokens = np.full((*shape, width), self.pad, np.int32)
        mask = np.zeros((*shape, width), np.bool_)
        ranks, valid = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        for place, row in enumerate(rows):
            here, count = np.arange(self.first[row], self.first[row + 1]), counts[row]
            tokens[place, :count], mask[place, :count] = self.tokens.padded(here, width, fill=self.pad)
            ranks[place, :count], valid[place, :count] = self.ranks[here], True
        margin = self.margin[rows].astype(np.float32)
        return RankingBatch(tokens, mask, ranks, valid, margin)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class PromptRows:
    """Prompts to be answered; ``shown[i]`` is row i as it was given."""

    tokens: Ragged
    shown: list[dict[str, Any]]
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.tokens.lengths

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(tokens, mask)``, left-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad, left=True)


@dataclass(frozen=True)
class TextRows:
    """Answers to be scored, each with its prompt; ``shown[i]`` is text i as it was given."""

    tokens: Ragged
    shown: list[dict[str, Any]]
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.tokens.lengths

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(tokens, mask)``, right-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad)


def _bucket(buckets: tuple[int, ...], lengths: np.ndarray) -> int:
    longest = int(np.max(lengths))
    return next(bucket for bucket in buckets if bucket >= longest)
