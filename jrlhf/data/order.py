"""The order of rows in batches, a pure function of (seed, epoch, index); the data cursor is an integer.

The order does not depend on hosts: every host computes the same rows of a step and takes its own part of them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

WINDOW = 32
"""Number of batches whose rows are sorted by length: enough to save most padding, few enough to keep a random order."""

BLOCK = 4096
"""Minimum number of draws per random generator; one generator per pass would be slow for a source of ten rows."""


class Part(NamedTuple):
    """Number of consecutive rows from one source, and the source's weight."""

    rows: int
    weight: float


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of batches in a pass over ``rows``; the last batch is filled up."""
    return -(-rows // batch_size)


class Order:
    """Endless sequence of batches; ``order[step]`` holds the row indices of batch ``step``.

    An epoch has as many draws as there are rows. With a single source it is a fresh permutation, so each row is drawn
    once, and a batch repeats a row only if it has more places than there are rows. ``mixed_draws`` describes several
    sources. Draws of similar length share a batch, and the batches come in random order. The last draws of an epoch are
    filled up to a batch with other draws.

    It keeps 8 bytes per row in memory, for the epoch in use.
    """

    def __init__(self, seed: int, *, batch_size: int, lengths: Int[np.ndarray, "N"], parts: Sequence[Part]) -> None:
        if sum(part.rows for part in parts) != len(lengths):
            raise ValueError(f"the parts have {[part.rows for part in parts]} rows, but lengths has {len(lengths)}")
        self.steps_per_epoch = steps_per_epoch(len(lengths), batch_size)
        self._batch_size = batch_size
        self._lengths = lengths

        def epoch_of(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([seed, epoch])
            draws = rng.permutation(len(lengths)) if len(parts) == 1 else mixed_draws(seed, epoch, parts)
            return draws, rng.permutation(self.steps_per_epoch)

        # This is a cache of the epoch in use, not state: steps can be requested in any order.
        self._epoch = lru_cache(maxsize=1)(epoch_of)

    def __getitem__(self, step: int) -> Int[np.ndarray, "B"]:
        epoch, index = divmod(step, self.steps_per_epoch)
        draws, batches = self._epoch(epoch)
        return self._batch(draws, int(batches[index]))

    def drawn(self, steps: int) -> Int[np.ndarray, "M"]:
        """Return the rows of the first ``steps`` batches, each once, in ascending order."""
        found = np.zeros(len(self._lengths), np.bool_)
        for step in range(steps):
            if step % self.steps_per_epoch == 0 and found.all():
                break
            found[self[step]] = True
        return np.flatnonzero(found)

    def _batch(self, draws: Int[np.ndarray, "N"], number: int) -> Int[np.ndarray, "B"]:
        """Return batch ``number`` of an epoch before batches are shuffled, sorting only its own window."""
        size = self._batch_size
        full_batches = len(draws) // size
        if number == full_batches:
            return np.resize(np.concatenate([draws[full_batches * size :], draws[: min(full_batches, 1) * size]]), size)
        first = number - number % WINDOW
        window = draws[first * size : min(first + WINDOW, full_batches) * size]
        window = window[np.argsort(self._lengths[window], kind="stable")]
        return window[(number - first) * size : (number - first + 1) * size]


def mixed_draws(seed: int, epoch: int, parts: Sequence[Part]) -> Int[np.ndarray, "N"]:
    """Return the rows of an epoch over several sources in the order of drawing.

    Each source is an endless stream of passes, and each pass is a fresh permutation. Draws are spread evenly over the
    streams in proportion to the weights: after any number of draws every source is within a row or two of its share.
    The next epoch continues each stream where this one ends, so every row is drawn at some time, however low its
    source's weight. A batch repeats a row only where two passes over a small source meet in one window.
    """
    firsts = np.cumsum([0, *(part.rows for part in parts)])
    streams, places = [], []
    for number, (part, count) in enumerate(zip(parts, shares(parts), strict=True)):
        streams.append(firsts[number] + _stream(seed, number, part.rows, start=epoch * count, count=count))
        places.append((np.arange(count, dtype=np.float64) + 0.5) / count)
    return np.concatenate(streams)[np.argsort(np.concatenate(places), kind="stable")]


def shares(parts: Sequence[Part]) -> list[int]:
    """Return the number of an epoch's draws from each source, in proportion to the weights and at least 1.

    ``[(100 rows, weight 3), (60 rows, weight 1)] -> [120, 40]``.
    """
    rows = sum(part.rows for part in parts)
    weights = np.asarray([part.weight for part in parts], np.float64)
    exact = rows * (weights / weights.sum())
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (over := int(counts.sum()) - rows) != 0:
        gap = exact - counts
        place = int(np.argmax(gap)) if over < 0 else int(np.argmin(np.where(counts > 1, gap, np.inf)))
        counts[place] -= np.sign(over)
    return counts.tolist()


def _stream(seed: int, number: int, rows: int, *, start: int, count: int) -> Int[np.ndarray, "M"]:
    """Return draws ``start`` to ``start + count`` of source ``number``; each block of passes has its own generator."""
    block = rows * -(-BLOCK // rows)
    numbers = range(start // block, -(-(start + count) // block))
    # The third word separates these generators from the one of the epoch's batches.
    rngs = (np.random.default_rng([seed, n, number + 1]) for n in numbers)
    passes = [rng.permuted(np.tile(np.arange(rows), (block // rows, 1)), axis=1).ravel() for rng in rngs]
    skipped = start - numbers[0] * block
    return np.concatenate(passes)[skipped : skipped + count]
