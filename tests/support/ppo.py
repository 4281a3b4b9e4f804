"""PPO's loss written from its formulas, and the step that is held against it."""

import functools

import jax
import jax.numpy as jnp
import optax

from jrlhf.core import from_logits
from jrlhf.steps import make_ppo_step, separate
from jrlhf.types import PPOParams
from tests.support.batches import jit, new_state, ppo_settings


def reference_loss(model, params, rollout, *, clip=0.2, dual_clip=None, entropy_coef=0.0, temperature=0.7):
    """Every response token for itself, from the formulas. Returns the loss and its parts."""
    logp = jax.nn.log_softmax(model.apply_fn(params.policy, rollout.tokens, rollout.mask) / temperature)
    scalars = model.score_fn(params.value, rollout.tokens, rollout.mask)
    mask = rollout.response_mask[:, 1:]
    mean = lambda x: jnp.sum(jnp.where(mask, x, 0.0)) / jnp.sum(mask, dtype=jnp.float32)  # noqa: E731
    new = jnp.take_along_axis(logp[:, :-1], rollout.tokens[:, 1:, None], axis=-1)[:, :, 0]
    old, advantage = rollout.logprobs[:, 1:], rollout.advantages[:, 1:]
    ratio = jnp.exp(new - old)
    bounded = jnp.where(ratio > 1 + clip, 1 + clip, jnp.where(ratio < 1 - clip, 1 - clip, ratio))
    gain = jnp.minimum(advantage * ratio, advantage * bounded)
    if dual_clip is not None:
        gain = jnp.where(advantage < 0, jnp.maximum(gain, advantage * dual_clip), gain)
    value, old_value, target = scalars[:, :-1], rollout.values[:, 1:], rollout.returns[:, 1:]
    near = old_value + jnp.clip(value - old_value, -0.2, 0.2)
    value_loss = 0.5 * mean(jnp.maximum((value - target) ** 2, (near - target) ** 2))
    entropy = -mean(jnp.sum(jnp.exp(logp) * logp, axis=-1)[:, :-1])
    parts = {
        "loss/policy": -mean(gain),
        "loss/value": value_loss,
        "policy/entropy": entropy,
        "policy/approxkl": mean((new - old) ** 2) / 2,
        "policy/clipfrac": mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32)),
        "policy/ratio_mean": mean(ratio),
        "policy/ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "policy/max_abs_log_ratio": jnp.max(jnp.where(mask, jnp.abs(new - old), 0.0)),
        "value/clipfrac": mean((jnp.abs(value - old_value) > 0.2).astype(jnp.float32)),
    }
    loss = parts["loss/policy"] + 0.1 * value_loss - entropy_coef * entropy
    return loss, parts | {"loss": loss}


def start(model, tx=None, ema=None):
    return new_state(PPOParams(model.params, model.value_params), tx or optax.sgd(1.0), ema)


def ppo_step(model, tx=None, **changes):
    """Gradient descent with rate 1 where no ``tx`` is given: compiled once for all tests that ask for the same."""
    if tx is None:
        return _descent_step(model.apply_fn, model.score_fn, tuple(sorted(changes.items())))
    networks = separate(from_logits(model.apply_fn), model.score_fn)
    return jit(make_ppo_step(networks, tx, ppo_settings(**changes)))


@functools.cache
def _descent_step(apply_fn, score_fn, changes):
    networks = separate(from_logits(apply_fn), score_fn)
    return jit(make_ppo_step(networks, optax.sgd(1.0), ppo_settings(**dict(changes))))
