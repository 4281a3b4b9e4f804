"""Ratios of a minibatch's probabilities, and their figures: policy over old policy, old policy over sampler."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jrlhf.core import importance_ratio, masked_sum, truncated_weights
from jrlhf.steps.accumulate import Sums


def ratio_sums(
    log_ratio: Float[Array, "B T"],
    ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    tokens: Float[Array, ""],
    clip: float,
    clip_high: float,
) -> Sums:
    """Figures of π / π_old over all ``tokens`` of the minibatch, from each token's log π - log π_old, 0 where masked.

    ``ratio`` is what the loss clips: that of the token or of its whole answer.
    """
    outside = (1.0 - ratio > clip) | (ratio - 1.0 > clip_high)
    total = {
        "policy/approxkl": masked_sum(0.5 * jnp.square(log_ratio), mask) / tokens,
        "policy/clipfrac": masked_sum(outside.astype(jnp.float32), mask) / tokens,
        "policy/ratio_mean": masked_sum(ratio, mask) / tokens,
    }
    maximum = {
        "policy/ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "policy/max_abs_log_ratio": jnp.max(jnp.abs(log_ratio)),
    }
    return Sums(total, maximum)


def sampler_weights(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float,
    tokens: Float[Array, ""],
) -> tuple[Float[Array, "B T"], Sums]:
    """``truncated_weights`` of the unmasked tokens, and their figures over all ``tokens`` of the minibatch.

    ``sampler/weight_mean``, ``sampler/weight_capped`` (the share above the cap) and ``sampler/weight_max``, the largest
    before it is capped.
    """
    logprobs, sampler_logprobs = (jnp.where(mask, x, 0.0) for x in (logprobs, sampler_logprobs))
    ratio = importance_ratio(logprobs, sampler_logprobs)
    weights = truncated_weights(logprobs, sampler_logprobs, cap=cap)
    total = {
        "sampler/weight_mean": masked_sum(weights, mask) / tokens,
        "sampler/weight_capped": masked_sum((ratio > cap).astype(jnp.float32), mask) / tokens,
    }
    return weights, Sums(total, {"sampler/weight_max": jnp.max(jnp.where(mask, ratio, 0.0))})


def merged(*parts: Sums) -> Sums:
    """The figures of several parts as one record."""
    total, maximum = {}, {}
    for part in parts:
        total |= part.total
        maximum |= part.maximum
    return Sums(total, maximum)
