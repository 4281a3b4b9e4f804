"""Prompts of different lengths, padded on the left."""

import jax.numpy as jnp
import numpy as np

from tests.support.tiny_models import VOCABULARY

LENGTHS = (1, 4, 2, 3, 4, 1)


def prompts(width=4):
    """Left-padded prompts of different lengths."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY, n) for n in LENGTHS]
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        tokens[b, width - len(row) :], mask[b, width - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)
