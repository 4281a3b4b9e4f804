"""Losses that teach a policy people's preferences without a reward model: DPO and its relatives, and KTO."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core.losses import mean_over_pairs, ordered_pairs

PreferenceLoss = Literal["sigmoid", "ipo", "simpo"]


def normalises_length(kind: PreferenceLoss) -> bool:
    """Whether the loss reads the mean log-prob of an answer's tokens: IPO and SimPO do, ``sigmoid`` reads their sum."""
    return kind != "sigmoid"


def dpo_loss(
    policy_margin: Float[Array, "*S"],
    reference_margin: Float[Array, "*S"],
    margin: float | Float[Array, "*S"] = 0.0,
    *,
    beta: float,
    kind: PreferenceLoss,
    label_smoothing: float,
) -> Float[Array, "*S"]:
    """Loss of ordered pairs, from z = β·(Δπ - Δref) - margin, in float32.

    Δ is log p(better answer) - log p(worse answer): of the policy in ``policy_margin``, of the reference in
    ``reference_margin``. With ε for ``label_smoothing``:

    - ``sigmoid``: -(1 - ε)·log σ(z) - ε·log σ(-z). Rafailov et al. 2023, eq. 7; ε, the share of pairs that people
      ordered wrongly: Mitchell 2023 (conservative DPO).
    - ``ipo``: ((z - ½) / β)², which is (Δπ - Δref - 1/(2β))² where the margin is 0. Azar et al. 2023, eq. 17.
    - ``simpo``: -log σ(β·Δπ - margin). There is no reference, and the margin is γ. Meng et al. 2024, eq. 6.

    ``ipo`` and ``simpo`` read means of an answer's log-probs, ``sigmoid`` sums. The margin is that of ``ranking_loss``.
    """
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"the loss {kind} has no label smoothing")
    difference = policy_margin.astype(jnp.float32)
    if kind != "simpo":
        difference = difference - reference_margin.astype(jnp.float32)
    z = beta * difference - margin
    if kind == "ipo":
        return jnp.square((z - 0.5) / beta)
    loss = -jax.nn.log_sigmoid(z)
    return (1.0 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-z) if label_smoothing else loss


def kwise_dpo_loss(
    logprobs: Float[Array, "B K"],
    ref_logprobs: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"],
    margin: float | Float[Array, "B"] = 0.0,
    *,
    beta: float,
    kind: PreferenceLoss,
    label_smoothing: float,
) -> Float[Array, "B"]:
    """Mean of ``dpo_loss`` over all pairs of a row in which one answer is strictly better; 0 where there are none.

    All pairs of a prompt are one batch element, so each answer is read once. Of two answers it is the loss of the pair.
    """
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), logprobs.shape[:1])
    margins = pair_differences(logprobs, mask), pair_differences(ref_logprobs, mask)
    options = {"beta": beta, "kind": kind, "label_smoothing": label_smoothing}
    loss = dpo_loss(*margins, jnp.broadcast_to(margin[:, None, None], margins[0].shape), **options)
    return mean_over_pairs(loss, ordered_pairs(ranks, mask))


def pair_differences(x: Float[Array, "B K"], mask: Bool[Array, "B K"]) -> Float[Array, "B K K"]:
    """x of answer i minus x of answer j at [b, i, j], in float32; a masked answer counts as 0."""
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    return x[:, :, None] - x[:, None, :]


def reference_point(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
    """The point z₀ = max(0, total / count) from which KTO measures gains and losses, a constant, in float32.

    ``total`` is Σ (log π(y'|x) - log π_ref(y'|x)) over ``count`` mismatched pairs, each a prompt x with the answer y'
    to another prompt: a cheap and biased estimate of KL(π ‖ π_ref), since y' was not drawn from π. Ethayarajh et al.
    2024 (arXiv 2402.01306), section 4. The mean is over the whole batch, on all devices; without a pair z₀ is 0.
    """
    mean = total.astype(jnp.float32) / jnp.maximum(count, 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
    log_ratios: Float[Array, "*S"],
    desirable: Bool[Array, "*S"],
    point: Float[Array, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Array, "*S"]:
    """λ_D·(1 - σ(β·(r - z₀))) of a desirable answer, λ_U·(1 - σ(β·(z₀ - r))) of an undesirable one, in float32.

    r is log π - log π_ref of the whole answer, in ``log_ratios``; z₀ is ``point``, see ``reference_point``. This is
    λ_y - v(x, y) of Ethayarajh et al. 2024 (arXiv 2402.01306), section 4. The loss lies between 0 and λ, and its
    gradient vanishes on answers far from z₀ on either side, so that wrong labels do little harm.
    """
    gain = beta * (log_ratios.astype(jnp.float32) - point)
    # 1 - σ(z) is σ(-z), without its cancellation.
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))
