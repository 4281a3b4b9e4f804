"""Linear maps: a product whose gradients XLA does well, with an adapter where there is one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NORMAL = nn.initializers.normal(0.02)


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
