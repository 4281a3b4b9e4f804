"""Attention as a loop over rows, heads and queries, and the sizes that tests of it share."""

import numpy as np

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 3, 6, 4, 2, 8
RIGHT = np.arange(LENGTH)[None] < np.array([[6], [3], [1]])


def by_hand(q, k, v, mask):
    """A loop over rows, heads and queries; nothing where a query sees nothing."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(ROWS, LENGTH, HEADS):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = k[b, seen, n // (HEADS // KV_HEADS)] @ q[b, t, n]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // (HEADS // KV_HEADS)]
    return out
