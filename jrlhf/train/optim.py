"""The optimizer and the learning rate schedule of a config."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jrlhf.config import OptimConfig
from jrlhf.models.functions import is_matrix
from jrlhf.types import Params, PPOParams


def make_schedule(config: OptimConfig, *, peak: float, updates: int) -> optax.Schedule:
    """Return a linear warm-up to ``peak``, then a constant rate, or linear or cosine decay to 0 at the last update."""
    warmup = round(config.warmup * updates)
    remaining = max(updates - warmup, 1)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, remaining)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, remaining)
    if warmup == 0:
        return after
    # The rate of the first update is not 0: the ramp ends, not starts, at a whole step.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: OptimConfig, *, updates: int, peak: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return AdamW with clipping by global norm, and its schedule; ``peak`` replaces ``config.lr``."""
    schedule = make_schedule(config, peak=config.lr if peak is None else peak, updates=updates)
    adam = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=is_matrix
    )
    if config.max_grad_norm == 0:
        return adam, schedule
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam), schedule


def make_actor_critic_optimizer(
    config: OptimConfig, *, value_lr: float, updates: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return one optimizer over ``PPOParams``; policy and value have separate learning rates and clipping.

    The two share no weights, so clipping a large gradient of the critic must not shrink the actor's gradient.
    """
    policy, schedule = make_optimizer(config, updates=updates)
    value, _ = make_optimizer(config, updates=updates, peak=value_lr or config.lr)
    halves: dict[Hashable, optax.GradientTransformation] = {"policy": policy, "value": value}
    labels = PPOParams(policy="policy", value="value")
    return optax.chain(optax.multi_transform(halves, labels), _scalable()), schedule


def make_policy_optimizer(config: OptimConfig, *, updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return ``make_optimizer`` with a factor of the learning rate in its state, for a policy without a critic."""
    policy, schedule = make_optimizer(config, updates=updates)
    return optax.chain(policy, _scalable()), schedule


class RateState(NamedTuple):
    """The factor of the learning rate besides the schedule."""

    rate_factor: Float[Array, ""]


def _scalable() -> optax.GradientTransformation:
    """Multiply updates by a factor that is part of the state, so that a rollback can lower it."""

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        del params
        factor = optax.tree.get(state, "rate_factor")
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: RateState(jnp.float32(1.0)), update)


def scale_rate(opt_state: Any, factor: float) -> Any:
    """Return a state of a policy's optimizer with its learning rates multiplied by ``factor``."""
    return optax.tree.set(opt_state, rate_factor=rate_factor(opt_state) * factor)


def rate_factor(opt_state: Any) -> jax.Array:
    """Return the factor of the learning rates in a state of a policy's optimizer."""
    return optax.tree.get(opt_state, "rate_factor")
