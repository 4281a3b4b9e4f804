"""Tokenised rows, and the padded NumPy batches made of them.

Every kind of rows has ``buckets``, the padded lengths of its batches; ``pad``, the token that fills them up;
``skipped``, rows left out by reason; ``cut``, how many rows of the sources lost tokens to ``max_length``;
``parts``, the sources it holds one after the other, for ``Order``; and ``sources``, what each of them is known by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jrlhf.data.order import Part
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.ragged import Ragged
from jrlhf.data.stamps import SourceRows
from jrlhf.types import RankingBatch, SFTBatch


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
    parts: Sequence[Part]
    cut: int = 0
    sources: Sequence[SourceRows] = ()

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
        tokens = Ragged.of(heads)
        buckets = bucket_lengths(int(tokens.lengths.max()), 1)
        return PromptRows(tokens, shown, buckets, self.pad, {}, [Part(count, 1.0)])


@dataclass(frozen=True)
class RankingRows:
    """Rankings: as many completions a row as it has ranks, one row's after the other's."""

    tokens: Ragged
    ranks: Ragged
    margin: Float[np.ndarray, "N"]
    lengths: Int[np.ndarray, "N"]
    """The longest completion of each row, its prompt included."""
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]
    parts: Sequence[Part]
    cut: int = 0
    sources: Sequence[SourceRows] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def most(self) -> int:
        """The largest number of completions of a row."""
        return int(self.ranks.lengths.max())

    def completions(self, row: int) -> range:
        """Where the row's completions stand in ``tokens``."""
        first = self.ranks.start(row)
        return range(first, first + int(self.ranks.lengths[row]))

    def batch(self, rows: Sequence[int] | np.ndarray) -> RankingBatch:
        """Right-padded to the smallest bucket that fits; every row to the data set's largest number of completions."""
        shape = len(rows), self.most
        width = _bucket(self.buckets, self.lengths[rows])
        tokens = np.full((*shape, width), self.pad, np.int32)
        mask = np.zeros((*shape, width), np.bool_)
        for place, row in enumerate(rows):
            here = self.completions(int(row))
            tokens[place, : len(here)], mask[place, : len(here)] = self.tokens.padded(here, width, fill=self.pad)
        ranks, valid = self.ranks.padded(rows, self.most, fill=0)
        margin = self.margin[rows].astype(np.float32)
        return RankingBatch(tokens, mask, ranks, valid, margin)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Shown:
    """Sequences, and ``shown[i]``, row i as it was given."""

    tokens: Ragged
    shown: Sequence[dict[str, Any]]
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]
    parts: Sequence[Part]
    cut: int = 0
    sources: Sequence[SourceRows] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.tokens.lengths


class PromptRows(_Shown):
    """Prompts to be answered."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(tokens, mask)``, left-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad, left=True)


class TextRows(_Shown):
    """Answers to be scored, each with its prompt."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(tokens, mask)``, right-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad)


def _bucket(buckets: tuple[int, ...], lengths: np.ndarray) -> int:
    longest = int(np.max(lengths))
    return next(bucket for bucket in buckets if bucket >= longest)
