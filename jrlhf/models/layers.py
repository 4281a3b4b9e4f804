"""The parts of a decoder block: norms, attention, MLP.

Shape suffixes: B batch, T query tokens, S key slots, D hidden, N heads, K key-value heads, G heads that share
one of those, H head dimension.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.arch import Activation, ArchConfig, NormKind
from jrlhf.models.attention import AttentionKernel, causal_attend, fused_attention
from jrlhf.models.cache import CachedArray, append_entries, attend_cached
from jrlhf.models.linear import dense
from jrlhf.models.rope import Angles
from jrlhf.models.splash import Segments, needs_interpreter, splash_attention
from jrlhf.parallel.mesh import spread_rows
from jrlhf.parallel.platforms import platform_settings


class LayerCache(NamedTuple):
    """The keys and values of one layer in a ``KVCache``."""

    keys: CachedArray
    values: CachedArray
    next_slot: Int[Array, ""]


class AttentionInputs(NamedTuple):
    """Rotary angles and mask for the layers of one of ``ArchConfig.attention_kinds``."""

    angles: Angles | None
    mask: Bool[Array, "B 1 1 T S"] | Segments
    """Square mask, or ``Segments`` for the splash kernel."""


def rotate(x: Float[Array, "B T heads H"], angles: Angles, *, by_product: bool) -> Float[Array, "B T heads H"]:
    """Rotate each pair (i, i + R/2) of the first R dimensions by its angle, in Hugging Face's half-split form.

    ``by_product`` exchanges the halves by a product with a matrix of 0, 1 and -1, which is exact in bfloat16.
    """
    cos, sin = angles
    half, width = cos.shape[-1], x.shape[-1]
    if by_product and x.dtype == jnp.bfloat16:
        exchange = np.zeros((width, width), np.float32)
        exchange[np.arange(half) + half, np.arange(half)] = -1.0
        exchange[np.arange(half), np.arange(half) + half] = 1.0
        rest = ((0, 0),) * (cos.ndim - 1) + ((0, width - 2 * half),)
        whole_cos = jnp.pad(jnp.concatenate((cos, cos), axis=-1), rest, constant_values=1.0)
        whole_sin = jnp.pad(jnp.concatenate((sin, sin), axis=-1), rest)
        exchanged = jnp.einsum("BTNH,HI->BTNI", x, jnp.asarray(exchange, x.dtype), preferred_element_type=jnp.float32)
        return (x.astype(jnp.float32) * whole_cos + exchanged * whole_sin).astype(x.dtype)
    first, second = jnp.split(x[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
    return turned if 2 * half == width else jnp.concatenate((turned, x[..., 2 * half :]), axis=-1)


def activate(x: Float[Array, "*S"], activation: Activation) -> Float[Array, "*S"]:
    """Apply the MLP's activation function."""
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


def split_heads(flat: Float[Array, "B T O"], heads: int, mesh: Mesh | None) -> Float[Array, "B T O"]:
    """Constrain the vectors of all heads to be split over ``tensor`` by heads, if these divide.

    Left to itself, XLA for TPUs reads the rows of all devices with a part of the weights.
    """
    whole = mesh is None or heads % mesh.shape["tensor"]
    return spread_rows(flat, mesh, last=None if whole else "tensor")


class Norm(nn.Module):
    """RMSNorm, x · rsqrt(mean(x²) + ε) · scale (Zhang and Sennrich 2019, eq. 4), or LayerNorm; computed in float32."""

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
    """Grouped-query attention (Ainslie et al. 2023)."""

    arch: ArchConfig
    dtype: Any
    kernel: AttentionKernel
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], inputs: AttentionInputs, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch = self.arch
        rows, length, _ = x_BTD.shape
        groups = arch.num_heads // arch.num_kv_heads
        scale = (arch.query_scalar or arch.head_dim) ** -0.5
        by_product = platform_settings(self.mesh).rotary_products

        def project(name: str, heads: int) -> Array:
            flat = dense(heads * arch.head_dim, arch.qkv_bias, self.dtype, name)(x_BTD)
            return split_heads(flat, heads, self.mesh).reshape(rows, length, heads, arch.head_dim)

        def turn(x: Array) -> Array:
            return x if inputs.angles is None else rotate(x, inputs.angles, by_product=by_product)

        q_BTNH, k_BTKH = project("q", arch.num_heads), project("k", arch.num_kv_heads)
        if arch.qk_norm:
            q_BTNH = Norm(arch.norm, arch.norm_eps, self.dtype, name="q_norm")(q_BTNH)
            k_BTKH = Norm(arch.norm, arch.norm_eps, self.dtype, name="k_norm")(k_BTKH)
        q_BTNH, k_BTKH, v_BTKH = turn(q_BTNH * scale), turn(k_BTKH), project("v", arch.num_kv_heads)
        into_model = dense(arch.hidden_size, arch.attention_out_bias, self.dtype, "o")

        def out(mixed: Array) -> Array:
            flat = mixed.reshape(rows, length, arch.num_heads * arch.head_dim)
            return into_model(split_heads(flat, arch.num_heads, self.mesh))

        if isinstance(inputs.mask, Segments):
            mixed = splash_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                inputs.mask,
                windows=tuple(kind.window for kind in arch.attention_kinds),
                cap=arch.attention_softcap,
                mesh=self.mesh,
                interpret=needs_interpreter(self.mesh),
            )
            return out(mixed), None
        if self.kernel == "cudnn" and cache is None:
            mixed = fused_attention(q_BTNH, k_BTKH, v_BTKH, inputs.mask, implementation=self.kernel)
            return out(mixed), None
        q_BKGTH = q_BTNH.reshape(rows, length, arch.num_kv_heads, groups, arch.head_dim).transpose(0, 2, 3, 1, 4)
        k_BKSH, v_BKSH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
        if cache is not None:
            keys = append_entries(cache.keys, k_BKSH, cache.next_slot)
            values = append_entries(cache.values, v_BKSH, cache.next_slot)
            cache = LayerCache(keys, values, cache.next_slot)
            mixed = attend_cached(q_BKGTH, keys, values, inputs.mask, cap=arch.attention_softcap)
        else:
            mixed = causal_attend(q_BKGTH, k_BKSH, v_BKSH, inputs.mask, cap=arch.attention_softcap)
        return out(mixed), cache


class MLP(nn.Module):
    """Gated MLP, down(activation(gate(x)) · up(x)) (Shazeer 2020, "GLU Variants"), or down(activation(up(x)))."""

    arch: ArchConfig
    dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        arch = self.arch

        def project(name: str) -> Array:
            return dense(arch.intermediate_size, arch.mlp_bias, self.dtype, name)(x_BTD)

        gate = activate(project("gate" if arch.gated_mlp else "up"), arch.activation)
        wide = gate * project("up") if arch.gated_mlp else gate
        return dense(arch.hidden_size, arch.mlp_bias, self.dtype, "down")(spread_rows(wide, self.mesh, last="tensor"))


class Block(nn.Module):
    """A decoder block: x + attention(norm(x)), then x + mlp(norm(x)), or the sum of both branches of the same x.

    ``kind`` is the layer's index into ``kinds``; it may be traced, since layers are scanned.
    """

    arch: ArchConfig
    dtype: Any
    kernel: AttentionKernel
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        kind: Int[Array, ""],
        kinds: tuple[AttentionInputs, ...],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        arch, dtype = self.arch, self.dtype
        inputs = kinds[0] if len(kinds) == 1 else jax.tree.map(lambda *options: lax.select_n(kind, *options), *kinds)

        def norm(name: str, x: Array) -> Array:
            return spread_rows(Norm(arch.norm, arch.norm_eps, dtype, name=name)(x), self.mesh)

        mixed, cache = Attention(arch, dtype, self.kernel, self.mesh, name="attention")(
            norm("attention_norm", x_BTD), inputs, cache
        )
        if arch.parallel_residual:
            x_BTD = x_BTD + mixed + MLP(arch, dtype, self.mesh, name="mlp")(norm("mlp_norm", x_BTD))
            return spread_rows(x_BTD, self.mesh), cache
        x_BTD = spread_rows(x_BTD + (norm("attention_post_norm", mixed) if arch.post_norms else mixed), self.mesh)
        wide = MLP(arch, dtype, self.mesh, name="mlp")(norm("mlp_norm", x_BTD))
        x_BTD = x_BTD + (norm("mlp_post_norm", wide) if arch.post_norms else wide)
        return spread_rows(x_BTD, self.mesh), cache
