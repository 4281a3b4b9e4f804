"""The bundled decoder: pre-norm blocks, rotary positions, grouped-query attention, layer parameters stacked on axis 0.

Shape suffixes: B batch, T query tokens, S key slots, D hidden, N heads, K key-value heads, G heads that share
one of those, H head dimension, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import positions_from_mask
from jrlhf.models.arch import Activation, ArchConfig, Rope

_NORMAL = nn.initializers.normal(0.02)


class KVCache(NamedTuple):
    """Keys and values of every layer; all rows write the same slots, of which the first ``used`` are taken.

    One array a layer, so that each is updated in place and read without first being cut out of a bigger one.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]
    """-1 where nothing, or padding, is stored: no query attends there."""
    used: Int[Array, ""]


class LayerCache(NamedTuple):
    """One layer's part of a ``KVCache``."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    used: Int[Array, ""]


class Angles(NamedTuple):
    """Cosine and sine of the rotary angles at each query position."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def init_cache(arch: ArchConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """An empty cache for ``batch`` rows of at most ``length`` tokens."""
    shape = (batch, arch.num_kv_heads, length, arch.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(arch.num_layers)) for _ in range(2))
    return KVCache(keys, values, jnp.full((batch, length), -1, jnp.int32), jnp.zeros((), jnp.int32))


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """θ^(-2i/d) for each pair of dimensions, scaled as ``rope`` says; radians a position.

    Su et al. 2021, section 3.2.2; "linear": Chen et al. 2023, arXiv 2306.15595; "llama3" (Llama 3.1): long wavelengths
    are stretched by ``factor``, short ones kept, those between interpolated.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.kind:
        case "default":
            scaled = frequencies
        case "linear":
            scaled = frequencies / rope.factor
        case "llama3":
            turns = rope.original_max_positions * frequencies / (2.0 * math.pi)
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            scaled = frequencies * ((1.0 - smooth) / rope.factor + smooth)
    return scaled.astype(np.float32)


def rotary_angles(arch: ArchConfig, positions: Int[Array, "B T"]) -> Angles:
    """In float32. Padding (-1) is given position 0: nothing attends to it."""
    frequencies = jnp.asarray(inverse_frequencies(arch.rope, arch.head_dim))
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return Angles(jnp.cos(angles), jnp.sin(angles))


def attention_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 1 T S"]:
    """A query attends to real tokens at its own position or before. Positions decide, so padding may stand anywhere.

    ``queries = keys = [-1, 0, 1]`` (left padding) gives ``[[0,0,0], [0,1,0], [0,1,1]]``: padding sees nothing.
    """
    allowed = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
    return allowed[:, None, None]


def rotate(x: Float[Array, "B T heads H"], angles: Angles) -> Float[Array, "B T heads H"]:
    """Turn each pair (i, i + H/2) by its angle: the half-split form, in which Hugging Face keeps q and k."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = angles
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


def activate(x: Float[Array, "*S"], activation: Activation) -> Float[Array, "*S"]:
    """The gate's non-linearity."""
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + ε) · scale, computed in float32. Zhang and Sennrich 2019, eq. 4."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],), jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        variance_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        return (x_BTD * lax.rsqrt(variance_BT1 + self.eps) * scale_D[None, None]).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention. Ainslie et al. 2023."""

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "B 1 1 T S"], cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch = self.arch
        rows, length, _ = x_BTD.shape
        groups = arch.num_heads // arch.num_kv_heads

        def project(name: str, heads: int) -> Array:
            flat = _dense(heads * arch.head_dim, arch.qkv_bias, self.dtype, name)(x_BTD)
            return flat.reshape(rows, length, heads, arch.head_dim)

        q_BTNH = rotate(project("q", arch.num_heads) * arch.head_dim**-0.5, angles)
        q_BKGTH = q_BTNH.reshape(rows, length, arch.num_kv_heads, groups, arch.head_dim).transpose(0, 2, 3, 1, 4)
        k_BKSH = rotate(project("k", arch.num_kv_heads), angles).transpose(0, 2, 1, 3)
        v_BKSH = project("v", arch.num_kv_heads).transpose(0, 2, 1, 3)
        if cache is not None:
            slot = (jnp.int32(0), jnp.int32(0), cache.used, jnp.int32(0))
            k_BKSH = lax.dynamic_update_slice(cache.keys, k_BKSH, slot)
            v_BKSH = lax.dynamic_update_slice(cache.values, v_BKSH, slot)
            cache = LayerCache(k_BKSH, v_BKSH, cache.used)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
        # The lowest finite number, not -inf: a query that attends to nothing averages everything and stays finite.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH).reshape(rows, length, arch.num_heads * arch.head_dim)
        return _dense(arch.hidden_size, arch.attention_out_bias, self.dtype, "o")(mixed), cache


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)). Shazeer 2020, "GLU Variants"."""

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        arch = self.arch
        gate, up = (_dense(arch.intermediate_size, arch.mlp_bias, self.dtype, name)(x_BTD) for name in ("gate", "up"))
        return _dense(arch.hidden_size, arch.mlp_bias, self.dtype, "down")(activate(gate, arch.activation) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "B 1 1 T S"], cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch, dtype = self.arch, self.dtype
        normed = RMSNorm(arch.norm_eps, dtype, name="attention_norm")(x_BTD)
        mixed, cache = Attention(arch, dtype, name="attention")(normed, angles, mask, cache)
        x_BTD = x_BTD + mixed
        normed = RMSNorm(arch.norm_eps, dtype, name="mlp_norm")(x_BTD)
        return x_BTD + MLP(arch, dtype, name="mlp")(normed), cache


class Decoder(nn.Module):
    """Tokens to logits. Parameters are float32, ``dtype`` is what is computed in; logits are float32 always."""

    arch: ArchConfig
    dtype: Any
    remat: bool

    def setup(self) -> None:
        arch = self.arch
        self.embed = self.param("embed", _NORMAL, (arch.vocab_size, arch.hidden_size), jnp.float32)
        # The scan is a loop already: nothing outside it could be merged with what is recomputed inside.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=arch.num_layers,
        )(arch, self.dtype)
        self.final_norm = RMSNorm(arch.norm_eps, self.dtype)
        if not arch.tie_embeddings:
            self.lm_head = nn.Dense(
                arch.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_NORMAL,
                dot_general=_float32_dot,
            )

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
        return self.unembed(self.hidden(tokens, mask))

    def hidden(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the LM head, or any other head, reads."""
        positions = positions_from_mask(mask)
        angles = rotary_angles(self.arch, positions)
        x_BTD, _ = self.layers(self.lookup(tokens), angles, attention_mask(positions, positions), None)
        return self.final_norm(x_BTD)

    def lookup(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embed[tokens].astype(self.dtype)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        if self.arch.tie_embeddings:
            table = self.embed.astype(self.dtype)
            return jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
        return self.lm_head(hidden)

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Append ``T`` tokens; the logits that follow the last of them. Layers are unrolled.

        The caller keeps within the cache's length: writing past it would silently overwrite its last slots.
        """
        length, slots = tokens.shape[1], cache.positions.shape[1]
        if length > slots:
            raise ValueError(f"{length} tokens do not fit a cache of {slots}")
        stored = lax.dynamic_update_slice(cache.positions, positions, (jnp.int32(0), cache.used))
        angles, mask = rotary_angles(self.arch, positions), attention_mask(positions, stored)
        block = Block(self.arch, self.dtype, parent=None)
        stacked = self.variables["params"]["layers"]
        x_BTD, keys, values = self.lookup(tokens), [], []
        for layer in range(self.arch.num_layers):
            # XLA moves slices out of a sampling loop only if something it deems work depends on them: the barrier does.
            # Without it every step copies all weights first.
            weights = lax.optimization_barrier(jax.tree.map(lambda leaf, i=layer: leaf[i], stacked))
            layer_cache = LayerCache(cache.keys[layer], cache.values[layer], cache.used)
            x_BTD, layer_cache = block.apply({"params": weights}, x_BTD, angles, mask, layer_cache)
            keys.append(layer_cache.keys)
            values.append(layer_cache.values)
        logits = self.unembed(self.final_norm(x_BTD[:, -1:]))[:, 0]
        return logits, KVCache(tuple(keys), tuple(values), stored, cache.used + jnp.int32(length))


def _dense(features: int, use_bias: bool, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=_NORMAL, name=name)


def _float32_dot(lhs: Array, rhs: Array, dimensions: Any, precision: Any = None) -> Array:
    return lax.dot_general(lhs, rhs, dimensions, precision=precision, preferred_element_type=jnp.float32)
