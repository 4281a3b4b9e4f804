"""Supervised fine-tuning of a model made of plain functions: it learns to add two digits modulo 10.

A step needs one function, ``(params, tokens, mask) -> logits``; how the parameters are kept is up to you.
"""

import jax
import jax.numpy as jnp
import optax

from jrlhf.core import from_logits
from jrlhf.steps import make_sft_step
from jrlhf.types import SFTBatch, TrainState

VOCABULARY, WIDTH = 10, 64


def init(key):
    """Random parameters, in any pytree you like."""
    shapes = {"embed": (VOCABULARY, WIDTH), "hidden": (2 * WIDTH, 4 * WIDTH), "out": (4 * WIDTH, VOCABULARY)}
    keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
    return {name: jax.random.normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}


def apply(params, tokens, mask):
    """Logits of the next token at every position, from the token there and the sum of all up to it."""
    x = jnp.where(mask[:, :, None], params["embed"][tokens], 0.0)
    x = jnp.concatenate([x, jnp.cumsum(x, axis=1)], axis=-1)
    return jax.nn.gelu(x @ params["hidden"]) @ params["out"]


def additions():
    """All 100 rows ``[a, b, (a + b) % 10]``. Only the answer is trained on."""
    a, b = jnp.divmod(jnp.arange(100), 10)
    tokens = jnp.stack([a, b, (a + b) % 10], axis=1).astype(jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    return SFTBatch(tokens, mask, loss_mask=mask.at[:, :2].set(False))


def main():
    tx = optax.adamw(5e-3)
    step = jax.jit(make_sft_step(from_logits(apply), tx, accumulation=1))
    params = init(jax.random.key(0))
    state, batch = TrainState(params, tx.init(params), jnp.int32(0)), additions()

    def accuracy(params):
        """The share of right answers: position 1 predicts the token at index 2."""
        return jnp.mean(jnp.argmax(apply(params, batch.tokens, batch.mask)[:, 1], axis=-1) == batch.tokens[:, 2])

    before = accuracy(state.params)
    for i in range(50):
        state, metrics = step(state, batch, jax.random.key(i))
        if i % 10 == 0:
            print(f"step {i}: loss {metrics['loss']:.3f}")
    print(f"accuracy: {before:.2f} -> {accuracy(state.params):.2f}")


if __name__ == "__main__":
    main()
