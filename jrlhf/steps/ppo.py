"""One PPO iteration over a rollout: several epochs of minibatches, one optimizer for actor and critic."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jrlhf.core import (
    align_to_tokens,
    combine,
    importance_ratio,
    masked_sum,
    ppo_policy_loss,
    ppo_value_loss,
)
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients, moving_average, select
from jrlhf.steps.minibatches import packed_minibatch, shuffled_minibatches, update_each
from jrlhf.steps.networks import Networks
from jrlhf.steps.ratios import merged, ratio_sums, sampler_weights
from jrlhf.steps.sft import nll_sum, trained_tokens
from jrlhf.types import Key, Metrics, Params, PPOParams, Rollout, SFTBatch, TrainState


class PPOSettings(NamedTuple):
    """Settings of ``make_ppo_step``. What has a default is off unless you set it."""

    epochs: int
    """Passes over a rollout; each draws a fresh permutation of its rows."""
    minibatches: int
    """Updates an epoch; must divide the rows of a rollout, and of its ``ptx``."""
    temperature: float
    """The sampler's temperature: policy and sampler are one distribution."""
    clip: float
    """ε of the policy loss."""
    value_clip: float
    """ε of the value loss, in units of the score."""
    value_coef: float
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    dual_clip: float | None = None
    """Bound c > 1 on the ratio where the advantage is negative: Ye et al. 2020, eq. 5."""
    ptx_coef: float = 0.0
    """Weight of the negative log-likelihood of ``rollout.ptx``, which must then be there."""
    target_approx_kl: float | None = None
    """Once a minibatch's mean ½(log π - log π_old)² exceeds it, its update and the rest of the rollout are dropped."""
    critic_warmup_updates: int = 0
    """For so many updates only the critic moves."""
    sampler_weight_cap: float | None = None
    """Bound of each token's weight exp(log π_old - log π_sampler) in the policy loss; see ``truncated_weights``."""
    ema_decay: float | None = None
    """``state.ema``, which must then be there, follows the policy at every update with this decay."""
    accumulation: int = 1
    """Number of slices in which a minibatch is read; must divide its rows. The update is the same for any number."""
    drop_padding: bool = False
    """Pack a minibatch's episodes into fewer rows and skip the slices that are left empty; the update is the same.
    Both networks must then accept segment numbers as the mask, as the bundled models do."""


def make_ppo_step(
    networks: Networks, tx: optax.GradientTransformation, settings: PPOSettings
) -> Callable[[TrainState, Rollout, Key], tuple[TrainState, Metrics]]:
    """A pure function that does all ``epochs`` x ``minibatches`` updates of one rollout.

    loss = policy + value_coef · value - entropy_coef · entropy + ptx_coef · nll(ptx), each a mean over its own tokens
    of the minibatch (Ouyang et al. 2022, eq. 2; Huang et al. 2024, arXiv 2403.17031).
    """

    # Jitted, so that it is traced once for its shapes and for the loop.
    @jax.jit
    def update(state: TrainState, minibatch: Rollout, frozen: Params | None) -> tuple[TrainState, Sums, jax.Array]:
        grads, sums = ppo_gradients(networks, settings, state.params, minibatch, frozen)
        # Without a response there is no loss, not one of 0: nothing moves, where momentum and decay alone would.
        any_response = jnp.any(minibatch.response_mask)
        loss = jnp.where(any_response, sums.total["loss"], jnp.nan)
        new_state, update_metrics = apply_gradients(tx, state, grads, loss)
        params, ema = new_state.params, state.ema
        if settings.critic_warmup_updates:
            # A select, not a factor: weight decay and momentum must not move the policy either.
            warm = state.step < settings.critic_warmup_updates
            params = params._replace(policy=select(warm, state.params.policy, params.policy))
        if settings.ema_decay is not None and ema is not None:
            skipped = update_metrics["skipped"]
            ema = moving_average(ema, params.policy, decay=settings.ema_decay, skipped=skipped)
        sums = sums._replace(total=sums.total | {"grad_norm": update_metrics["grad_norm"]})
        skipped = jnp.where(any_response, update_metrics["skipped"], 0.0)
        return new_state._replace(params=params, ema=ema), sums, skipped

    def step(state: TrainState, rollout: Rollout, key: Key) -> tuple[TrainState, Metrics]:
        if settings.ptx_coef and rollout.ptx is None:
            raise ValueError("ptx_coef is set, but the rollout carries no ptx batch")
        if settings.ema_decay is not None and state.ema is None:
            raise ValueError("ema_decay is set, but the state has no ema")
        batches = shuffled_minibatches(rollout, key, epochs=settings.epochs, minibatches=settings.minibatches)
        return update_each(update, state, batches, target_approx_kl=settings.target_approx_kl)

    return step


def ppo_gradients(
    networks: Networks, settings: PPOSettings, params: PPOParams, minibatch: Rollout, frozen: Params | None
) -> tuple[PPOParams, Sums]:
    """The gradient of a minibatch's loss, and what the loss reports; ``frozen`` completes ``params``."""
    slices = settings.accumulation
    # What no loss reads is not packed.
    episodes, used = minibatch._replace(ptx=None, ref_logprobs=None, entropy=None, rewards=None), None
    if not settings.sampler_weight_cap:
        episodes = episodes._replace(sampler_logprobs=None)
    tokens = jnp.maximum(jnp.sum(episodes.response_mask, dtype=jnp.float32), 1.0)
    if settings.drop_padding:
        episodes, used = packed_minibatch(episodes, slices=slices)
    loss_fn = episode_loss(networks, settings, tokens)
    grads, sums = accumulate_gradients(loss_fn, params, episodes, slices=slices, frozen=frozen, used=used)
    if not settings.ptx_coef or minibatch.ptx is None:
        return grads, sums
    coef = settings.ptx_coef
    text_grads, text_sums = ptx_gradients(networks, params, minibatch.ptx, slices=slices, frozen=frozen)
    grads = grads._replace(policy=jax.tree.map(lambda a, b: a + coef * b, grads.policy, text_grads))
    nll = text_sums.total["loss/ptx"]
    return grads, sums._replace(total=sums.total | {"loss/ptx": nll, "loss": sums.total["loss"] + coef * nll})


def ptx_gradients(
    networks: Networks, params: PPOParams, text: SFTBatch, *, slices: int, frozen: Params | None
) -> tuple[Params, Sums]:
    """The policy's gradient of the text's mean negative log-likelihood, without its coefficient.

    Ouyang et al. 2022, eq. 2, last term.
    """
    tokens = jnp.maximum(jnp.sum(trained_tokens(text), dtype=jnp.float32), 1.0)
    frozen_policy, frozen_value = (None, None) if frozen is None else frozen
    value = combine(params.value, frozen_value)

    def loss_fn(policy: Params, part: SFTBatch) -> tuple[jax.Array, Sums]:
        nll = nll_sum(networks.logprob_fn, PPOParams(policy, value), part) / tokens
        return nll, Sums({"loss/ptx": nll}, {})

    return accumulate_gradients(loss_fn, params.policy, text, slices=slices, frozen=frozen_policy)


def episode_loss(
    networks: Networks, settings: PPOSettings, tokens: Float[Array, ""]
) -> Callable[[PPOParams, Rollout], tuple[jax.Array, Sums]]:
    """The loss of a slice of a minibatch, which has ``tokens`` response tokens in all its slices together."""

    def loss_fn(params: PPOParams, part: Rollout) -> tuple[jax.Array, Sums]:
        mask = part.response_mask
        logprobs, entropy, values = networks.actor_critic_fn(
            params, part.tokens, part.mask, temperature=settings.temperature, where=mask
        )
        if not settings.entropy_coef:
            entropy = jax.lax.stop_gradient(entropy)
        values = align_to_tokens(values.astype(jnp.float32))
        # Masked slots are set to one harmless value before any arithmetic (law 6).
        logprobs, old_logprobs, advantages, values, old_values, returns = (
            jnp.where(mask, x, 0.0) for x in (logprobs, part.logprobs, part.advantages, values, *critic_targets(part))
        )
        clip, value_clip, cap = settings.clip, settings.value_clip, settings.sampler_weight_cap
        per_token = ppo_policy_loss(logprobs, old_logprobs, advantages, clip=clip, dual_clip=settings.dual_clip)
        weighed = Sums({}, {})
        if cap:
            weights, weighed = sampler_weights(old_logprobs, part.sampler_logprobs, mask, cap=cap, tokens=tokens)
            per_token = per_token * weights
        policy = masked_sum(per_token, mask) / tokens
        value = masked_sum(ppo_value_loss(values, old_values, returns, clip=value_clip), mask) / tokens
        mean_entropy = masked_sum(entropy, mask) / tokens
        loss = policy + settings.value_coef * value - settings.entropy_coef * mean_entropy
        total = {
            "loss": loss,
            "loss/policy": policy,
            "loss/value": value,
            "policy/entropy": mean_entropy,
            "value/clipfrac": masked_sum(_is_far(values, old_values, value_clip), mask) / tokens,
        }
        ratio = importance_ratio(logprobs, old_logprobs)
        ratios = ratio_sums(logprobs - old_logprobs, ratio, mask, tokens=tokens, clip=clip, clip_high=clip)
        return loss, merged(Sums(total, {}), ratios, weighed)

    return loss_fn


def critic_targets(rollout: Rollout) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The values and returns of a rollout. ValueError for one without a critic."""
    if rollout.values is None or rollout.returns is None:
        raise ValueError("the rollout has no values and returns, which PPO's value loss needs")
    return rollout.values, rollout.returns


def _is_far(x: Array, centre: Array, distance: float) -> Array:
    return (jnp.abs(x - centre) > distance).astype(jnp.float32)
