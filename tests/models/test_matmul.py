"""The product with gradients of its own, against ``x @ kernel`` and the gradients that JAX finds for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jrlhf.models import linear
from jrlhf.models.linear import matmul, matmul_transposed
from jrlhf.parallel import make_mesh


@pytest.fixture
def rows_spread() -> NamedSharding:
    """Rows over four of eight devices' groups."""
    return NamedSharding(make_mesh(data=2, fsdp=2, tensor=2), PartitionSpec(("data", "fsdp")))


@pytest.mark.parametrize("new_xla", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize(("dtype", "out", "tolerance"), [("float32", "float32", 1e-6), ("bfloat16", "float32", 2e-2)])
def test_it_is_the_product_and_its_gradients(monkeypatch, shape, dtype, out, tolerance, width, transposed, new_xla):
    """Of kernels that narrow and that widen, lying either way, as one device's program has it for either XLA."""
    monkeypatch.setattr(linear, "NEW_XLA", new_xla)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, (shape, (5, width)), strict=False))
    weights = jax.random.normal(keys[2], (*shape[:-1], width))

    def through(product):
        @jax.jit
        def loss(x, kernel):
            return jnp.sum(weights * product(x, kernel).astype(jnp.float32))

        return product(x, kernel), *jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)

    def ours(x, kernel):
        return matmul_transposed(x, kernel.T, jnp.dtype(out)) if transposed else matmul(x, kernel, jnp.dtype(out))

    found = through(ours)
    expected = through(lambda x, kernel: jnp.matmul(x, kernel, preferred_element_type=jnp.dtype(out)))
    assert [f.dtype for f in found] == [jnp.dtype(out), jnp.dtype(dtype), jnp.dtype(dtype)]
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_a_kernel_of_wider_numbers_gets_its_gradient_in_them():
    """bfloat16 is computed in, and what a float32 weight gets is a float32 sum, not rounded once more."""
    x, kernel = (
        jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(1)), ((64, 5), (5, 4)), strict=True)
    )
    low = x.astype(jnp.bfloat16)
    found = jax.grad(lambda kernel: jnp.sum(matmul(low, kernel, jnp.float32)))(kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, low.astype(jnp.float32).T @ jnp.ones((64, 4)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_that_lies_the_other_way_gets_its_gradient_so(dtype):
    """As tied embeddings do, at a size for which XLA chooses how to multiply: it must be able to run what it chose."""
    x, kernel, weights = (
        jax.random.normal(k, s)
        for k, s in zip(jax.random.split(jax.random.key(2), 3), ((2, 64, 128), (512, 128), (2, 64, 512)), strict=True)
    )
    low = x.astype(dtype)

    @jax.jit
    def found(kernel):
        return jax.grad(lambda kernel: jnp.sum(weights * matmul_transposed(low, kernel, jnp.float32)))(kernel)

    expected = np.einsum("bto,bti->oi", np.asarray(weights.astype(dtype), np.float64), np.asarray(low, np.float64))
    np.testing.assert_allclose(found(kernel), expected, atol=1e-3)


@pytest.mark.parametrize("product", [matmul, matmul_transposed])
def test_rows_stay_where_they_are(rows_spread, product):
    """The gradient of a kernel is a sum over devices of what each has: no rows are gathered for it."""
    x = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32, sharding=rows_spread)
    kernel = jax.ShapeDtypeStruct((8, 16) if product is matmul else (16, 8), jnp.float32)
    step = jax.jit(jax.grad(lambda kernel, x: jnp.sum(product(x, kernel, jnp.float32) ** 2)))
    text = step.lower(kernel, x).compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_the_gradient_of_a_frozen_kernel_is_not_computed():
    """In a program of an update of ``x`` alone there is the product and one gradient, not two."""
    x, kernel = jnp.ones((3, 5)), jnp.ones((5, 4))
    text = jax.jit(jax.grad(lambda x: jnp.sum(matmul(x, kernel, jnp.float32) ** 2))).lower(x).compile().as_text()
    assert text is not None
    assert 1 <= text.count(" dot(") <= 2
