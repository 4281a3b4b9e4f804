"""Gradients of a batch in equal slices: a bigger batch, not a different loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import combine
from jrlhf.types import Metrics, Params, TrainState


class Sums(NamedTuple):
    """The figures of one slice. ``total`` is already divided by the count of the *whole* batch, so slices add up.

    A figure may also be an array with one place for each row of the whole batch, 0 where the row is not in the slice.
    """

    total: Metrics
    maximum: Metrics


LossFn = Callable[[Params, Any], tuple[jax.Array, Sums]]


def split_rows(batch: Any, parts: int) -> Any:
    """``[B, ...] -> [parts, B / parts, ...]`` on every leaf; slice p holds rows p, p + parts, ... of the batch.

    Strided, so that with rows laid out over devices in blocks every slice still spans all devices.
    """

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows do not divide into {parts} equal parts")
        return jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def no_sums(shapes: Sums) -> Sums:
    """The neutral element of adding slices up: zeros and -inf in the given shapes."""
    return Sums(
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.total),
        jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), shapes.maximum),
    )


def accumulate_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    slices: int,
    frozen: Params | None,
    used: Int[Array, ""] | None = None,
) -> tuple[Params, Sums]:
    """Σ over slices of ∇ loss_fn(params, slice), and of what it reports; ``frozen`` completes ``params``.

    ``loss_fn`` returns Σ loss / N over its slice, N being the count of the whole batch: then N, and with it the loss,
    is the same for any number of slices, any padding and any sharding. Only the first ``used`` slices are computed.
    """
    # Jitted, so that it is traced once for its shapes and for the loop.
    gradient = jax.jit(jax.value_and_grad(lambda trained, part: loss_fn(combine(trained, frozen), part), has_aux=True))
    if slices == 1:
        (_, sums), grads = gradient(params, batch)
        return grads, sums
    parts = split_rows(batch, slices)

    def add(number: Int[Array, ""], carry: tuple[Params, Sums]) -> tuple[Params, Sums]:
        grads, sums = carry
        (_, new), new_grads = gradient(params, jax.tree.map(lambda x: x[number], parts))
        grads, total = jax.tree.map(jnp.add, (grads, sums.total), (new_grads, new.total))
        return grads, Sums(total, jax.tree.map(jnp.maximum, sums.maximum, new.maximum))

    (_, sums), grads = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), grads), no_sums(sums)
    # The first slice too goes through the loop: outside of it, its program would be compiled a second time.
    return jax.lax.fori_loop(0, slices if used is None else used, add, start)


def sum_slices(read: Callable[[Any], Any], batch: Any, *, slices: int) -> Any:
    """Σ over slices of ``read(slice)``, as ``accumulate_gradients`` cuts them, without a gradient."""
    if slices == 1:
        return read(batch)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(read, split_rows(batch, slices)))


def apply_gradients(
    tx: optax.GradientTransformation, state: TrainState, grads: Params, loss: jax.Array
) -> tuple[TrainState, Metrics]:
    """One optimizer update, and ``{"grad_norm", "skipped"}``.

    Where the loss, or the gradient's norm, is not finite, nothing moves, neither parameters nor optimizer nor ``step``,
    and ``skipped`` is 1. Frozen parameters pass through untouched.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    # Frozen parameters take no part in the choice between old and new: it would copy them.
    trained = state._replace(frozen=None)
    # Optax raises Python floats to integer counts, which strict promotion, where the caller has set it, would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    updated = trained._replace(params=params, opt_state=opt_state, step=state.step + 1)
    new_state = select(finite, updated, trained)._replace(frozen=state.frozen)
    return new_state, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}


def moving_average(average: Params, params: Params, *, decay: float, skipped: Float[Array, ""]) -> Params:
    """The exponential moving average after an update, or as it was where the update was ``skipped``."""
    return select(skipped > 0, average, optax.incremental_update(params, average, 1.0 - decay))


def select(condition: Bool[Array, ""], when_true: Any, when_false: Any) -> Any:
    """``jnp.where`` on every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), when_true, when_false)
