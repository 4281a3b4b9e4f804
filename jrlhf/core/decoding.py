"""Decoding for a model that has no cache of its own."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.types import ApplyFn, DecodeFns, Params


class UncachedTokens(NamedTuple):
    """All tokens so far, instead of keys and values."""

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    used: Int[Array, ""]


def uncached_decode_fns(apply_fn: ApplyFn) -> DecodeFns:
    """Decoding for a model without a cache: every step is a full forward over the tokens so far.

    Simple and slow: as many forwards as tokens. A model with a cache of its own brings its own ``DecodeFns``.
    """

    def init_cache(batch: int, length: int, /) -> UncachedTokens:
        empty = (batch, length)
        return UncachedTokens(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, jnp.bool_), jnp.zeros((), jnp.int32))

    def decode(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: UncachedTokens, /
    ) -> tuple[Float[Array, "B V"], UncachedTokens]:
        slot = (jnp.int32(0), cache.used)
        written = lax.dynamic_update_slice(cache.tokens, tokens.astype(jnp.int32), slot)
        mask = lax.dynamic_update_slice(cache.mask, positions >= 0, slot)
        used = cache.used + jnp.int32(tokens.shape[1])
        logits = lax.dynamic_index_in_dim(apply_fn(params, written, mask), used - 1, axis=1, keepdims=False)
        return logits, UncachedTokens(written, mask, used)

    return DecodeFns(init_cache, decode)
