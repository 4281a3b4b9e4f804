"""The product with gradients of its own, against ``x @ kernel`` and the gradients that JAX finds for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.linear import matmul


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize(("dtype", "out", "tolerance"), [("float32", "float32", 1e-6), ("bfloat16", "float32", 2e-2)])
def test_it_is_the_product_and_its_gradients(shape, dtype, out, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, (shape, (5, 4)), strict=False))
    weights = jax.random.normal(keys[2], (*shape[:-1], 4))

    def through(product):
        loss = lambda x, kernel: jnp.sum(weights * product(x, kernel).astype(jnp.float32))  # noqa: E731
        return product(x, kernel), *jax.grad(loss, argnums=(0, 1))(x, kernel)

    found = through(lambda x, kernel: matmul(x, kernel, jnp.dtype(out)))
    expected = through(lambda x, kernel: jnp.matmul(x, kernel, preferred_element_type=jnp.dtype(out)))
    assert [f.dtype for f in found] == [jnp.dtype(out), jnp.dtype(dtype), jnp.dtype(dtype)]
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_the_gradient_of_a_frozen_kernel_is_not_computed():
    """In a program of an update of ``x`` alone there is the product and one gradient, not two."""
    x, kernel = jnp.ones((3, 5)), jnp.ones((5, 4))
    text = jax.jit(jax.grad(lambda x: jnp.sum(matmul(x, kernel, jnp.float32) ** 2))).lower(x).compile().as_text()
    assert text is not None
    assert 1 <= text.count(" dot(") <= 2
