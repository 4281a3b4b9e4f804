"""Model FLOPs and bytes of a decoder, which do not depend on how a program computes it.

A multiply-add counts as 2. Norms, rotations, activations, softmax and recomputation do not count. An attention score
counts only if the query may attend to the key, so causal attention counts half of the square.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.arch import ArchConfig
from jrlhf.models.cache import CacheKind


def body_weights(arch: ArchConfig) -> int:
    """Return the number of weights in the matrices that multiply every token, without the LM head."""
    attention = 2 * arch.hidden_size * arch.head_dim * (arch.num_heads + arch.num_kv_heads)
    mlp = (3 if arch.gated_mlp else 2) * arch.hidden_size * arch.intermediate_size
    return arch.num_layers * (attention + mlp)


def head_weights(arch: ArchConfig) -> int:
    """Return the number of weights of the LM head."""
    return arch.vocab_size * arch.hidden_size


def visible_keys(arch: ArchConfig, positions: Int[Array | np.ndarray, "*S"]) -> Float[Array, ""]:
    """Count the keys that queries at ``positions`` attend to, their own included, summed over queries and layers.

    A negative position is padding and counts nothing.
    """
    before = jnp.maximum(jnp.asarray(positions, jnp.int32) + 1, 0)
    total = jnp.float32(0.0)
    for kind, attention in enumerate(arch.attention_kinds):
        visible = jnp.minimum(before, attention.window) if attention.window else before
        total += arch.layer_kinds.count(kind) * jnp.sum(visible, dtype=jnp.float32)
    return total


def forward_flops(arch: ArchConfig, positions: Int[Array | np.ndarray, "*S"], *, logits: Any) -> Float[Array, ""]:
    """Return the FLOPs of a forward pass over tokens at ``positions``, with logits for ``logits`` of the tokens.

    A negative position is padding. A backward pass takes twice as many FLOPs, or as many if weights are frozen.
    """
    tokens = jnp.sum(jnp.asarray(positions) >= 0, dtype=jnp.float32)
    attention = 4.0 * arch.num_heads * arch.head_dim * visible_keys(arch, positions)
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
    """Return the bytes that ``steps`` decoding steps read: all weights per step, and the keys and values of each token.

    ``positions`` are those of the tokens fed to the decoder (negative: padding). ``itemsize`` is the number of bytes of
    a weight, and of a cached number unless the cache is int8.
    """
    # A float, because 2³¹ weights or more do not fit an int32.
    weights = float(body_weights(arch) + head_weights(arch)) * jnp.asarray(steps, jnp.float32)
    match kv_cache:
        case "compute":
            vector = itemsize * arch.head_dim
        case "int8":
            vector = arch.head_dim + 4  # its scale
    return itemsize * weights + 2.0 * arch.num_kv_heads * vector * visible_keys(arch, positions)
