"""Log-probs from the last hidden states, computed in slices of columns and only for the requested tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import align_to_tokens, next_token_logprobs

MAX_COLUMN_SLICES = 8
"""Maximum number of column slices when only some positions need logits. More slices waste less computation."""

MIN_SLICE_TOKENS = 256
"""Minimum number of tokens per slice, since each slice adds once to the gradient of the LM head."""


class Columns(NamedTuple):
    """Hidden states and their target tokens; only the columns before ``requested`` are computed."""

    hidden: Float[Array, "B T D"]
    targets: Int[Array, "B T"]
    requested: Int[Array, ""]


def hidden_logprobs(
    unembed: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    columns: int,
    where: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return log-probs and entropy, aligned to ``tokens``, from at most ``columns`` positions of all rows at a time.

    Slices are whole columns, so that rows stay on their devices. Tokens outside the mask ``where`` get 0, and a slice
    without a token of the mask is skipped. With more than ``columns`` positions the backward pass recomputes logits.
    """
    rows, length = tokens.shape
    # The target of position t is token t + 1; the alignment drops the target of the last position.
    targets = jnp.roll(tokens, -1, axis=1)

    def slice_logprobs(hidden: Float[Array, "B C D"], targets: Int[Array, "B C"]) -> tuple[Array, Array]:
        return next_token_logprobs(unembed(hidden), targets, temperature=temperature)

    if where is None:
        slices = -(-length // columns)
        if slices == 1:
            logprobs, entropy = slice_logprobs(hidden, targets)
        else:
            everything = Columns(hidden, targets, jnp.int32(length))
            logprobs, entropy = _in_slices(jax.checkpoint(slice_logprobs), everything, columns=-(-length // slices))
        return align_to_tokens(logprobs), align_to_tokens(entropy)

    requested = jnp.roll(where, -1, axis=1).at[:, -1].set(False)
    order = jnp.argsort(~requested, axis=1, stable=True)
    first = Columns(
        jnp.take_along_axis(hidden, order[:, :, None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
        jnp.max(jnp.sum(requested, axis=1, dtype=jnp.int32)),
    )
    policy = None if length > columns else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    finest = max(-(-length // MAX_COLUMN_SLICES), -(-MIN_SLICE_TOKENS // rows))
    outputs = _in_slices(jax.checkpoint(slice_logprobs, policy=policy), first, columns=min(columns, length, finest))
    inverse = jnp.argsort(order, axis=1)
    logprobs, entropy = (jnp.where(requested, jnp.take_along_axis(x, inverse, axis=1), 0.0) for x in outputs)
    return align_to_tokens(logprobs), align_to_tokens(entropy)


def _in_slices(
    slice_logprobs: Callable[..., tuple[Array, Array]], work: Columns, *, columns: int
) -> tuple[Array, Array]:
    """Apply ``slice_logprobs`` to ``columns`` columns at a time; the result is 0 from ``work.requested`` on."""
    rows, length = work.targets.shape

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -length % columns)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(padded.reshape(rows, -1, columns, *x.shape[2:]), 0, 1)

    def visit(start: Int[Array, ""], piece: tuple[Array, Array]) -> tuple[Int[Array, ""], tuple[Array, Array]]:
        zeros = jnp.zeros((rows, columns), jnp.float32)
        return start + columns, lax.cond(start < work.requested, slice_logprobs, lambda *_: (zeros, zeros), *piece)

    _, outputs = lax.scan(visit, jnp.int32(0), (split(work.hidden), split(work.targets)))
    logprobs, entropy = (jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :length] for x in outputs)
    return logprobs, entropy
