"""Model FLOPs and bytes: what a decoder's arithmetic takes, whatever a program makes of it.

A multiply-add counts 2. Norms, rotations, activations and softmax are left out, as is recomputation. An attention score
counts only where the query may see the key, so causal attention takes half of the square.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.arch import ArchConfig
from jrlhf.models.cache import CacheKind


def body_weights(arch: ArchConfig) -> int:
    """Weights of the matrices that every token is multiplied by, LM head left out."""
    attention = 2 * arch.hidden_size * arch.head_dim * (arch.num_heads + arch.num_kv_heads)
    mlp = (3 if arch.gated_mlp else 2) * arch.hidden_size * arch.intermediate_size
    return arch.num_layers * (attention + mlp)


def head_weights(arch: ArchConfig) -> int:
    """Weights of the LM head."""
    return arch.vocab_size * arch.hidden_size


def seen_keys(arch: ArchConfig, positions: Int[Array | np.ndarray, "*S"]) -> Float[Array, ""]:
    """Keys that queries at ``positions`` (negative: padding) see, themselves included; over queries and layers."""
    before = jnp.maximum(jnp.asarray(positions, jnp.int32) + 1, 0)
    total = jnp.float32(0.0)
    for kind, attention in enumerate(arch.attention_kinds):
        seen = jnp.minimum(before, attention.window) if attention.window else before
        total += arch.layer_kinds.count(kind) * jnp.sum(seen, dtype=jnp.float32)
    return total


def forward_flops(arch: ArchConfig, positions: Int[Array | np.ndarray, "*S"], *, logits: Any) -> Float[Array, ""]:
    """FLOPs of a forward pass over tokens at ``positions`` (negative: padding), ``logits`` of which get logits.

    The backward pass takes twice as much; once as much where the weights are frozen.
    """
    tokens = jnp.sum(jnp.asarray(positions) >= 0, dtype=jnp.float32)
    attention = 4.0 * arch.num_heads * arch.head_dim * seen_keys(arch, positions)
    heads = 2.0 * head_weights(arch) * jnp.asarray(logits, jnp.float32)
    return 2.0 * body_weights(arch) * tokens + heads + attention


def decode_bytes(
    arch: ArchConfig,
    positions: Int[Array | np.ndarray, "*S"],
    *,
    steps: Any,
    itemsize: int,
    kv_cache: CacheKind,
) -> Float[Array, ""]:
    """Bytes that ``steps`` steps of decoding read: all weights each, and the cached keys and values of the tokens fed.

    ``positions``: of the tokens that were fed, a row at a time or all at once (negative: padding). ``itemsize``: of a
    weight, and of a cached number where that is not in int8.
    """
    # A float: from 2³¹ weights on, the whole number would not fit an int32.
    weights = float(body_weights(arch) + head_weights(arch)) * jnp.asarray(steps, jnp.float32)
    match kv_cache:
        case "compute":
            vector = itemsize * arch.head_dim
        case "int8":
            vector = arch.head_dim + 4  # its scale
    return itemsize * weights + 2.0 * arch.num_kv_heads * vector * seen_keys(arch, positions)
