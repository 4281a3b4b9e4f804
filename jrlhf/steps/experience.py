"""From scored samples to PPO's training targets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from jrlhf.core import (
    KLEstimator,
    align_to_tokens,
    gae,
    importance_ratio,
    kl_penalty,
    masked_mean,
    masked_sum,
    masked_whiten,
    shape_rewards,
)
from jrlhf.steps.networks import Networks
from jrlhf.types import Generation, Metrics, Params, PPOParams, Readings, Rollout


def make_experience(
    networks: Networks,
    *,
    temperature: float,
    gamma: float,
    lam: float,
    kl_estimator: KLEstimator,
    missing_eos_penalty: float,
    whiten_rewards: bool,
    from_sampler: bool = False,
) -> Callable[[Params, Params, Params, Generation, Real[Array, "B"], Float[Array, ""]], Rollout]:
    """A pure function ``(policy, ref, value params, generation, scores, kl_coef) -> Rollout``.

    It is ``make_readings`` followed by ``make_targets``, which say what the settings do. A caller that waits for scores
    runs the two one by one: the first needs no scores.
    """
    read = make_readings(networks, temperature=temperature, from_sampler=from_sampler)
    targets = make_targets(
        gamma=gamma,
        lam=lam,
        kl_estimator=kl_estimator,
        missing_eos_penalty=missing_eos_penalty,
        whiten_rewards=whiten_rewards,
    )

    def experience(
        policy: Params,
        reference: Params,
        value: Params,
        generation: Generation,
        scores: Real[Array, "B"],
        kl_coef: Float[Array, ""],
    ) -> Rollout:
        return targets(generation, read(policy, reference, value, generation), scores, kl_coef)

    return experience


def make_readings(
    networks: Networks, *, temperature: float, from_sampler: bool = False
) -> Callable[[Params, Params, Params, Generation], Readings]:
    """A pure function ``(policy, ref, value params, generation) -> Readings``: all forward passes of a rollout.

    ``temperature`` must be the sampler's: one probability for sampler, old policy, new policy and reference.
    ``from_sampler``: the policy does not read the responses again. Its log-probs are those it was sampled with, and for
    entropy stands -log p of each token, whose expectation it is. ValueError where policy and value share a network.
    """
    value_fn = networks.value_fn if from_sampler else None
    if from_sampler and value_fn is None:
        raise ValueError("from_sampler: policy and value share a network, which reads the answers anyway")

    def read(policy: Params, reference: Params, value: Params, generation: Generation) -> Readings:
        tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
        trained, frozen = PPOParams(policy, value), PPOParams(reference, value)
        if value_fn is not None:
            logprobs, entropy = generation.logprobs, -generation.logprobs
            values = value_fn(trained, tokens, mask)
        else:
            logprobs, entropy, values = networks.actor_critic_fn(
                trained, tokens, mask, temperature=temperature, where=response
            )
        ref_logprobs, _ = networks.logprob_fn(frozen, tokens, mask, temperature=temperature, where=response)
        values = align_to_tokens(values.astype(jnp.float32))
        return jax.lax.stop_gradient(Readings(logprobs, entropy, ref_logprobs, values))

    return read


def make_targets(
    *, gamma: float, lam: float, kl_estimator: KLEstimator, missing_eos_penalty: float, whiten_rewards: bool
) -> Callable[[Generation, Readings, Real[Array, "B"], Float[Array, ""]], Rollout]:
    """A pure function ``(generation, readings, scores, kl_coef) -> Rollout``.

    ``missing_eos_penalty`` is taken from the score of a response that no stop token ended.
    Advantages are whitened over the whole rollout; returns are advantages + values before that.
    The generation's response may be smaller than the one that was read.
    """

    def targets(
        generation: Generation, readings: Readings, scores: Real[Array, "B"], kl_coef: Float[Array, ""]
    ) -> Rollout:
        response, scores = generation.response_mask, scores.astype(jnp.float32)
        values, ref_logprobs = readings.values, readings.ref_logprobs
        if values is None or ref_logprobs is None:
            raise ValueError("PPO's targets need the readings of a value network and of a reference")
        kl = kl_penalty(readings.logprobs, ref_logprobs, estimator=kl_estimator)
        penalised = scores - jnp.where(generation.stopped, 0.0, missing_eos_penalty)
        rewards = shape_rewards(penalised, kl, response, kl_coef=kl_coef)
        if whiten_rewards:
            rewards = masked_whiten(rewards, response, shift_mean=False)
        advantages, returns = jax.vmap(lambda r, v, m: gae(r, v, m, gamma=gamma, lam=lam))(rewards, values, response)
        rollout = Rollout(
            **readings._asdict(),
            tokens=generation.tokens,
            mask=generation.mask,
            response_mask=response,
            sampler_logprobs=generation.logprobs,
            rewards=rewards,
            advantages=masked_whiten(advantages, response, shift_mean=True),
            returns=returns,
            scores=scores,
            stopped=generation.stopped,
        )
        # Targets are constants of the update, whatever the caller differentiates.
        return jax.lax.stop_gradient(rollout)

    return targets


def rollout_metrics(rollout: Rollout) -> Metrics:
    """Figures of a rollout before anything is trained on it. KL, entropy and lengths count response tokens only.

    A row without a response is in no figure. Without a reference there is no ``kl``, and without a value network no
    ``value/explained_variance``.
    """
    response = rollout.response_mask
    rows = jnp.any(response, axis=-1)
    score = masked_mean(rollout.scores, rows)
    lengths = jnp.sum(response, axis=-1, dtype=jnp.float32)
    drift = jnp.where(response, jnp.abs(rollout.logprobs - rollout.sampler_logprobs), 0.0)
    sampler_ratio = importance_ratio(rollout.logprobs, rollout.sampler_logprobs)
    metrics = {
        "reward/score_mean": score,
        "reward/score_std": jnp.sqrt(masked_mean(jnp.square(rollout.scores - score), rows)),
        "reward/total": masked_mean(jnp.sum(jnp.where(response, rollout.rewards, 0.0), axis=-1), rows),
        "entropy": masked_mean(rollout.entropy, response),
        "length/mean": masked_mean(lengths, rows),
        "length/tokens": jnp.sum(lengths),
        "repetition": repetition(rollout.tokens, response),
        "eos_fraction": masked_mean(rollout.stopped.astype(jnp.float32), rows),
        "sampler/max_abs_logprob_diff": jnp.max(drift),
        "sampler/mean_ratio": masked_mean(sampler_ratio, response),
    }
    if rollout.ref_logprobs is not None:
        kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, estimator="k1")
        metrics["kl"] = masked_mean(jnp.sum(jnp.where(response, kl, 0.0), axis=-1), rows)
    if rollout.values is not None and rollout.returns is not None:
        residual = masked_sum(jnp.square(_centred(rollout.returns - rollout.values, response)), response)
        spread = masked_sum(jnp.square(_centred(rollout.returns, response)), response)
        metrics["value/explained_variance"] = 1.0 - residual / jnp.maximum(spread, 1e-8)
    return metrics


def repetition(tokens: Int[Array, "B T"], response: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The share of answer tokens that end a run of three which was there before in the same answer.

    Of "a b c a b c" four tokens end a run of three, and the last of them (a b c) one that was there before: 1/4.
    """
    shifts = jnp.stack([jnp.roll(tokens, by, axis=1) for by in range(3)])
    run_ends = response & jnp.roll(response, 1, axis=1) & jnp.roll(response, 2, axis=1)
    run_ends = run_ends & (jnp.arange(tokens.shape[1]) >= 2)[None]
    same = jnp.all(shifts[:, :, :, None] == shifts[:, :, None, :], axis=0) & run_ends[:, None, :]
    repeats = jnp.any(same & jnp.tril(jnp.ones(same.shape[1:], bool), -1)[None], axis=-1)
    return masked_mean(repeats.astype(jnp.float32), run_ends)


def _centred(x: Float[Array, "*S"], mask: Array) -> Float[Array, "*S"]:
    return jnp.where(mask, x - masked_mean(x, mask), 0.0)
