"""Cached keys and values in the compute dtype or in int8: quantisation, appending, and attention over them.

Shape suffixes: B batch, T query tokens, S key slots, K key-value heads, G heads that share one of those, H head
dimension.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8

from jrlhf.models.attention import MASKED_SCORE, attend, soft_cap
from jrlhf.parallel.platforms import barrier_on_cpu

CacheKind = Literal["compute", "int8"]
"""Type of cached keys and values: the compute dtype or int8."""

MAX_INT8 = 127
"""Largest absolute value of quantised numbers; -128 is unused because it has no positive counterpart."""


class Quantised(NamedTuple):
    """x ≈ scale · round(x / scale), with a scale = max|x| / 127 for each row, head and slot.

    Absmax quantisation, vector by vector: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339.
    """

    values: Int8[Array, "B K S H"]
    scales: Float[Array, "B K S"]
    """Scale of each vector, in float32."""


CachedArray = Float[Array, "B K S H"] | Quantised
"""Cached keys or values of a layer, in the compute dtype or in int8."""


def quantise(x: Float[Array, "B K S H"]) -> Quantised:
    """Round each vector to int8, halves to even; the error of a number is at most max|x| / 254 of its vector."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / MAX_INT8
    # Division by a zero or subnormal scale would give NaN or infinity.
    steps = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    return Quantised(jnp.round(x / steps[..., None]).astype(jnp.int8), scales)


def append_entries(cached: CachedArray, new: Float[Array, "B K T H"], used: Int[Array, ""]) -> CachedArray:
    """Write ``new`` to the slots from ``used`` on, in int8 if the cache is."""
    start = (jnp.int32(0), jnp.int32(0), used, jnp.int32(0))
    entry = quantise(new) if isinstance(cached, Quantised) else new
    return jax.tree.map(lambda old, x: lax.dynamic_update_slice(old, x, start[: x.ndim]), cached, entry)


def insert_entries(
    cached: CachedArray,
    rows: Int[Array, "R"],
    prefilled: Float[Array, "R K P H"] | Quantised,
    next_slot: Int[Array, ""],
) -> CachedArray:
    """Replace rows of a ring whose next slot is ``next_slot`` by rows with their slots just before it."""

    def insert(old: Array, new: Array) -> Array:
        beyond = ((0, 0), (0, 0), (old.shape[2] - new.shape[2], 0)) + ((0, 0),) * (old.ndim - 3)
        return old.at[rows].set(jnp.roll(jnp.pad(new, beyond), next_slot, axis=2), mode="drop")

    return jax.tree.map(insert, cached, prefilled)


def attend_cached(
    q_BKGTH: Float[Array, "B K G T H"],
    keys: CachedArray,
    values: CachedArray,
    mask: Bool[Array, "B 1 1 T S"],
    *,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """Attend over cached keys and values.

    For int8 the scales are factored out of both products, q · (s k) = s (q · k) and Σ w (s v) = Σ (w s) v, so they
    multiply one number per slot instead of every key and value.
    """
    # XLA for CPU would merge conversion and update, and copy the whole cache.
    keys, values = barrier_on_cpu((keys, values))
    if isinstance(keys, Array) and isinstance(values, Array):
        return attend(q_BKGTH, keys, values, mask, cap=cap)
    dtype = q_BKGTH.dtype
    (k_BKSH, k_BKS), (v_BKSH, v_BKS) = keys, values
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH.astype(dtype), preferred_element_type=jnp.float32)
    scores = soft_cap(scores * k_BKS[:, :, None, None], cap)
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE), axis=-1) * v_BKS[:, :, None, None]
    mixed = jnp.einsum(
        "BKGTS,BKSH->BKGTH", weights.astype(dtype), v_BKSH.astype(dtype), preferred_element_type=jnp.float32
    )
    return mixed.transpose(0, 3, 1, 2, 4).astype(dtype)
