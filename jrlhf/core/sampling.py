"""One token from logits, and its log-prob under the very distribution it was drawn from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jrlhf.types import Key


def truncate_logits(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside the ``top_k`` likeliest tokens, then outside the smallest set whose mass reaches ``top_p``.

    ``top_k=0`` and ``top_p=1.0`` are off. The mass is that of the distribution renormalised after top-k; ties go to the
    lower token id, so exactly k tokens stay. Probabilities ``[.5, .3, .2]`` with ``top_p=0.6`` keep the first two.
    """
    if top_k <= 0 and top_p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        ranked = jnp.where(jnp.arange(vocabulary)[None] < top_k, ranked, -jnp.inf)
    if top_p < 1.0:
        probs = jax.nn.softmax(ranked, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        # The likeliest token stays whatever p is: rounding must not leave an empty set.
        keep = (mass_before < top_p).at[:, 0].set(True)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(
    logits: Float[Array, "B V"], key: Key, *, temperature: float, top_k: int, top_p: float
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw a token a row from softmax(logits / temperature), truncated and renormalised; return it with its log-prob.

    ``temperature=0`` is greedy: the likeliest token, with log-prob 0 as the distribution is a point mass.
    top-p: Holtzman et al. 2020, section 3.1.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)
    kept = truncate_logits(logits / temperature, top_k=top_k, top_p=top_p)
    # `jax.random.categorical`, except that the noise is made before it is used: merged with the search for the largest,
    # as XLA on a CPU would have it, it takes several times as long.
    noise = jax.lax.optimization_barrier(jax.random.gumbel(key, kept.shape, jnp.float32))
    tokens = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(kept, axis=-1)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
