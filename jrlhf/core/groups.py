"""Advantages of several answers to a prompt by each other's scores, without a value network."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

Baseline = Literal["mean", "leave_one_out", "none"]


def group_advantages(
    scores: Real[Array, "B"],
    groups: Int[Array, "B"],
    *,
    baseline: Baseline,
    scale: bool,
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Aᵢ = sᵢ - bᵢ over the answers of a group, with ``scale`` divided by the group's standard deviation + 1e-4.

    ``mean``: b is the group's mean (GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1; without ``scale`` Dr. GRPO:
    Liu et al. 2025, arXiv 2503.20783). ``leave_one_out``: the mean of the others (RLOO: Ahmadian et al. 2024, arXiv
    2402.14740). ``none``: 0. The standard deviation is the sample's, divided by n - 1, and it and 1e-4 are TRL's.

    ``groups`` has numbers from 0 to B - 1; answers of a group need not be neighbours. An answer whose score is not
    finite, or that ``valid`` leaves out, is in no baseline and gets 0. So does every answer of a group of equal scores,
    and one that is alone, except with ``none``. ValueError for ``scale`` without a baseline.

    Example: scores ``[1, 0, 5, 5]`` of groups ``[0, 0, 1, 1]`` give ``[0.5, -0.5, 0, 0]`` with ``mean`` and
    ``[1, -1, 0, 0]`` with ``leave_one_out``.
    """
    if baseline == "none" and scale:
        raise ValueError("scale divides differences from a baseline, so it needs one")
    scores = scores.astype(jnp.float32)
    counted = has_score(scores, valid)
    known = jnp.where(counted, scores, 0.0)
    number = _group_sum(counted.astype(jnp.float32), groups)
    total = _group_sum(known, groups)
    mean = total / jnp.maximum(number, 1.0)
    match baseline:
        case "mean":
            advantages = known - mean
        case "leave_one_out":
            advantages = known - (total - known) / jnp.maximum(number - 1.0, 1.0)
        case "none":
            return known
    if scale:
        squares = _group_sum(jnp.where(counted, jnp.square(known - mean), 0.0), groups)
        advantages = advantages / (jnp.sqrt(squares / jnp.maximum(number - 1.0, 1.0)) + 1e-4)
    # By comparison: a mean of equal numbers may differ from them by its rounding.
    return jnp.where(counted & ~equal_scores(scores, groups, valid=valid), advantages, 0.0)


def equal_scores(
    scores: Real[Array, "B"], groups: Int[Array, "B"], *, valid: Bool[Array, "B"] | None = None
) -> Bool[Array, "B"]:
    """True at answers of a group whose scores are all equal, or that has fewer than two: nothing is learnt from it.

    Scores that are not finite, or that ``valid`` leaves out, are not compared.
    """
    scores = scores.astype(jnp.float32)
    counted = has_score(scores, valid)
    rows = scores.shape[0]
    largest = jax.ops.segment_max(jnp.where(counted, scores, -jnp.inf), groups, num_segments=rows)
    smallest = jax.ops.segment_min(jnp.where(counted, scores, jnp.inf), groups, num_segments=rows)
    return (largest <= smallest)[groups]


def has_score(scores: Float[Array, "B"], valid: Bool[Array, "B"] | None) -> Bool[Array, "B"]:
    """True at the finite scores that ``valid`` does not leave out."""
    finite = jnp.isfinite(scores)
    return finite if valid is None else finite & valid


def _group_sum(x: Float[Array, "B"], groups: Int[Array, "B"]) -> Float[Array, "B"]:
    """The sum over each answer's group."""
    return jax.ops.segment_sum(x, groups, num_segments=x.shape[0])[groups]
