"""Per-token log-probs, and the one shift of the library: position t - 1 predicts token t."""

import jax.numpy as jnp
from jax import lax
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


def normaliser(logits: Float[Array, "*B V"], *, temperature: float) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Return the largest of logits / temperature and log Σ exp(logits / temperature - largest), in float32.

    With the largest logit at 0, both terms of the entropy log Z - Σ p·x are ≥ 0: large logits cannot cancel below 0.
    """
    scaled = logits.astype(jnp.float32) / temperature
    largest = lax.stop_gradient(jnp.max(scaled, axis=-1))
    return largest, jnp.log(jnp.sum(jnp.exp(scaled - largest[..., None]), axis=-1))


def next_token_logprobs(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], *, temperature: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """log softmax(logits / temperature)[target] and the entropy of that softmax, in float32, not shifted."""
    largest, log_z = normaliser(logits, temperature=temperature)
    scaled = logits.astype(jnp.float32) / temperature - largest[..., None]
    chosen = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0]
    # A logit of -inf has p = 0, and 0 · -inf would be NaN: it is left out before the product.
    finite = jnp.where(jnp.isneginf(scaled), 0.0, scaled)
    entropy = log_z - jnp.sum(jnp.exp(scaled - log_z[..., None]) * finite, axis=-1)
    return chosen - log_z, entropy


def next_token_gradient(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    largest: Float[Array, "*B"],
    log_z: Float[Array, "*B"],
    d_logprobs: Float[Array, "*B"],
    entropy: Float[Array, "*B"] | None,
    d_entropy: Float[Array, "*B"] | None,
    *,
    temperature: float,
) -> Float[Array, "*B V"]:
    """Return the gradient of the logits of ``next_token_logprobs``; ``normaliser`` gives ``largest`` and ``log_z``.

    With x = logits / temperature, p = softmax(x) and the entropy H it is (∂logprob · (1[target] - p) - ∂H · p ·
    (log p + H)) / temperature: one pass over the logits, where derivation by rules would scatter and sum again. Without
    ``d_entropy`` the entropy is not read.
    """
    logp = logits.astype(jnp.float32) / temperature - largest[..., None] - log_z[..., None]
    p = jnp.exp(logp)
    chosen = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    gradient = d_logprobs[..., None] * (chosen.astype(jnp.float32) - p)
    if entropy is not None and d_entropy is not None:
        # A logit of -inf has p = 0 and no part in the entropy.
        surprise = jnp.where(jnp.isneginf(logp), 0.0, logp) + entropy[..., None]
        gradient = gradient - d_entropy[..., None] * p * surprise
    return gradient / temperature


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
