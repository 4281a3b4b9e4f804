"""Tokens of a device in slices: the requested ones first, and slices without any skipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

MAX_SLICES = 8
"""Maximum number of slices when only some tokens are requested. More slices waste less computation."""

MIN_SLICE_TOKENS = 256
"""Minimum number of tokens per slice, since each slice adds once to the gradient of the LM head."""

TOKEN_MULTIPLE = 128
"""Multiple of the tokens per slice where there are as many: TPUs and GPUs pad a product to it."""


class Slices(NamedTuple):
    """The order in which tokens are computed, and the slices that they are cut into."""

    tokens: int
    size: int
    """Tokens per slice; the last slice is padded."""
    number: int
    order: Int[Array, "n"] | None
    """Index of each token, the requested ones first; None: all are requested and stay in their own order."""
    requested: Int[Array, ""]
    """Number of requested tokens."""

    def split(self, x: Array) -> Array:
        """Cut an array of tokens, ``[n, ...]``, into ``[number, size, ...]``."""
        x = x if self.order is None else x[self.order]
        padded = jnp.pad(x, ((0, self.size * self.number - self.tokens),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(self.number, self.size, *x.shape[1:])

    def joined(self, x: Array) -> Array:
        """Undo ``split``."""
        x = x.reshape(-1, *x.shape[2:])[: self.tokens]
        return x if self.order is None else x[jnp.argsort(self.order)]

    def apply(self, start: Array, compute: Callable[..., Any], skip: Callable[..., Any], *args: Any) -> Any:
        """Return ``compute(*args)``, or ``skip(*args)`` if the slice at token ``start`` holds no requested token."""
        if self.order is None:
            return compute(*args)
        return lax.cond(start < self.requested, compute, skip, *args)


def token_slices(tokens: int, requested: Bool[Array, "n"] | None, *, most: int) -> Slices:
    """Return slices of at most ``most`` tokens; ``requested`` None stands for all."""
    if requested is not None:
        most = min(most, max(-(-tokens // MAX_SLICES), MIN_SLICE_TOKENS))
    size = -(-tokens // -(-tokens // most))
    if size < tokens and most >= TOKEN_MULTIPLE:
        size = min(-(-size // TOKEN_MULTIPLE), most // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    order = None if requested is None else jnp.argsort(~requested, stable=True).astype(jnp.int32)
    total = jnp.int32(tokens) if requested is None else jnp.sum(requested, dtype=jnp.int32)
    return Slices(tokens, size, -(-tokens // size), order, total)
