"""Linear maps: a product whose gradients XLA does well, with an adapter where there is one."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

NORMAL = nn.initializers.normal(0.02)


NEW_XLA = jax.__version_info__ >= (0, 12)
"""That of JAX 0.10 gathers an array from all devices that is told how to lie in memory, and while it lays out a factor,
makes it again, column by column, where it was not kept."""


def matmul(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], out: Any) -> Float[Array, "*B O"]:
    """x · kernel, computed in the dtype of ``x`` and returned in ``out``.

    The gradient of ``x`` has its dtype, that of the kernel is summed and returned in the kernel's own. JAX's form of
    the latter is (∂yᵀ · x)ᵀ, which XLA on a CPU does at a third of the speed of xᵀ · ∂y; and x it would make again,
    column by column, where x was not kept, which takes twice as long as the product itself.
    """
    return _matmul(x, kernel, out, 0)


def matmul_transposed(x: Float[Array, "*B I"], kernel: Float[Array, "O I"], out: Any) -> Float[Array, "*B O"]:
    """x · kernelᵀ, as ``matmul``: for tied embeddings, which are not turned in memory for it."""
    return _matmul(x, kernel, out, 1)


def _product(x: Array, kernel: Array, out: Any, axis: int) -> Array:
    """Summed over ``axis`` of the kernel."""
    return _contract(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,), out)


def _matmul_forward(x: Array, kernel: Array, out: Any, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, out, axis), (x, kernel)


def _matmul_backward(out: Any, axis: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    del out
    x, kernel = lax.optimization_barrier(saved)
    gradient = gradient.astype(x.dtype)
    of_x = _contract(gradient, kernel.astype(x.dtype), (x.ndim - 1,), (1 - axis,), x.dtype)

    factors = (gradient, x) if axis else (x, gradient)
    of_kernel, on_cpu = (partial(form, out=kernel.dtype) for form in (_of_kernel, _of_kernel_on_cpu))
    if not NEW_XLA and jax.device_count() > 1:
        return of_x, of_kernel(*factors)
    return of_x, lax.platform_dependent(*factors, cpu=on_cpu, default=of_kernel)


def _of_kernel(a: Array, b: Array, *, out: Any) -> Array:
    """aᵀ · b over all rows."""
    rows = tuple(range(a.ndim - 1))
    return _contract(a, b, rows, rows, out)


def _of_kernel_on_cpu(a: Array, b: Array, *, out: Any) -> Array:
    """aᵀ · b of an aᵀ that lies row by row. Left to XLA it is a, read column by column: in bfloat16 half as fast."""
    if not NEW_XLA and b.shape[-1] < a.shape[-1]:
        # (bᵀ · a)ᵀ: the narrower is laid out. The wider may be an MLP's activations, which would be made again.
        return lax.optimization_barrier(_of_rows(b, a, out)).T
    return _of_rows(a, b, out)


def _of_rows(a: Array, b: Array, out: Any) -> Array:
    rows = jnp.moveaxis(a, -1, 0)
    rows = lax.optimization_barrier(with_layout_constraint(rows, Layout(tuple(range(a.ndim)))))
    return _contract(rows, b, tuple(range(1, a.ndim)), tuple(range(a.ndim - 1)), out)


def _contract(a: Array, b: Array, of_a: tuple[int, ...], of_b: tuple[int, ...], out: Any) -> Array:
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=out)


_matmul: Any = jax.custom_vjp(_product, nondiff_argnums=(2, 3))
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
        y = matmul(x, kernel, self.out)
        if self.has_variable("params", "lora_a"):
            a, b, scale = (self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale"))
            y = y + matmul(matmul(x, a, self.dtype), b, self.dtype) * scale.astype(self.dtype)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def dense(features: int, use_bias: bool, dtype: Any, name: str) -> Linear:
    """A linear map, computed in ``dtype``."""
    return Linear(features, use_bias, dtype, dtype, name=name)
