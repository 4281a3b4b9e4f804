"""Losses per token, per pair and per ranking. None of them reduces over the batch: a step does, once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ranking_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], margin: float | Float[Array, "B"] = 0.0
) -> Float[Array, "B"]:
    """-log σ(r_chosen - r_rejected - margin), in float32.

    Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2.
    """
    return -jax.nn.log_sigmoid(chosen.astype(jnp.float32) - rejected.astype(jnp.float32) - margin)


def ordered_pairs(ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """True at [b, i, j] where completion i is ranked strictly better than j (rank 0 is best) and both are unmasked.

    Ranks ``[0, 1, 1]`` give the pairs (0, 1) and (0, 2); the tie gives none.
    """
    better = ranks[:, :, None] < ranks[:, None, :]
    return better & mask[:, :, None] & mask[:, None, :]


def mean_over_pairs(x: Float[Array, "B K K"], pairs: Bool[Array, "B K K"]) -> Float[Array, "B"]:
    """Mean of x over the pairs of each row; 0 for a row that has none."""
    count = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    return jnp.sum(jnp.where(pairs, x, 0.0), axis=(1, 2)) / jnp.maximum(count, 1.0)


def kwise_ranking_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"],
    margin: float | Float[Array, "B"] = 0.0,
) -> Float[Array, "B"]:
    """Mean of -log σ(sᵢ - sⱼ - margin) over all pairs of a row in which i is strictly better; 0 where there are none.

    All pairs of a prompt are one batch element, so each completion is read once. Ouyang et al. 2022, eq. 1.
    """
    pairs = ordered_pairs(ranks, mask)
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), scores.shape[:1])
    difference = scores[:, :, None] - scores[:, None, :] - margin[:, None, None]
    return mean_over_pairs(-jax.nn.log_sigmoid(difference), pairs)


def kwise_centering_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """Mean of (sᵢ + sⱼ)² over the same pairs: keeps scores near 0, which the ranking alone leaves free.

    Eisenstein et al. 2023, section 3.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    total = scores[:, :, None] + scores[:, None, :]
    return mean_over_pairs(jnp.square(total), ordered_pairs(ranks, mask))


def importance_ratio(logprobs: Float[Array, "*S"], old_logprobs: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """ρ = exp(log π - log π_old), the exponent clipped to ±20 so that no ratio overflows."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -20.0, 20.0))


def ppo_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip: float,
    dual_clip: float | None,
    clip_high: float | None = None,
) -> Float[Array, "B T"]:
    """max(-A·ρ, -A·clip(ρ, 1 - ε, 1 + ε₂)), and min(·, -A·c) for A < 0 where the dual clip c > 1 is on.

    Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020, eq. 5. ``clip_high``: ε₂, if it is not ε (DAPO: Yu et al.
    2025, arXiv 2503.14476, section 3.1).
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    high = clip if clip_high is None else clip_high
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + high))
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0.0, jnp.minimum(loss, -advantages * dual_clip), loss)


def cispo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip: float,
    clip_high: float,
) -> Float[Array, "B T"]:
    """-w·A·log π with the constant weight w = clip(ρ, 1 - ε, 1 + ε₂): what is clipped keeps its gradient.

    CISPO: MiniMax 2025, arXiv 2506.13585, section 3.1. With ε = 1 the weight has no lower bound.
    """
    weight = jnp.clip(importance_ratio(logprobs, old_logprobs), 1.0 - clip, 1.0 + clip_high)
    return -jax.lax.stop_gradient(weight) * advantages * logprobs


def truncated_weights(
    logprobs: Float[Array, "*S"], sampler_logprobs: Float[Array, "*S"], *, cap: float
) -> Float[Array, "*S"]:
    """min(exp(log π - log π_sampler), cap), a constant: the weight of a token that another program sampled.

    Truncated importance sampling: Ionides 2008; between sampler and trainer: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    return jax.lax.stop_gradient(jnp.minimum(importance_ratio(logprobs, sampler_logprobs), cap))


def ppo_value_loss(
    values: Float[Array, "B T"], old_values: Float[Array, "B T"], returns: Float[Array, "B T"], *, clip: float
) -> Float[Array, "B T"]:
    """½ · max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²). Schulman et al. 2016 and openai/baselines ppo2."""
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
