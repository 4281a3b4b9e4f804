"""Tokenised rows and their padded NumPy batches.

Every kind of rows has these fields: ``buckets``, the padded lengths of batches; ``pad``, the padding token;
``skipped``, the number of skipped rows by reason; ``cut``, the number of rows that lost tokens to ``max_length``;
``parts``, the row counts and weights of the sources in order, for ``Order``; ``sources``, the sources' identities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jrlhf.data.order import Part
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.ragged import Ragged
from jrlhf.data.stamps import SourceRows
from jrlhf.types import RankingBatch, SFTBatch


def bucket_lengths(longest: int, buckets: int) -> tuple[int, ...]:
    """Return the padded lengths to compile for, evenly spaced up to ``longest`` and rounded up to multiples of 8.

    ``(100, 4) -> (32, 56, 80, 104)``.
    """
    steps = (-(-longest * (i + 1) // buckets) for i in range(buckets))
    return tuple(sorted({-(-step // 8) * 8 for step in steps}))


@dataclass(frozen=True)
class SFTRows:
    """Sequences with masks of their learnt tokens."""

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
        """Return the batch of these rows, right-padded to the smallest bucket that fits."""
        width = _bucket(self.buckets, self.lengths[rows])
        tokens, mask = self.tokens.padded(rows, width, fill=self.pad)
        loss_mask, _ = self.loss_mask.padded(rows, width, fill=0)
        return SFTBatch(tokens, mask, loss_mask.astype(np.bool_))  # pyright: ignore[reportArgumentType]

    def prompts(self, count: int, tokenizer: Tokenizer) -> "PromptRows":
        """Return prompts made of the first ``count`` rows: the tokens before the first learnt one, at least one."""
        return _prompts(self.tokens, self.loss_mask, range(count), tokenizer, self.pad)


@dataclass(frozen=True)
class RankingRows:
    """Rankings, whose completions follow each other in ``tokens``, as many per row as it has ranks."""

    tokens: Ragged
    loss_mask: Ragged
    """For each of ``tokens``, whether it belongs to the completion; False in the prompt and in results of tools."""
    ranks: Ragged
    margin: Float[np.ndarray, "N"]
    lengths: Int[np.ndarray, "N"]
    """Length of each row's longest completion with its prompt, in tokens."""
    buckets: tuple[int, ...]
    pad: int
    skipped: dict[str, int]
    parts: Sequence[Part]
    cut: int = 0
    sources: Sequence[SourceRows] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def max_completions(self) -> int:
        """The largest number of completions of a row."""
        return int(self.ranks.lengths.max())

    def completions(self, row: int) -> range:
        """Return the indices of the row's completions in ``tokens``."""
        first = self.ranks.start(row)
        return range(first, first + int(self.ranks.lengths[row]))

    def prompts(self, count: int, tokenizer: Tokenizer) -> "PromptRows":
        """Return the prompts of the first ``count`` rows, as their first completions have them, at least one token."""
        return _prompts(
            self.tokens, self.loss_mask, [self.completions(row)[0] for row in range(count)], tokenizer, self.pad
        )

    def places(self, rows: Sequence[int] | np.ndarray) -> Int[np.ndarray, "B K"]:
        """Return the index in ``tokens`` of each completion in the batch of these rows; -1 where there is none."""
        places = np.full((len(rows), self.max_completions), -1, np.int64)
        for place, row in enumerate(rows):
            here = self.completions(int(row))
            places[place, : len(here)] = here
        return places

    def batch_loss_mask(self, rows: Sequence[int] | np.ndarray) -> Bool[np.ndarray, "B K T"]:
        """Return the mask of the completions' own tokens in the batch of these rows."""
        width = _bucket(self.buckets, self.lengths[rows])
        marks = np.zeros((len(rows), self.max_completions, width), np.bool_)
        for place, row in enumerate(rows):
            here = self.completions(int(row))
            marks[place, : len(here)], _ = self.loss_mask.padded(here, width, fill=0)
        return marks

    def batch(self, rows: Sequence[int] | np.ndarray) -> RankingBatch:
        """Return the batch of these rows, right-padded to the smallest bucket that fits.

        Every row is padded to ``max_completions`` completions.
        """
        shape = len(rows), self.max_completions
        width = _bucket(self.buckets, self.lengths[rows])
        tokens = np.full((*shape, width), self.pad, np.int32)
        mask = np.zeros((*shape, width), np.bool_)
        for place, row in enumerate(rows):
            here = self.completions(int(row))
            tokens[place, : len(here)], mask[place, : len(here)] = self.tokens.padded(here, width, fill=self.pad)
        ranks, valid = self.ranks.padded(rows, self.max_completions, fill=0)
        margin = self.margin[rows].astype(np.float32)
        return RankingBatch(tokens, mask, ranks, valid, margin)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _RecordRows:
    """Sequences with ``shown[i]``, the columns of row i as the source has them."""

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


class PromptRows(_RecordRows):
    """Prompts for a policy to answer."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(tokens, mask)``, left-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad, left=True)


def _prompts(tokens: Ragged, loss_mask: Ragged, rows: Sequence[int], tokenizer: Tokenizer, pad: int) -> PromptRows:
    heads = [tokens[row][: max(int(np.argmax(loss_mask[row])), 1)] for row in rows]
    shown = [{"prompt": tokenizer.decode(head, skip_special_tokens=True)} for head in heads]
    prompts = Ragged.from_rows(heads)
    return PromptRows(prompts, shown, bucket_lengths(int(prompts.lengths.max()), 1), pad, {}, [Part(len(heads), 1.0)])


class TextRows(_RecordRows):
    """Answers with their prompts, for a reward model to score."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(tokens, mask)``, right-padded to the smallest bucket that fits."""
        return self.tokens.padded(rows, _bucket(self.buckets, self.lengths[rows]), fill=self.pad)


def _bucket(buckets: tuple[int, ...], lengths: np.ndarray) -> int:
    longest = int(np.max(lengths))
    return next(bucket for bucket in buckets if bucket >= longest)
