"""Several epochs of minibatches over one rollout: the order of its rows, and the loop over their updates."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jrlhf.steps.accumulate import Sums, no_sums, select
from jrlhf.steps.packing import packed_layout
from jrlhf.types import Key, Metrics, Params, Rollout, TrainState

M = TypeVar("M", bound=Any)
UpdateFn = Callable[[TrainState, Rollout, Params | None], tuple[TrainState, Sums, Float[Array, ""]]]
"""``(state without frozen parameters, minibatch, frozen parameters) -> (state, sums, 1 where it was skipped)``."""


class Progress(NamedTuple):
    """The carry over minibatches."""

    state: TrainState
    stopped: Bool[Array, ""]
    updates: Int[Array, ""]
    skipped: Float[Array, ""]
    totals: Metrics
    maxima: Metrics


def update_each(
    update: UpdateFn, state: TrainState, batches: Rollout, *, target_approx_kl: float | None
) -> tuple[TrainState, Metrics]:
    """One ``update`` after the other over the minibatches on axis 0, and the mean of what they report.

    ``target_approx_kl``: once a minibatch's ``policy/approxkl`` exceeds it, its update and all later ones are dropped.
    """
    # Out of the loop's carry: what no update moves need not be handed from one to the next.
    frozen, state = state.frozen, state._replace(frozen=None)
    _, shapes, _ = jax.eval_shape(update, state, jax.tree.map(lambda x: x[0], batches), frozen)

    def visit(progress: Progress, minibatch: Rollout) -> tuple[Progress, Metrics]:
        if target_approx_kl is None:
            new_state, sums, skipped = update(progress.state, minibatch, frozen)
            stop = progress.stopped
        else:
            new_state, sums, skipped = jax.lax.cond(
                progress.stopped,
                lambda: (progress.state, no_sums(shapes), jnp.float32(0.0)),
                lambda: update(progress.state, minibatch, frozen),
            )
            # Not `>`: a NaN must stop it too.
            stop = progress.stopped | ~(sums.total["policy/approxkl"] <= target_approx_kl)
            new_state = select(stop, progress.state, new_state)
        # What an update that was not made says of itself is not finite, and no part of any mean.
        counted = ~progress.stopped & (skipped == 0)
        totals = jax.tree.map(lambda a, b: a + jnp.where(counted, b, 0.0), progress.totals, sums.total)
        maxima = jax.tree.map(lambda a, b: jnp.where(counted, jnp.maximum(a, b), a), progress.maxima, sums.maximum)
        updates = progress.updates + jnp.where(counted, 1, 0)
        return Progress(new_state, stop, updates, progress.skipped + skipped, totals, maxima), sums.maximum

    start = Progress(state, jnp.bool_(False), jnp.int32(0), jnp.float32(0.0), *no_sums(shapes))
    end, each = jax.lax.scan(visit, start, batches)
    updates = end.updates.astype(jnp.float32)
    metrics = {name: total / updates for name, total in end.totals.items()} | end.maxima
    metrics["policy/first_minibatch_max_abs_log_ratio"] = each["policy/max_abs_log_ratio"][0]
    metrics["skipped"] = end.skipped
    metrics["policy/updates"] = (end.state.step - state.step).astype(jnp.float32)
    return end.state._replace(frozen=frozen), metrics


def shuffled_minibatches(rollout: Rollout, key: Key, *, epochs: int, minibatches: int) -> Rollout:
    """``[B, ...] -> [epochs · minibatches, B / minibatches, ...]``, a fresh permutation of the rows in every epoch."""

    def shuffle(x: Array, order: Int[Array, "E B"]) -> Array:
        rows = x.shape[0]
        return x[order].reshape(epochs * minibatches, rows // minibatches, *x.shape[1:])

    def permutations(rows: int, key: Key) -> Int[Array, "E B"]:
        if rows % minibatches:
            raise ValueError(f"{rows} rows do not divide into {minibatches} minibatches")
        return jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))

    episode_key, ptx_key = jax.random.split(key)
    order = permutations(rollout.tokens.shape[0], episode_key)
    shuffled = jax.tree.map(lambda x: shuffle(x, order), rollout._replace(ptx=None))
    if rollout.ptx is None:
        return shuffled
    ptx_order = permutations(rollout.ptx.tokens.shape[0], ptx_key)
    return shuffled._replace(ptx=jax.tree.map(lambda x: shuffle(x, ptx_order), rollout.ptx))


def packed_minibatch(episodes: M, *, slices: int) -> tuple[M, Int[Array, ""]]:
    """The arrays ``[B, T]`` of a minibatch packed into fewer rows, and how many of ``slices`` hold any token.

    ``episodes`` is a NamedTuple with a ``mask``, which becomes the numbers of the segments; other shapes stay.
    """
    layout = packed_layout(episodes.mask, slices=slices)
    packed = jax.tree.map(lambda x: layout.pack(x) if x.shape == episodes.mask.shape else x, episodes)
    return packed._replace(mask=layout.segments), layout.used
