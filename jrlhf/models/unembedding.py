"""Log-probs from the last hidden states: a slice of columns at a time, and only of the tokens that are wanted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import align_to_tokens, next_token_logprobs

PARTS = 8
"""In so many slices columns are read at most where only some are wanted: the finer, the less is computed in vain."""

TOKENS = 256
"""A slice has at least so many tokens: the gradient of the LM head is added up once a slice."""


class Columns(NamedTuple):
    """Hidden states and the token that each is asked about, column by column; from ``asked`` on nothing is."""

    hidden: Float[Array, "B T D"]
    targets: Int[Array, "B T"]
    asked: Int[Array, ""]


def hidden_logprobs(
    unembed: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    columns: int,
    wanted: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs and entropy, aligned to ``tokens``, of at most ``columns`` positions of all rows at a time.

    Slices are whole columns, so that rows stay on the devices they are on. ``wanted``: the others are 0, and a slice
    with none of those is left out. Once all logits are more than ``columns``, the backward pass makes them again.
    """
    rows, length = tokens.shape
    # Position t is asked about token t + 1; what the last position is asked about, the alignment drops.
    targets = jnp.roll(tokens, -1, axis=1)

    def of_slice(hidden: Float[Array, "B C D"], targets: Int[Array, "B C"]) -> tuple[Array, Array]:
        return next_token_logprobs(unembed(hidden), targets, temperature=temperature)

    if wanted is None:
        slices = -(-length // columns)
        if slices == 1:
            logprobs, entropy = of_slice(hidden, targets)
        else:
            everything = Columns(hidden, targets, jnp.int32(length))
            logprobs, entropy = _in_slices(jax.checkpoint(of_slice), everything, columns=-(-length // slices))
        return align_to_tokens(logprobs), align_to_tokens(entropy)

    asked = jnp.roll(wanted, -1, axis=1).at[:, -1].set(False)
    order = jnp.argsort(~asked, axis=1, stable=True)
    first = Columns(
        jnp.take_along_axis(hidden, order[:, :, None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
        jnp.max(jnp.sum(asked, axis=1, dtype=jnp.int32)),
    )
    kept = None if length > columns else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    finest = max(-(-length // PARTS), -(-TOKENS // rows))
    found = _in_slices(jax.checkpoint(of_slice, policy=kept), first, columns=min(columns, length, finest))
    back = jnp.argsort(order, axis=1)
    logprobs, entropy = (jnp.where(asked, jnp.take_along_axis(x, back, axis=1), 0.0) for x in found)
    return align_to_tokens(logprobs), align_to_tokens(entropy)


def _in_slices(of_slice: Callable[..., tuple[Array, Array]], given: Columns, *, columns: int) -> tuple[Array, Array]:
    """``of_slice`` over so many columns at a time, 0 from ``given.asked`` on."""
    rows, length = given.targets.shape

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -length % columns)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(padded.reshape(rows, -1, columns, *x.shape[2:]), 0, 1)

    def visit(start: Int[Array, ""], part: tuple[Array, Array]) -> tuple[Int[Array, ""], tuple[Array, Array]]:
        nothing = jnp.zeros((rows, columns), jnp.float32)
        return start + columns, lax.cond(start < given.asked, of_slice, lambda *_: (nothing, nothing), *part)

    _, found = lax.scan(visit, jnp.int32(0), (split(given.hidden), split(given.targets)))
    logprobs, entropy = (jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :length] for x in found)
    return logprobs, entropy
