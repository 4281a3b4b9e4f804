"""The optimizer that a config asks for."""

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
    """Linear warm-up to ``peak``, then constant, or linear or cosine decay to 0 at the last of ``updates``."""
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
    # The first update already moves: the ramp ends, not starts, at a whole step.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: OptimConfig, *, updates: int, peak: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping by global norm, and its schedule; ``peak`` stands in for ``config.lr``."""
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
    """One optimizer over ``PPOParams``, each half with its own learning rate and its own clipping.

    They share no weights, so a critic's large gradient must not shrink the actor's.
    """
    policy, schedule = make_optimizer(config, updates=updates)
    value, _ = make_optimizer(config, updates=updates, peak=value_lr or config.lr)
    halves: dict[Hashable, optax.GradientTransformation] = {"policy": policy, "value": value}
    labels = PPOParams(policy="policy", value="value")
    return optax.chain(optax.multi_transform(halves, labels), _scalable()), schedule


class RateState(NamedTuple):
    """What every update is multiplied by, besides the schedule."""

    rate_factor: Float[Array, ""]


def _scalable() -> optax.GradientTransformation:
    """A factor of the learning rate that is state: a run that goes back takes a lower one with it."""

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        del params
        factor = optax.tree.get(state, "rate_factor")
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: RateState(jnp.float32(1.0)), update)


def scale_rate(opt_state: Any, factor: float) -> Any:
    """``make_actor_critic_optimizer``'s state with its learning rates multiplied."""
    return optax.tree.set(opt_state, rate_factor=rate_factor(opt_state) * factor)


def rate_factor(opt_state: Any) -> jax.Array:
    """What the learning rates of ``make_actor_critic_optimizer`` are multiplied by."""
    return optax.tree.get(opt_state, "rate_factor")
