"""Linear maps whose gradients XLA computes fast, with a LoRA adapter where the parameters hold one."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jrlhf.parallel.platforms import barrier_on_cpu

NORMAL = nn.initializers.normal(0.02)


NEW_XLA = jax.__version_info__ >= (0, 12)
"""Whether XLA respects a layout constraint without extra work.

The XLA of JAX 0.10 gathers an array with a layout constraint from all devices. It also recomputes a factor that was not
saved, column by column, while it lays the factor out.
"""


def matmul(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], out: Any) -> Float[Array, "*B O"]:
    """Return x · kernel, computed in the dtype of ``x`` and returned in the dtype ``out``.

    The gradient of ``x`` has the dtype of ``x``; that of the kernel is summed and returned in the kernel's dtype. JAX
    computes the latter as (∂yᵀ · x)ᵀ, which on a CPU runs at a third of the speed of xᵀ · ∂y. XLA would also recompute
    an x that was not saved, column by column, in twice the time of the product.
    """
    return _matmul(x, kernel, out, 0)


def matmul_transposed(x: Float[Array, "*B I"], kernel: Float[Array, "O I"], out: Any) -> Float[Array, "*B O"]:
    """Return x · kernelᵀ with the gradients of ``matmul``, for tied embeddings, without transposing them in memory."""
    return _matmul(x, kernel, out, 1)


def product(x: Array, kernel: Array, out: Any, *, axis: int) -> Array:
    """Multiply in the dtype of ``x`` and sum over ``axis`` of the kernel; the result has the dtype ``out``."""
    return _contract(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,), out)


def input_gradient(gradient: Array, kernel: Array, *, axis: int) -> Array:
    """Return the gradient of the input of ``product``, in the dtype of the gradient of its result."""
    return _contract(gradient, kernel.astype(gradient.dtype), (gradient.ndim - 1,), (1 - axis,), gradient.dtype)


def kernel_gradient(x: Array, gradient: Array, out: Any, *, axis: int) -> Array:
    """Return the gradient of the kernel of ``product``, summed over all rows in the dtype ``out``."""
    factors = (gradient, x) if axis else (x, gradient)
    general, on_cpu = (partial(function, out=out) for function in (_row_product, _row_product_on_cpu))
    if not NEW_XLA and jax.device_count() > 1:
        return general(*factors)
    return lax.platform_dependent(*factors, cpu=on_cpu, default=general)


def _primal(x: Array, kernel: Array, out: Any, axis: int) -> Array:
    return product(x, kernel, out, axis=axis)


def _matmul_forward(x: Array, kernel: Array, out: Any, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, out, axis=axis), (x, kernel)


def _matmul_backward(out: Any, axis: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    del out
    x, kernel = barrier_on_cpu(saved)
    gradient = gradient.astype(x.dtype)
    return input_gradient(gradient, kernel, axis=axis), kernel_gradient(x, gradient, kernel.dtype, axis=axis)


def _row_product(a: Array, b: Array, *, out: Any) -> Array:
    """Return aᵀ · b summed over all rows."""
    rows = tuple(range(a.ndim - 1))
    return _contract(a, b, rows, rows, out)


def _row_product_on_cpu(a: Array, b: Array, *, out: Any) -> Array:
    """Return aᵀ · b with aᵀ row-major in memory; XLA alone would read a by columns, in bfloat16 at half the speed."""
    if not NEW_XLA and b.shape[-1] < a.shape[-1]:
        # Lay out the narrower factor: (bᵀ · a)ᵀ. The wider may be an MLP's activations, which would be recomputed.
        return lax.optimization_barrier(_row_major_product(b, a, out)).T
    return _row_major_product(a, b, out)


def _row_major_product(a: Array, b: Array, out: Any) -> Array:
    rows = jnp.moveaxis(a, -1, 0)
    rows = lax.optimization_barrier(with_layout_constraint(rows, Layout(tuple(range(a.ndim)))))
    return _contract(rows, b, tuple(range(1, a.ndim)), tuple(range(a.ndim - 1)), out)


def _contract(a: Array, b: Array, of_a: tuple[int, ...], of_b: tuple[int, ...], out: Any) -> Array:
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=out)


_matmul: Any = jax.custom_vjp(_primal, nondiff_argnums=(2, 3))
_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
    """x · kernel + bias, plus scale · (x · a) · b if the parameters hold an adapter (Hu et al. 2021, eq. 3)."""

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
    """Return a linear map that computes in ``dtype``."""
    return Linear(features, use_bias, dtype, dtype, name=name)
