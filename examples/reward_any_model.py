"""A reward model of Flax NNX, trained on rankings: it learns to prefer the completion with more of token 7.

A step needs one function, ``(params, tokens, mask) -> one score a position``; the score at a row's last token counts.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jrlhf.steps import make_reward_step
from jrlhf.types import RankingBatch, TrainState

VOCABULARY, WIDTH, COMPLETIONS, LENGTH = 16, 32, 4, 12


class Scorer(nnx.Module):
    """A recurrent network with a scalar head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.cell = nnx.GRUCell(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, tokens, mask):
        lengths = jnp.sum(mask, axis=1)
        states = nnx.RNN(self.cell)(self.embed(tokens), seq_lengths=lengths)
        return self.head(states)[..., 0]


def rankings(key, rows=32):
    """Random completions of one length, ranked by how often token 7 occurs in them: rank 0 is best, ties are equal."""
    shape = rows, COMPLETIONS, LENGTH
    tokens = jnp.where(jax.random.bernoulli(key, 0.2, shape), 7, jax.random.randint(key, shape, 0, VOCABULARY))
    counts = jnp.sum(tokens == 7, axis=-1)
    ranks = jnp.sum(counts[:, None, :] > counts[:, :, None], axis=-1)
    valid = jnp.ones((rows, COMPLETIONS), bool)
    return RankingBatch(tokens, jnp.ones(shape, bool), ranks, valid, margin=jnp.zeros(rows))


def main():
    # NNX as a pure function: its graph stays here, its parameters go through the step.
    graph, params = nnx.split(Scorer(nnx.Rngs(0)))
    tx = optax.adam(3e-3)
    step = jax.jit(
        make_reward_step(
            lambda params, tokens, mask: nnx.merge(graph, params)(tokens, mask), tx, center_coef=0.01, accumulation=1
        )
    )
    state, accuracies = TrainState(params, tx.init(params), jnp.int32(0)), []
    for i in range(150):
        state, metrics = step(state, rankings(jax.random.key(i)), jax.random.key(i))
        accuracies.append(float(metrics["accuracy"]))  # of a batch that was not seen before
        if i % 25 == 0:
            print(f"step {i}: loss {metrics['loss']:.3f}")
    print(f"accuracy: {accuracies[0]:.2f} -> {accuracies[-1]:.2f}")


if __name__ == "__main__":
    main()
