"""The loss of fine-tuning, written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np


def reference_loss(apply_fn, params, batch):
    """Written from the definition: the mean over trained tokens of -log p(token | tokens before it)."""
    mask = np.asarray(batch.mask)
    wanted = zip(*np.nonzero(np.asarray(batch.loss_mask)), strict=True)
    counted = [(b, t) for b, t in wanted if t > 0 and mask[b, t] and mask[b, t - 1]]
    row, at = np.array(counted).T
    logp = jax.nn.log_softmax(apply_fn(params, batch.tokens, batch.mask), axis=-1)
    return -jnp.sum(logp[row, at - 1, batch.tokens[row, at]]) / len(counted)
