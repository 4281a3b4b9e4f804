"""Attention: what each query sees, and the weighted mean of that, with a gradient of its own.

Shape suffixes: B batch, T query tokens, S key slots, N heads, K key-value heads, G heads that share one of those, H
head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

QUERIES, MOST_BLOCKS = 128, 8
"""Queries a block of attention has at least, and blocks at most: of long sequences nearly half is never computed."""

KEPT = "attention"
"""What a rematerialising caller may keep by this name (``jax.checkpoint_policies.save_only_these_names``): with it the
backward pass need not attend again."""

LOWEST = jnp.finfo(jnp.float32).min
"""Where nothing is seen. Not -inf: a query that sees nothing averages everything and stays finite."""

AttentionKernel = Literal["xla", "cudnn", "splash"]
"""What computes attention where nothing is cached: XLA's own operations, cuDNN's fused ones on a GPU, or JAX's Pallas
kernel on a TPU, for which see ``models.splash``."""


def attention_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, window: int, segments: Int[Array, "B T"] | None
) -> Bool[Array, "B 1 1 T S"]:
    """A query attends to real tokens at its own position or before, with a ``window`` to the last so many (0: to all).

    Positions decide, so padding may stand anywhere: ``queries = keys = [-1, 0, 1]`` (left padding) gives
    ``[[0,0,0], [0,1,0], [0,1,1]]``: padding sees nothing. With ``window`` 1 a token sees itself alone. With
    ``segments`` (of queries and keys alike) it sees only its own: ``[1, 1, 2]`` gives ``[[1,0,0], [1,1,0], [0,0,1]]``.
    """
    allowed = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
    if window:
        allowed &= keys[:, None, :] > queries[:, :, None] - window
    if segments is not None:
        allowed &= segments[:, None, :] == segments[:, :, None]
    return allowed[:, None, None]


def soft_cap(x: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
    """cap · tanh(x / cap), which keeps x within ±cap; None leaves it. Team Gemma 2024, arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 1 T S"],
    *,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B T N H"]:
    """``jax.nn.dot_product_attention`` of scaled queries over whole sequences, in whose order positions rise.

    It raises where the implementation cannot take the shapes or dtype, or is not there: nothing falls back in silence.
    """
    # A query that sees nothing would leave NaN behind, and its gradient with it: it sees everything up to itself.
    mask = (mask | ~jnp.any(mask, axis=-1, keepdims=True))[:, :, 0]
    # Causal is said besides: half of the square need not be looked at.
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, is_causal=True, implementation=implementation)


def attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Bool[Array, "B 1 1 T S"],
    *,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """softmax(q · kᵀ) · v of scaled queries over the keys that each may see."""

    def mean(q: Array) -> Array:
        return _mean(q, k_BKSH, v_BKSH, mask, cap)[0]

    groups, queries = q_BKGTH.shape[2:4]
    if groups * queries > 1 or q_BKGTH.dtype == jnp.float32:
        return _by_token(mean(q_BKGTH))
    return _by_token(lax.platform_dependent(q_BKGTH, cpu=partial(_of_two, mean), default=mean))


def _of_two(mean: Callable[[Array], Array], q: Float[Array, "B K 1 1 H"]) -> Float[Array, "B K 1 1 H"]:
    """``mean`` of a query and its copy: of one alone XLA on a CPU first writes all keys and values in float32."""
    twice = lax.optimization_barrier(jnp.broadcast_to(q, (*q.shape[:2], 2, *q.shape[3:])))
    return mean(twice)[:, :, :1]


def causal_attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    mask: Bool[Array, "B 1 1 T T"],
    *,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """``attend`` within sequences in whose order positions rise: no block of queries looks at keys behind its last.

    The gradient is that of Dao et al. 2022, "FlashAttention", appendix B.2: weights are made again from the logarithm
    of their sum, and lie key by key, so that no product has to turn a square around. None comes back from a query that
    sees nothing.
    """
    return _by_token(_causal(q_BKGTH, k_BKTH, v_BKTH, mask, cap))


def _by_token(x_BKGTH: Float[Array, "B K G T H"]) -> Float[Array, "B T K G H"]:
    return jnp.transpose(x_BKGTH, (0, 3, 1, 2, 4))


def _mean(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, Array]:
    """The weighted mean ``BKGTH``, and log Σ exp(scores) ``BKGT``, in float32 as the scores are."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, soft_cap(scores, cap), LOWEST)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided by the total last: that is H numbers a query, not S.
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return mixed.astype(q.dtype), (highest + jnp.log(total))[..., 0]


def _blocks(length: int) -> list[slice]:
    size = max(QUERIES, -(-length // MOST_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _in_blocks(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, Array]:
    found = [
        _mean(q[..., at, :], k[:, :, : at.stop], v[:, :, : at.stop], mask[..., at, : at.stop], cap)
        for at in _blocks(q.shape[3])
    ]
    mixed, logs = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
    return mixed, logs


def _only_mean(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> Array:
    return _in_blocks(q, k, v, mask, cap)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, tuple[Array, ...]]:
    mixed, logs = (checkpoint_name(x, KEPT) for x in _in_blocks(q, k, v, mask, cap))
    return mixed, (q, k, v, mask, mixed, logs)


def _backward(cap: float | None, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, mixed, logs = saved
    # Made once, and not again inside every product that reads them.
    q, k, v, gradient = lax.optimization_barrier((q, k, v, gradient.astype(q.dtype)))
    # Σ_s weight · ∂weight of each query, which is what softmax's gradient takes away.
    taken = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    d_q, (d_k, d_v) = [], (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for at in _blocks(q.shape[3]):
        seen = at.stop
        d_queries, d_keys, d_values = _block_gradient(
            q[..., at, :], k[:, :, :seen], v[:, :, :seen], mask[..., at, :seen],
            logs[..., at], taken[..., at], gradient[..., at, :], cap,
        )  # fmt: skip
        d_q.append(d_queries)
        d_k, d_v = d_k.at[:, :, :seen].add(d_keys), d_v.at[:, :, :seen].add(d_values)
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _block_gradient(
    q: Array, k: Array, v: Array, mask: Array, logs: Array, taken: Array, gradient: Array, cap: float | None
) -> tuple[Array, Array, Array]:
    """Of queries, keys and values; all squares are ``BKSGT``."""
    scores = soft_cap(jnp.einsum("BKSH,BKGTH->BKSGT", k, q, preferred_element_type=jnp.float32), cap)
    weights = jnp.where(jnp.swapaxes(mask[:, :, 0], 2, 3)[:, :, :, None], jnp.exp(scores - logs[:, :, None]), 0.0)
    d_weights = jnp.einsum("BKSH,BKGTH->BKSGT", v, gradient, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - taken[:, :, None])
    if cap is not None:
        d_scores = d_scores * (1.0 - jnp.square(scores / cap))
    weights, d_scores = lax.optimization_barrier((weights.astype(q.dtype), d_scores.astype(q.dtype)))
    return (
        jnp.einsum("BKSGT,BKSH->BKGTH", d_scores, k, preferred_element_type=q.dtype),
        jnp.einsum("BKSGT,BKGTH->BKSH", d_scores, q, preferred_element_type=jnp.float32),
        jnp.einsum("BKSGT,BKGTH->BKSH", weights, gradient, preferred_element_type=jnp.float32),
    )


_causal: Any = jax.custom_vjp(_only_mean, nondiff_argnums=(4,))
_causal.defvjp(_forward, _backward)
