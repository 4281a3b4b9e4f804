"""From scored groups of answers to GRPO's training targets: readings without a critic, and advantages by group."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from jrlhf.core import (
    Baseline,
    KLEstimator,
    equal_scores,
    group_advantages,
    kl_penalty,
    masked_mean,
    masked_whiten,
    shape_rewards,
)
from jrlhf.types import Generation, LogprobFn, Metrics, Params, Readings, Rollout

KLPlace = Literal["reward", "loss"]
GroupTargets = Callable[
    [Generation, Readings, Real[Array, "B"], Mapping[str, Float[Array, "B"]], Float[Array, ""]], Rollout
]
"""``(generation, readings, scores, parts of the scores by name, KL coefficient) -> Rollout``."""


def make_policy_readings(
    logprob_fn: LogprobFn, *, temperature: float, from_sampler: bool = False
) -> Callable[[Params, Params | None, Generation], Readings]:
    """A pure function ``(policy, reference or None, generation) -> Readings`` without values.

    ``temperature`` must be the sampler's. ``from_sampler``: the policy does not read the responses again; its log-probs
    are those it was sampled with, and for entropy stands -log p of each token, whose expectation it is.
    """

    def read(policy: Params, reference: Params | None, generation: Generation) -> Readings:
        def of(params: Params) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
            tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
            return logprob_fn(params, tokens, mask, temperature=temperature, where=response)

        own = (generation.logprobs, -generation.logprobs) if from_sampler else of(policy)
        ref_logprobs = None if reference is None else of(reference)[0]
        return jax.lax.stop_gradient(Readings(*own, ref_logprobs, None))

    return read


def group_numbers(rows: int, samples: int) -> Int[Array, "B"]:
    """The group of each row, where ``samples`` neighbouring rows are one: ``[0, 0, 1, 1]`` for 4 rows and 2 samples."""
    if rows % samples:
        raise ValueError(f"{rows} rows are not groups of {samples}")
    return jnp.arange(rows, dtype=jnp.int32) // samples


def make_group_targets(
    *,
    samples: int,
    baseline: Baseline,
    scale: bool,
    weights: Mapping[str, float] | None,
    kl_place: KLPlace | None,
    kl_estimator: KLEstimator,
    missing_eos_penalty: float,
    max_new_tokens: int,
    overlong_buffer: int,
    overlong_penalty: float,
) -> GroupTargets:
    """A pure function that gives every token of an answer the advantage of the answer in its group.

    ``samples`` neighbouring rows are a group. ``kl_place`` ``reward``: β · Σ KL over an answer's tokens is taken from
    its score; ``loss``: ``rollout.kl_coef`` is β; None: no KL. ``missing_eos_penalty`` is taken from the score of an
    answer that no stop token ended, ``overlong_penalty`` times ``overlong_excess`` from that of a long one.

    ``weights``: not the sum of the scores' parts but each part is set against its group, and the weighted sum of the
    advantages is whitened over the batch (GDPO, arXiv 2601.05242); None: the sum. A score of an answer with a response
    that is not finite makes its advantage NaN, so that the step skips the update. ValueError for a baseline of one
    answer alone.
    """
    if samples < 2 and baseline != "none":
        raise ValueError(f"samples is {samples}, but the baseline {baseline} sets an answer against its group")

    def targets(
        generation: Generation,
        readings: Readings,
        scores: Real[Array, "B"],
        parts: Mapping[str, Float[Array, "B"]],
        kl_coef: Float[Array, ""],
    ) -> Rollout:
        response, scores = generation.response_mask, scores.astype(jnp.float32)
        valid, kl = jnp.any(response, axis=-1), jnp.zeros(response.shape, jnp.float32)
        if kl_place is not None and readings.ref_logprobs is None:
            raise ValueError("a KL penalty needs the readings of a reference")
        if kl_place == "reward" and readings.ref_logprobs is not None:
            kl = kl_penalty(readings.logprobs, readings.ref_logprobs, estimator=kl_estimator)
        excess = overlong_excess(response, max_new_tokens=max_new_tokens, buffer=overlong_buffer)
        penalised = scores - jnp.where(generation.stopped, 0.0, missing_eos_penalty) - overlong_penalty * excess
        rewards = shape_rewards(penalised, kl, response, kl_coef=kl_coef)
        total = jnp.sum(rewards, axis=-1)
        how = {"groups": group_numbers(len(scores), samples), "baseline": baseline, "scale": scale, "valid": valid}
        if weights is None:
            advantages = group_advantages(total, **how)
        else:
            apart = [weight * group_advantages(parts[name], **how) for name, weight in sorted(weights.items())]
            advantages = masked_whiten(jnp.sum(jnp.stack(apart), axis=0), valid, shift_mean=True)
        advantages = jnp.where(valid & ~jnp.isfinite(total), jnp.nan, advantages)
        rollout = Rollout(
            **readings._asdict(),
            tokens=generation.tokens,
            mask=generation.mask,
            response_mask=response,
            sampler_logprobs=generation.logprobs,
            rewards=rewards,
            advantages=jnp.where(response, advantages[:, None], 0.0),
            returns=None,
            scores=scores,
            stopped=generation.stopped,
            kl_coef=jnp.broadcast_to(kl_coef, scores.shape) if kl_place == "loss" else None,
        )
        # Targets are constants of the update, whatever the caller differentiates.
        return jax.lax.stop_gradient(rollout)

    return targets


def overlong_excess(response: Bool[Array, "B T"], *, max_new_tokens: int, buffer: int) -> Float[Array, "B"]:
    """The share of the last ``buffer`` of ``max_new_tokens`` tokens that an answer fills: from 0 to 1 at the limit.

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, section 3.4); 0 for a ``buffer`` of 0.
    """
    lengths = jnp.sum(response, axis=-1, dtype=jnp.float32)
    return jnp.clip((lengths - (max_new_tokens - buffer)) / max(buffer, 1), 0.0, 1.0)


def group_metrics(rollout: Rollout, *, samples: int) -> Metrics:
    """Figures of a rollout's groups, each of ``samples`` neighbouring rows; a group without any answer is in none.

    ``groups/degenerate``: the share of groups whose scores are all equal, from which nothing is learnt.
    ``groups/score_std``: the mean over groups of the scores' standard deviation in the group.
    """
    rows = jnp.any(rollout.response_mask, axis=-1) & jnp.isfinite(rollout.scores)
    groups = group_numbers(len(rollout.scores), samples)
    equal = equal_scores(rollout.scores, groups, valid=rows).reshape(-1, samples)[:, 0]
    answered = rows.reshape(-1, samples)
    scores = jnp.where(answered, rollout.scores.reshape(-1, samples), 0.0)
    number = jnp.maximum(jnp.sum(answered, axis=1, dtype=jnp.float32), 1.0)
    centred = jnp.where(answered, scores - (jnp.sum(scores, axis=1) / number)[:, None], 0.0)
    spread = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1) / jnp.maximum(number - 1.0, 1.0))
    some = jnp.any(answered, axis=1)
    return {
        "groups/degenerate": masked_mean(equal.astype(jnp.float32), some),
        "groups/score_std": masked_mean(spread, some),
    }
