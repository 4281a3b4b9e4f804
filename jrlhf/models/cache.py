"""Keys and values in int8: how they are rounded, written, and attended to as they are.

Shape suffixes: B batch, T query tokens, S key slots, K key-value heads, G heads that share one of those, H head
dimension.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8

from jrlhf.models.attention import LOWEST, attend, soft_cap

CacheKind = Literal["compute", "int8"]
"""What keys and values are cached in: the compute dtype, or int8."""

LARGEST = 127
"""Of the rounded numbers; -128 has no counterpart and is left out."""


class Quantised(NamedTuple):
    """x ≈ scale · round(x / scale), with a scale = max|x| / 127 for each row, head and slot.

    Absmax quantisation, vector by vector: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339.
    """

    rounded: Int8[Array, "B K S H"]
    scales: Float[Array, "B K S"]
    """In float32."""


Cached = Float[Array, "B K S H"] | Quantised
"""Keys or values of a layer, as they are or in int8."""


def quantise(x: Float[Array, "B K S H"]) -> Quantised:
    """To the nearest, halves to the even one: no number is off by more than max|x| / 254 of its vector."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    # Zeros have no scale; and by one that is no normal number nothing can be divided.
    steps = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    return Quantised(jnp.round(x / steps[..., None]).astype(jnp.int8), scales)


def append(cached: Cached, new: Float[Array, "B K T H"], used: Int[Array, ""]) -> Cached:
    """``new`` in the slots from ``used`` on, in the form of the others."""
    start = (jnp.int32(0), jnp.int32(0), used, jnp.int32(0))
    added = quantise(new) if isinstance(cached, Quantised) else new
    return jax.tree.map(lambda old, x: lax.dynamic_update_slice(old, x, start[: x.ndim]), cached, added)


def attend_cached(
    q_BKGTH: Float[Array, "B K G T H"],
    keys: Cached,
    values: Cached,
    mask: Bool[Array, "B 1 1 T S"],
    *,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """``attend`` over what is cached.

    Of int8 the scales are taken out of both products, q · (s k) = s (q · k) and Σ w (s v) = Σ (w s) v: they multiply a
    number a slot, and no key or value.
    """
    # XLA on a CPU would convert the cache and what was just written to it as one, and copy it whole to write it later.
    keys, values = lax.optimization_barrier((keys, values))
    if isinstance(keys, Array) and isinstance(values, Array):
        return attend(q_BKGTH, keys, values, mask, cap=cap)
    dtype = q_BKGTH.dtype
    (k_BKSH, k_BKS), (v_BKSH, v_BKS) = keys, values
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH.astype(dtype), preferred_element_type=jnp.float32)
    scores = soft_cap(scores * k_BKS[:, :, None, None], cap)
    weights = jax.nn.softmax(jnp.where(mask, scores, LOWEST), axis=-1) * v_BKS[:, :, None, None]
    mixed = jnp.einsum(
        "BKGTS,BKSH->BKGTH", weights.astype(dtype), v_BKSH.astype(dtype), preferred_element_type=jnp.float32
    )
    return mixed.transpose(0, 3, 1, 2, 4).astype(dtype)
