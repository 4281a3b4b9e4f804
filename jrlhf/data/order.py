"""Which rows make which batch: a pure function of (seed, epoch, index). The data cursor is an integer."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int

WINDOW = 32
"""Batches within which rows are sorted by length: enough to save most padding, few enough to leave the order random."""


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in a pass over ``rows``; the last one is filled up."""
    return -(-rows // batch_size)


class Order:
    """``order[step]`` are the rows of batch ``step`` of an endless run over the data.

    Every epoch is a fresh permutation; rows of like length go together, and the batches then come in random order. Each
    row is seen once an epoch; the batch of those left over is filled up with others, and a row is twice in a batch only
    where there are fewer rows than places.
    """

    def __init__(self, seed: int, *, batch_size: int, lengths: Int[np.ndarray, "N"]) -> None:
        self.steps_per_epoch = steps_per_epoch(len(lengths), batch_size)
        # A memory of the epoch in use, not state: any step can be asked for at any time.
        self._epoch = lru_cache(maxsize=1)(
            lambda epoch: epoch_batches(seed, epoch, batch_size=batch_size, lengths=lengths)
        )

    def __getitem__(self, step: int) -> Int[np.ndarray, "B"]:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]


def epoch_batches(
    seed: int, epoch: int, *, batch_size: int, lengths: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "steps B"]:
    """All batches of one epoch."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    whole = len(order) - len(order) % batch_size
    body, rest = order[:whole], order[whole:]
    span = WINDOW * batch_size
    windows = [body[start : start + span] for start in range(0, whole, span)]
    batches = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
    if len(rest):
        batches.append(np.resize(np.concatenate([rest, body]), batch_size))
    steps = steps_per_epoch(len(lengths), batch_size)
    return np.concatenate(batches).reshape(steps, batch_size)[rng.permutation(steps)]
