"""The parts of a decoder block: norms, attention, MLP.

Shape suffixes: B batch, T query tokens, S key slots, D hidden, N heads, K key-value heads, G heads that share
one of those, H head dimension.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.arch import Activation, ArchConfig, NormKind
from jrlhf.models.rope import Angles

NORMAL = nn.initializers.normal(0.02)


class LayerCache(NamedTuple):
    """One layer's part of a ``KVCache``."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    used: Int[Array, ""]


class Sight(NamedTuple):
    """What the queries of a layer see, and where: one for each of ``ArchConfig.attention_kinds``."""

    angles: Angles | None
    mask: Bool[Array, "B 1 1 T S"]


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


def rotate(x: Float[Array, "B T heads H"], angles: Angles) -> Float[Array, "B T heads H"]:
    """Turn each pair (i, i + R/2) of the first R dimensions by its angle: Hugging Face's half-split form."""
    cos, sin = angles
    rotated = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
    return turned if rotated == x.shape[-1] else jnp.concatenate((turned, x[..., rotated:]), axis=-1)


def activate(x: Float[Array, "*S"], activation: Activation) -> Float[Array, "*S"]:
    """The MLP's non-linearity."""
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


def soft_cap(x: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
    """cap · tanh(x / cap), which keeps x within ±cap; None leaves it. Team Gemma 2024, arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Norm(nn.Module):
    """x · rsqrt(mean(x²) + ε) · scale over the last axis (Zhang and Sennrich 2019, eq. 4) or LayerNorm; in float32."""

    kind: NormKind
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        width, last = x.shape[-1:], (1,) * (x.ndim - 1) + x.shape[-1:]
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", start, width, jnp.float32).reshape(last)
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        match self.kind:
            case "rms":
                x = x * scale
            case "rms_plus_one":
                x = x * (1.0 + scale)
            case "layer":
                x = x * scale + self.param("bias", nn.initializers.zeros, width, jnp.float32).reshape(last)
        return x.astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention. Ainslie et al. 2023."""

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], sight: Sight, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch = self.arch
        rows, length, _ = x_BTD.shape
        groups = arch.num_heads // arch.num_kv_heads
        scale = (arch.query_scalar or arch.head_dim) ** -0.5

        def project(name: str, heads: int) -> Array:
            flat = dense(heads * arch.head_dim, arch.qkv_bias, self.dtype, name)(x_BTD)
            return flat.reshape(rows, length, heads, arch.head_dim)

        def placed(x: Array) -> Array:
            return x if sight.angles is None else rotate(x, sight.angles)

        q_BTNH, k_BTKH = project("q", arch.num_heads), project("k", arch.num_kv_heads)
        if arch.qk_norm:
            q_BTNH = Norm(arch.norm, arch.norm_eps, self.dtype, name="q_norm")(q_BTNH)
            k_BTKH = Norm(arch.norm, arch.norm_eps, self.dtype, name="k_norm")(k_BTKH)
        q_BTNH = placed(q_BTNH * scale)
        q_BKGTH = q_BTNH.reshape(rows, length, arch.num_kv_heads, groups, arch.head_dim).transpose(0, 2, 3, 1, 4)
        k_BKSH = placed(k_BTKH).transpose(0, 2, 1, 3)
        v_BKSH = project("v", arch.num_kv_heads).transpose(0, 2, 1, 3)
        if cache is not None:
            slot = (jnp.int32(0), jnp.int32(0), cache.used, jnp.int32(0))
            k_BKSH = lax.dynamic_update_slice(cache.keys, k_BKSH, slot)
            v_BKSH = lax.dynamic_update_slice(cache.values, v_BKSH, slot)
            cache = LayerCache(k_BKSH, v_BKSH, cache.used)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
        scores = soft_cap(scores, arch.attention_softcap)
        # The lowest finite number, not -inf: a query that attends to nothing averages everything and stays finite.
        scores = jnp.where(sight.mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH).reshape(rows, length, arch.num_heads * arch.head_dim)
        return dense(arch.hidden_size, arch.attention_out_bias, self.dtype, "o")(mixed), cache


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020, "GLU Variants"), or without a gate down(activation(up(x)))."""

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        arch = self.arch

        def project(name: str) -> Array:
            return dense(arch.intermediate_size, arch.mlp_bias, self.dtype, name)(x_BTD)

        gate = activate(project("gate" if arch.gated_mlp else "up"), arch.activation)
        wide = gate * project("up") if arch.gated_mlp else gate
        return dense(arch.hidden_size, arch.mlp_bias, self.dtype, "down")(wide)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or both at once of the same x.

    ``kind``: which of ``sights`` this layer has; it may be traced, as layers are scanned over.
    """

    arch: ArchConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], kind: Int[Array, ""], sights: tuple[Sight, ...], cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch, dtype = self.arch, self.dtype
        sight = sights[0] if len(sights) == 1 else jax.tree.map(lambda *kinds: lax.select_n(kind, *kinds), *sights)

        def norm(name: str, x: Array) -> Array:
            return Norm(arch.norm, arch.norm_eps, dtype, name=name)(x)

        mixed, cache = Attention(arch, dtype, name="attention")(norm("attention_norm", x_BTD), sight, cache)
        if arch.parallel_residual:
            return x_BTD + mixed + MLP(arch, dtype, name="mlp")(norm("mlp_norm", x_BTD)), cache
        x_BTD = x_BTD + (norm("attention_post_norm", mixed) if arch.post_norms else mixed)
        wide = MLP(arch, dtype, name="mlp")(norm("mlp_norm", x_BTD))
        return x_BTD + (norm("mlp_post_norm", wide) if arch.post_norms else wide), cache


def matmul(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], out: Any) -> Float[Array, "*B O"]:
    """x · kernel, summed and returned in ``out``. Its gradients are computed in the dtypes of ``x`` and ``kernel``.

    JAX's own gradient of the kernel is (∂yᵀ · x)ᵀ, which XLA on a CPU does at a third of the speed of xᵀ · ∂y.
    And it would make x again, column by column, where x was not kept, which takes twice as long as the product itself.
    """
    return _matmul(x, kernel, out)


def _product(x: Array, kernel: Array, out: Any) -> Array:
    return _contract(x, kernel, (x.ndim - 1,), (0,), out)


def _matmul_forward(x: Array, kernel: Array, out: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, out), (x, kernel)


def _matmul_backward(out: Any, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    del out
    x, kernel = lax.optimization_barrier(saved)
    gradient, rows = gradient.astype(x.dtype), tuple(range(x.ndim - 1))
    return (
        _contract(gradient, kernel, (x.ndim - 1,), (1,), x.dtype),
        _contract(x, gradient, rows, rows, kernel.dtype),
    )


def _contract(a: Array, b: Array, of_a: tuple[int, ...], of_b: tuple[int, ...], out: Any) -> Array:
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=out)


_matmul: Any = jax.custom_vjp(_product, nondiff_argnums=(2,))
_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
    """x · kernel + bias, and scale · (x · a) · b more where the parameters hold an adapter. Hu et al. 2021, eq. 3."""

    features: int
    use_bias: bool
    dtype: Any
    out: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        kernel = self.param("kernel", NORMAL, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(self.dtype)
        y = matmul(x, kernel.astype(self.dtype), self.out)
        if self.has_variable("params", "lora_a"):
            adapter = (self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale"))
            a, b, scale = (leaf.astype(self.dtype) for leaf in adapter)
            y = y + matmul(matmul(x, a, self.dtype), b, self.dtype) * scale
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def dense(features: int, use_bias: bool, dtype: Any, name: str) -> Linear:
    """A linear map, computed in ``dtype``."""
    return Linear(features, use_bias, dtype, dtype, name=name)
