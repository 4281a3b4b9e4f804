"""Which rows make which batch: a pure function of (seed, epoch, index). The data cursor is an integer.

It knows nothing of hosts: each asks for a step, all get the same rows, and each takes its own part of them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

WINDOW = 32
"""Batches within which rows are sorted by length: enough to save most padding, few enough to leave the order random."""

BLOCK = 4096
"""Rows that are put in order at a time where a source has fewer: a generator a pass would be slow for ten rows."""


class Part(NamedTuple):
    """Consecutive rows that come from one source, and its weight among the sources."""

    rows: int
    weight: float


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in a pass over ``rows``; the last one is filled up."""
    return -(-rows // batch_size)


class Order:
    """``order[step]`` are the rows of batch ``step`` of an endless run over the data.

    An epoch is as many draws as there are rows. Of a single source it is a fresh permutation: each row is seen once,
    and is twice in a batch only where there are fewer rows than places. Of several, see ``mixed_draws``. Draws of like
    length go together, and the batches then come in random order; that of the draws left over is filled up with others.

    Memory: 8 bytes a row, for the epoch in use.
    """

    def __init__(self, seed: int, *, batch_size: int, lengths: Int[np.ndarray, "N"], parts: Sequence[Part]) -> None:
        if sum(part.rows for part in parts) != len(lengths):
            raise ValueError(f"parts of {[part.rows for part in parts]} rows, but {len(lengths)} lengths")
        self.steps_per_epoch = steps_per_epoch(len(lengths), batch_size)
        self._batch_size = batch_size
        self._lengths = lengths

        def epoch_of(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([seed, epoch])
            draws = rng.permutation(len(lengths)) if len(parts) == 1 else mixed_draws(seed, epoch, parts)
            return draws, rng.permutation(self.steps_per_epoch)

        # A memory of the epoch in use, not state: any step can be asked for at any time.
        self._epoch = lru_cache(maxsize=1)(epoch_of)

    def __getitem__(self, step: int) -> Int[np.ndarray, "B"]:
        epoch, index = divmod(step, self.steps_per_epoch)
        draws, batches = self._epoch(epoch)
        return self._batch(draws, int(batches[index]))

    def _batch(self, draws: Int[np.ndarray, "N"], number: int) -> Int[np.ndarray, "B"]:
        """Batch ``number`` of an epoch before batches are shuffled: only its own window is sorted."""
        size = self._batch_size
        whole = len(draws) // size
        if number == whole:
            return np.resize(np.concatenate([draws[whole * size :], draws[: min(whole, 1) * size]]), size)
        first = number - number % WINDOW
        window = draws[first * size : min(first + WINDOW, whole) * size]
        window = window[np.argsort(self._lengths[window], kind="stable")]
        return window[(number - first) * size : (number - first + 1) * size]


def mixed_draws(seed: int, epoch: int, parts: Sequence[Part]) -> Int[np.ndarray, "N"]:
    """The rows of an epoch over several sources, in the order in which they are drawn.

    Each source is an endless stream of passes over it, each pass a fresh permutation, and the streams are drawn from in
    proportion to the weights, evenly: after any number of draws every source is within a row or two of its share. The
    next epoch goes on in each stream where this one ends, so that no row is left out for good, however low its source's
    weight. A row is twice in a batch only where two passes over a small source meet in one window.
    """
    firsts = np.cumsum([0, *(part.rows for part in parts)])
    streams, places = [], []
    for number, (part, count) in enumerate(zip(parts, shares(parts), strict=True)):
        streams.append(firsts[number] + _stream(seed, number, part.rows, start=epoch * count, count=count))
        places.append((np.arange(count, dtype=np.float64) + 0.5) / count)
    return np.concatenate(streams)[np.argsort(np.concatenate(places), kind="stable")]


def shares(parts: Sequence[Part]) -> list[int]:
    """How many of an epoch's draws are from each source: in proportion to the weights, whole, at least 1.

    ``[(100 rows, weight 3), (60 rows, weight 1)] -> [120, 40]``.
    """
    rows = sum(part.rows for part in parts)
    weights = np.asarray([part.weight for part in parts], np.float64)
    wanted = rows * (weights / weights.sum())
    counts = np.maximum(np.floor(wanted).astype(np.int64), 1)
    while (over := int(counts.sum()) - rows) != 0:
        gap = wanted - counts
        place = int(np.argmax(gap)) if over < 0 else int(np.argmin(np.where(counts > 1, gap, np.inf)))
        counts[place] -= np.sign(over)
    return counts.tolist()


def _stream(seed: int, number: int, rows: int, *, start: int, count: int) -> Int[np.ndarray, "M"]:
    """Draws ``start`` up to ``start + count`` of source ``number``; blocks of passes have a generator each."""
    block = rows * -(-BLOCK // rows)
    numbers = range(start // block, -(-(start + count) // block))
    # The third word keeps these apart from the generator of the epoch's batches.
    rngs = (np.random.default_rng([seed, n, number + 1]) for n in numbers)
    passes = [rng.permuted(np.tile(np.arange(rows), (block // rows, 1)), axis=1).ravel() for rng in rngs]
    skipped = start - numbers[0] * block
    return np.concatenate(passes)[skipped : skipped + count]
