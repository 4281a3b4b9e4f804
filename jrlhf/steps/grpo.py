"""One iteration of GRPO and its relatives over a rollout: advantages from groups of answers, a policy and no critic."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jrlhf.core import KLEstimator, cispo_loss, importance_ratio, kl_penalty, masked_sum, ppo_policy_loss
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients, moving_average
from jrlhf.steps.minibatches import packed_minibatch, shuffled_minibatches, update_each
from jrlhf.steps.ratios import merged, ratio_sums, sampler_weights
from jrlhf.types import Key, LogprobFn, Metrics, Params, Rollout, TokenMask, TrainState

PolicyLoss = Literal["clip", "cispo"]
RatioOf = Literal["token", "sequence"]
Aggregation = Literal["token", "sequence", "constant"]


class GRPOSettings(NamedTuple):
    """Settings of ``make_grpo_step``. What has a default is off unless you set it."""

    epochs: int
    """Passes over a rollout; each draws a fresh permutation of its rows."""
    minibatches: int
    """Updates an epoch; must divide the rows of a rollout. A group may be spread over several."""
    temperature: float
    """The sampler's temperature: policy and sampler are one distribution."""
    loss: PolicyLoss
    """``clip``: PPO's clipped ratio. ``cispo``: a clipped constant weight of log π."""
    ratio: RatioOf
    """π / π_old of each token, or of a whole answer: the geometric mean over its tokens (GSPO: Zheng et al. 2025, arXiv
    2507.18071, eq. 7)."""
    aggregation: Aggregation
    """Weight of a token. ``token``: all alike (DAPO). ``sequence``: the mean of answers' means (GRPO). ``constant``:
    sums over answers, divided by ``max_new_tokens`` (Dr. GRPO)."""
    max_new_tokens: int
    """Length limit of an answer, which ``constant`` divides by."""
    clip: float
    """ε below 1."""
    clip_high: float
    """ε above 1; DAPO's is larger than that below."""
    kl_estimator: KLEstimator
    """Estimator of the KL to the reference in the loss, which is there if the rollout has ``kl_coef``."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    dual_clip: float | None = None
    """Bound c > 1 on the ratio where the advantage is negative: Ye et al. 2020, eq. 5."""
    leave_out_cut: bool = False
    """Leave answers that no stop token ended out of the loss (DAPO's overlong filtering); baselines include them."""
    sampler_weight_cap: float | None = None
    """Bound of each token's weight exp(log π_old - log π_sampler) in the policy loss; see ``truncated_weights``."""
    target_approx_kl: float | None = None
    """Once a minibatch's mean ½(log π - log π_old)² exceeds it, its update and the rest of the rollout are dropped."""
    ema_decay: float | None = None
    """``state.ema``, which must then be there, follows the policy at every update with this decay."""
    accumulation: int = 1
    """Number of slices in which a minibatch is read; must divide its rows. The update is the same for any number."""
    drop_padding: bool = False
    """Pack a minibatch's episodes into fewer rows and skip the slices that are left empty; the update is the same.
    The policy must then accept segment numbers as the mask, as the bundled models do."""


class Answers(NamedTuple):
    """The arrays of a minibatch that the loss reads, per token; answers are packed, or stand one in a row."""

    tokens: Array
    mask: TokenMask
    response_mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    """Share of each token in the loss, of the whole minibatch."""
    kl_weights: Float[Array, "B T"] | None
    """The same times the KL coefficient; None where the loss has no KL."""
    ref_logprobs: Float[Array, "B T"] | None
    sampler_logprobs: Float[Array, "B T"] | None
    """None where no weight is put on what the sampler did."""


def make_grpo_step(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation, settings: GRPOSettings
) -> Callable[[TrainState, Rollout, Key], tuple[TrainState, Metrics]]:
    """A pure function that does all ``epochs`` x ``minibatches`` updates of one rollout. ``state.params``: the policy.

    loss = policy + β · KL - entropy_coef · entropy, each aggregated alike; β is ``rollout.kl_coef`` (Shao et al. 2024,
    eq. 3). Advantages come with the rollout, see ``make_group_targets``. ValueError for a sequence ratio with CISPO.
    """
    if settings.loss == "cispo" and (settings.ratio == "sequence" or settings.dual_clip is not None):
        raise ValueError("cispo weighs single tokens, and has no clip to bound: ratio must be token, dual_clip None")

    # Jitted, so that it is traced once for its shapes and for the loop.
    @jax.jit
    def update(state: TrainState, minibatch: Rollout, frozen: Params | None) -> tuple[TrainState, Sums, jax.Array]:
        learnt = learnt_tokens(minibatch, settings)
        grads, sums = grpo_gradients(logprob_fn, settings, state.params, minibatch, learnt, frozen)
        # Without a response there is no loss, not one of 0: nothing moves, where momentum and decay alone would.
        any_response = jnp.any(learnt)
        new_state, update_metrics = apply_gradients(
            tx, state, grads, jnp.where(any_response, sums.total["loss"], jnp.nan)
        )
        if settings.ema_decay is not None:
            skipped = update_metrics["skipped"]
            ema = moving_average(state.ema, new_state.params, decay=settings.ema_decay, skipped=skipped)
            new_state = new_state._replace(ema=ema)
        sums = sums._replace(total=sums.total | {"grad_norm": update_metrics["grad_norm"]})
        return new_state, sums, jnp.where(any_response, update_metrics["skipped"], 0.0)

    def step(state: TrainState, rollout: Rollout, key: Key) -> tuple[TrainState, Metrics]:
        if settings.ema_decay is not None and state.ema is None:
            raise ValueError("ema_decay is set, but the state has no ema")
        # What no loss reads is not shuffled.
        rollout = rollout._replace(entropy=None, rewards=None, scores=None, values=None, returns=None)
        batches = shuffled_minibatches(rollout, key, epochs=settings.epochs, minibatches=settings.minibatches)
        return update_each(update, state, batches, target_approx_kl=settings.target_approx_kl)

    return step


def learnt_tokens(minibatch: Rollout, settings: GRPOSettings) -> Bool[Array, "B T"]:
    """The response tokens that the loss includes."""
    response = minibatch.response_mask
    return response & minibatch.stopped[:, None] if settings.leave_out_cut else response


def token_weights(learnt: Bool[Array, "B T"], *, aggregation: Aggregation, max_new_tokens: int) -> Float[Array, "B T"]:
    """The weights of tokens in a sum over a whole minibatch; 0 where ``learnt`` is False.

    ``token``: 1 / tokens. ``sequence``: 1 / (tokens of the answer · answers). ``constant``: 1 / (max_new_tokens ·
    answers). An answer without a token is not counted.
    """
    lengths = jnp.sum(learnt, axis=-1, dtype=jnp.float32)
    answers = jnp.maximum(jnp.sum(lengths > 0, dtype=jnp.float32), 1.0)
    match aggregation:
        case "token":
            weight = jnp.broadcast_to(1.0 / jnp.maximum(jnp.sum(lengths), 1.0), lengths.shape)
        case "sequence":
            weight = 1.0 / (jnp.maximum(lengths, 1.0) * answers)
        case "constant":
            weight = jnp.broadcast_to(1.0 / (max_new_tokens * answers), lengths.shape)
    return jnp.where(learnt, weight[:, None], 0.0)


def grpo_gradients(
    logprob_fn: LogprobFn,
    settings: GRPOSettings,
    params: Params,
    minibatch: Rollout,
    learnt: Bool[Array, "B T"],
    frozen: Params | None,
) -> tuple[Params, Sums]:
    """The gradient of a minibatch's loss on the ``learnt`` tokens, and what the loss reports.

    ``frozen`` completes ``params``. Weights are those of the whole minibatch, so slices and packing change nothing.
    """
    slices, used, coef = settings.accumulation, None, minibatch.kl_coef
    weights = token_weights(learnt, aggregation=settings.aggregation, max_new_tokens=settings.max_new_tokens)
    answers = Answers(
        tokens=minibatch.tokens,
        mask=minibatch.mask,
        response_mask=learnt,
        logprobs=minibatch.logprobs,
        advantages=minibatch.advantages,
        weights=weights,
        kl_weights=None if coef is None else coef[:, None] * weights,
        ref_logprobs=None if coef is None else minibatch.ref_logprobs,
        sampler_logprobs=minibatch.sampler_logprobs if settings.sampler_weight_cap else None,
    )
    tokens = jnp.maximum(jnp.sum(learnt, dtype=jnp.float32), 1.0)
    if settings.drop_padding:
        answers, used = packed_minibatch(answers, slices=slices)
    loss_fn = answers_loss(logprob_fn, settings, tokens)
    return accumulate_gradients(loss_fn, params, answers, slices=slices, frozen=frozen, used=used)


def answers_loss(
    logprob_fn: LogprobFn, settings: GRPOSettings, tokens: Float[Array, ""]
) -> Callable[[Params, Answers], tuple[jax.Array, Sums]]:
    """The loss of a slice of a minibatch, which has ``tokens`` response tokens in all its slices together."""

    def loss_fn(params: Params, part: Answers) -> tuple[jax.Array, Sums]:
        mask = part.response_mask
        logprobs, entropy = logprob_fn(params, part.tokens, part.mask, temperature=settings.temperature, where=mask)
        if not settings.entropy_coef:
            entropy = jax.lax.stop_gradient(entropy)
        # Masked slots are set to one harmless value before any arithmetic (law 6).
        logprobs, old_logprobs, advantages = (
            jnp.where(mask, x, 0.0) for x in (logprobs, part.logprobs, part.advantages)
        )
        per_token, ratios = policy_loss(settings, logprobs, old_logprobs, advantages, part, tokens=tokens)
        policy = masked_sum(part.weights * per_token, mask)
        loss = policy - settings.entropy_coef * masked_sum(part.weights * entropy, mask)
        total = {"loss/policy": policy, "policy/entropy": masked_sum(entropy, mask) / tokens}
        if part.kl_weights is not None and part.ref_logprobs is not None:
            ref_logprobs = jnp.where(mask, part.ref_logprobs, 0.0)
            kl = kl_penalty(logprobs, ref_logprobs, estimator=settings.kl_estimator)
            total["loss/kl"] = masked_sum(part.kl_weights * kl, mask)
            loss = loss + total["loss/kl"]
        return loss, merged(Sums(total | {"loss": loss}, {}), ratios)

    return loss_fn


def policy_loss(
    settings: GRPOSettings,
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    part: Answers,
    *,
    tokens: Float[Array, ""],
) -> tuple[Float[Array, "B T"], Sums]:
    """The policy loss of each token, weighed by what the sampler did, and the figures of its ratios."""
    mask, clip, high = part.response_mask, settings.clip, settings.clip_high
    differences = logprobs - old_logprobs
    log_ratio = answer_means(differences, mask, part.mask) if settings.ratio == "sequence" else differences
    none = jnp.zeros_like(log_ratio)
    match settings.loss:
        case "clip":
            dual = settings.dual_clip
            per_token = ppo_policy_loss(log_ratio, none, advantages, clip=clip, clip_high=high, dual_clip=dual)
        case "cispo":
            per_token = cispo_loss(logprobs, old_logprobs, advantages, clip=clip, clip_high=high)
    ratio = importance_ratio(log_ratio, none)
    ratios = ratio_sums(differences, ratio, mask, tokens=tokens, clip=clip, clip_high=high)
    if not settings.sampler_weight_cap or part.sampler_logprobs is None:
        return per_token, ratios
    cap = settings.sampler_weight_cap
    weights, weighed = sampler_weights(old_logprobs, part.sampler_logprobs, mask, cap=cap, tokens=tokens)
    return per_token * weights, merged(ratios, weighed)


def answer_means(x: Float[Array, "B T"], where: Bool[Array, "B T"], mask: TokenMask) -> Float[Array, "B T"]:
    """The mean of ``x`` over each answer's tokens ``where`` it counts, at all of these tokens; 0 elsewhere.

    ``mask`` numbers the answers of a packed row; elsewhere a row is one answer.
    """
    segments = mask.astype(jnp.int32)
    count = x.shape[1] + 1

    def of_row(values: Float[Array, "T"], numbers: Array) -> Float[Array, "T"]:
        return jax.ops.segment_sum(values, numbers, num_segments=count)[numbers]

    total = jax.vmap(of_row)(jnp.where(where, x, 0.0), segments)
    number = jax.vmap(of_row)(where.astype(jnp.float32), segments)
    return jnp.where(where, total / jnp.maximum(number, 1.0), 0.0)
