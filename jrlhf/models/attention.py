"""Attention masks and attention, with a custom gradient.

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

from jrlhf.parallel.platforms import barrier_on_cpu

MIN_BLOCK_QUERIES, MAX_BLOCKS = 128, 8
"""Minimum number of queries per block and maximum number of blocks.

Blocks skip the keys after their last query, which saves almost half of the work on long sequences.
"""

CHECKPOINT_NAME = "attention"
"""Name of the saved outputs for ``jax.checkpoint_policies.save_only_these_names``.

A caller that rematerialises can save them, so that the backward pass does not recompute attention.
"""

MASKED_SCORE = jnp.finfo(jnp.float32).min
"""Score of masked keys. It is not -inf, so that a query that attends to nothing gets a finite mean of all values."""

AttentionKernel = Literal["auto", "xla", "cudnn", "splash"]
"""Implementation of attention without a cache: plain XLA, cuDNN's fused kernel on a GPU, or splash on a TPU.

"auto" is the fastest that the platform and the architecture support; see ``models.kernels``.

``models.splash`` describes the TPU kernel.
"""


def attention_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, window: int, segments: Int[Array, "B T"] | None
) -> Bool[Array, "B 1 1 T S"]:
    """Return a mask that lets a query attend to real tokens at its own position or before.

    ``window`` limits it to the last ``window`` tokens (0: no limit). Only positions count, so padding may stand
    anywhere: ``queries = keys = [-1, 0, 1]`` (left padding) gives ``[[0,0,0], [0,1,0], [0,1,1]]``. With ``window`` 1 a
    token attends to itself alone. With ``segments``, which hold for queries and keys, it attends within its segment:
    ``[1, 1, 2]`` gives ``[[1,0,0], [1,1,0], [0,0,1]]``.
    """
    allowed = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
    if window:
        allowed &= keys[:, None, :] > queries[:, :, None] - window
    if segments is not None:
        allowed &= segments[:, None, :] == segments[:, :, None]
    return allowed[:, None, None]


def soft_cap(x: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
    """Return cap · tanh(x / cap), within ±cap, or x for None. Team Gemma 2024, arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 1 T S"],
    *,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B T N H"]:
    """Apply ``jax.nn.dot_product_attention`` to scaled queries over whole sequences with increasing positions.

    It raises if the implementation is missing or does not support the shapes or dtype; there is no silent fallback.
    """
    # cuDNN has no gradient with a mask for rows of odd length: one slot of padding makes them even.
    length, odd = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, odd), (0, odd)))
    # A query that attends to nothing would give NaN, also in gradients, so it attends to all keys up to itself.
    mask = (mask | ~jnp.any(mask, axis=-1, keepdims=True))[:, :, 0]
    # The mask is causal already; saying so lets the kernel skip half of the square.
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, is_causal=True, implementation=implementation)
    return mixed[:, :length]


def attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Bool[Array, "B 1 1 T S"],
    *,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """Return softmax(q · kᵀ) · v for scaled queries over the keys that ``mask`` allows."""

    def mean(q: Array) -> Array:
        return _mean(q, k_BKSH, v_BKSH, mask, cap)[0]

    groups, queries = q_BKGTH.shape[2:4]
    if groups * queries > 1 or q_BKGTH.dtype == jnp.float32:
        return _by_token(mean(q_BKGTH))
    return _by_token(lax.platform_dependent(q_BKGTH, cpu=partial(_mean_of_pair, mean), default=mean))


def _mean_of_pair(mean: Callable[[Array], Array], q: Float[Array, "B K 1 1 H"]) -> Float[Array, "B K 1 1 H"]:
    """Apply ``mean`` to a query and its copy; for one query XLA on a CPU converts all keys and values to float32."""
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
    """Attend within sequences with increasing positions; a block of queries skips the keys after its last query.

    The gradient follows Dao et al. 2022, "FlashAttention", appendix B.2: it recomputes weights from the saved log-sum,
    stored key by key so that no product transposes a square. A query that attends to nothing has zero gradient.
    """
    return _by_token(_causal(q_BKGTH, k_BKTH, v_BKTH, mask, cap))


def _by_token(x_BKGTH: Float[Array, "B K G T H"]) -> Float[Array, "B T K G H"]:
    return jnp.transpose(x_BKGTH, (0, 3, 1, 2, 4))


def _mean(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, Array]:
    """Return the weighted mean ``BKGTH`` and log Σ exp(scores) ``BKGT``; scores and logs are float32."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, soft_cap(scores, cap), MASKED_SCORE)
    max_score = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - max_score)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Dividing by the total at the end takes H divisions per query instead of S.
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return mixed.astype(q.dtype), (max_score + jnp.log(total))[..., 0]


def _blocks(length: int) -> list[slice]:
    size = max(MIN_BLOCK_QUERIES, -(-length // MAX_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _in_blocks(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, Array]:
    outputs = [
        _mean(q[..., block, :], k[:, :, : block.stop], v[:, :, : block.stop], mask[..., block, : block.stop], cap)
        for block in _blocks(q.shape[3])
    ]
    mixed, logs = (jnp.concatenate(parts, axis=3) for parts in zip(*outputs, strict=True))
    return mixed, logs


def _primal(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> Array:
    return _in_blocks(q, k, v, mask, cap)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> tuple[Array, tuple[Array, ...]]:
    mixed, logs = (checkpoint_name(x, CHECKPOINT_NAME) for x in _in_blocks(q, k, v, mask, cap))
    return mixed, (q, k, v, mask, mixed, logs)


def _backward(cap: float | None, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, mixed, logs = saved
    # XLA for CPU would compute these again inside every product that reads them.
    q, k, v, gradient = barrier_on_cpu((q, k, v, gradient.astype(q.dtype)))
    # Softmax's gradient subtracts Σ_s weight · ∂weight of each query.
    correction = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    d_q, (d_k, d_v) = [], (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for block in _blocks(q.shape[3]):
        stop = block.stop
        d_queries, d_keys, d_values = _block_gradient(
            q[..., block, :], k[:, :, :stop], v[:, :, :stop], mask[..., block, :stop],
            logs[..., block], correction[..., block], gradient[..., block, :], cap,
        )  # fmt: skip
        d_q.append(d_queries)
        d_k, d_v = d_k.at[:, :, :stop].add(d_keys), d_v.at[:, :, :stop].add(d_values)
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _block_gradient(
    q: Array, k: Array, v: Array, mask: Array, logs: Array, correction: Array, gradient: Array, cap: float | None
) -> tuple[Array, Array, Array]:
    """Return the gradients of a block's queries, keys and values; all squares are ``BKSGT``."""
    scores = soft_cap(jnp.einsum("BKSH,BKGTH->BKSGT", k, q, preferred_element_type=jnp.float32), cap)
    weights = jnp.where(jnp.swapaxes(mask[:, :, 0], 2, 3)[:, :, :, None], jnp.exp(scores - logs[:, :, None]), 0.0)
    d_weights = jnp.einsum("BKSH,BKGTH->BKSGT", v, gradient, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - correction[:, :, None])
    if cap is not None:
        d_scores = d_scores * (1.0 - jnp.square(scores / cap))
    weights, d_scores = barrier_on_cpu((weights.astype(q.dtype), d_scores.astype(q.dtype)))
    return (
        jnp.einsum("BKSGT,BKSH->BKGTH", d_scores, k, preferred_element_type=q.dtype),
        jnp.einsum("BKSGT,BKGTH->BKSH", d_scores, q, preferred_element_type=jnp.float32),
        jnp.einsum("BKSGT,BKGTH->BKSH", weights, gradient, preferred_element_type=jnp.float32),
    )


_causal: Any = jax.custom_vjp(_primal, nondiff_argnums=(4,))
_causal.defvjp(_forward, _backward)
