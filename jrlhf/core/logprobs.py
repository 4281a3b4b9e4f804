"""Per-token log-probs, and the one shift of the library: position t - 1 predicts token t."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jrlhf.core.masks import real_tokens
from jrlhf.types import ApplyFn, LogprobFn, Params, TokenMask


def align_to_tokens(x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Move what position t - 1 predicts to index t, the token it is about; index 0 becomes 0.

    ``[x₀, x₁, x₂] -> [0, x₀, x₁]``.
    """
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def predictable(mask: TokenMask) -> Bool[Array, "B T"]:
    """Real tokens that have a real token of their own sequence before them: those whose log-prob means something.

    ``[pad, a, b, pad] -> [False, False, True, False]``: nothing predicts ``a``.
    """
    return real_tokens(mask) & (mask == align_to_tokens(mask))


def next_token_logprobs(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], *, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log softmax(logits / temperature)[target] and the entropy of that softmax, in float32, not shifted."""
    scaled = logits.astype(jnp.float32) / temperature
    # With the largest logit at 0, both terms of H = log Z - Σ p·x are ≥ 0: large logits cannot cancel below 0.
    scaled = scaled - jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))
    log_z = jnp.log(jnp.sum(jnp.exp(scaled), axis=-1))
    chosen = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0]
    # A logit of -inf has p = 0, and 0 · -inf would be NaN: it is left out before the product.
    finite = jnp.where(jnp.isneginf(scaled), 0.0, scaled)
    entropy = log_z - jnp.sum(jnp.exp(scaled - log_z[..., None]) * finite, axis=-1)
    return chosen - log_z, entropy


def logprobs_and_entropy(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log π(token t | tokens before t) and the entropy of that distribution, both at index t; 0 at index 0."""
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    logprobs, entropy = next_token_logprobs(logits, targets, temperature=temperature)
    return align_to_tokens(logprobs), align_to_tokens(entropy)


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: float
) -> Float[Array, "B T"]:
    """log softmax(logits[:, t - 1] / temperature)[tokens[:, t]] at index t, in float32; 0 at index 0."""
    return logprobs_and_entropy(logits, tokens, temperature=temperature)[0]


def from_logits(apply_fn: ApplyFn) -> LogprobFn:
    """The ``LogprobFn`` of any model that returns logits. It holds ``[B, T, V]`` in memory.

    Logits at padding are never read: attention over nothing may leave NaN there, whose gradient would be NaN too.
    """

    def logprob_fn(
        params: Params,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        del where  # The logits are there already.
        logits = jnp.where(real_tokens(mask)[:, :, None], apply_fn(params, tokens, mask), 0.0)
        return logprobs_and_entropy(logits, tokens, temperature=temperature)

    return logprob_fn
