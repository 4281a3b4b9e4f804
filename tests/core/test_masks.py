import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.core import (
    at_last_token,
    last_token_mask,
    masked_mean,
    masked_sum,
    masked_whiten,
    positions_from_mask,
)
from tests.support import oracles
from tests.support.strategies import floats, masks, seeds, with_nan

mean = jax.jit(masked_mean)
total = jax.jit(masked_sum)
whiten = {shift: jax.jit(lambda x, m, s=shift: masked_whiten(x, m, shift_mean=s)) for shift in (True, False)}
at_last, last_mask = jax.jit(at_last_token), jax.jit(last_token_mask)
positions = jax.jit(positions_from_mask)


@given(seeds, masks())
def test_mean_and_sum_equal_the_loop_and_ignore_nan(seed, mask):
    x = floats(seed)
    expected = oracles.masked_mean(x, mask)
    np.testing.assert_allclose(mean(with_nan(x, mask), mask), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total(with_nan(x, mask), mask), expected * mask.sum(), rtol=1e-5, atol=1e-5)


@given(seeds, masks(), st.booleans())
def test_whiten_equals_the_loop_and_ignores_nan(seed, mask, shift_mean):
    x = floats(seed, scale=3.0)
    expected = oracles.masked_whiten(x, mask, shift_mean)
    np.testing.assert_allclose(whiten[shift_mean](with_nan(x, mask), mask), expected, rtol=1e-4, atol=1e-4)


def test_whiten_by_hand():
    x, mask = jnp.array([[1.0, 3.0, 100.0]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(whiten[True](x, mask), [[-1.0, 1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(whiten[False](x, mask), [[1.0, 3.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("x", [[[2.5]], [[4.0, 4.0, 4.0]]], ids=["one element", "constant"])
def test_whiten_of_no_spread_is_finite(x, shift_mean):
    x = jnp.array(x)
    out = whiten[shift_mean](x, jnp.ones(x.shape, bool))
    np.testing.assert_array_equal(out, jnp.zeros_like(x) if shift_mean else x)
    np.testing.assert_array_equal(whiten[shift_mean](x, jnp.zeros(x.shape, bool)), jnp.zeros_like(x))


def test_reductions_are_float32_for_half_precision_input():
    ones = jnp.ones((1, 4096), jnp.bfloat16)  # a bfloat16 sum sticks at 256
    assert masked_sum(ones, jnp.ones(ones.shape, bool)) == 4096.0
    assert masked_whiten(ones, jnp.ones(ones.shape, bool), shift_mean=True).dtype == jnp.float32


@given(masks())
def test_positions_count_real_tokens(mask):
    expected = np.full(mask.shape, -1)
    for b, row in enumerate(mask):
        for i, t in enumerate(np.flatnonzero(row)):
            expected[b, t] = i
    np.testing.assert_array_equal(positions(mask), expected)


@given(seeds, masks())
def test_last_token(seed, mask):
    x = floats(seed)
    expected = [x[b, np.flatnonzero(row)[-1]] if row.any() else 0.0 for b, row in enumerate(mask)]
    np.testing.assert_array_equal(at_last(with_nan(x, mask), mask), np.array(expected, np.float32))
    last = np.asarray(last_mask(mask))
    np.testing.assert_array_equal(last.sum(-1), mask.any(-1))
    assert not (last & ~mask).any()


def test_last_token_under_vmap_and_of_more_axes():
    x, mask = jnp.asarray(floats(0, 2, 3, 5)), jnp.asarray(floats(1, 2, 3, 5) < 0.0)
    np.testing.assert_array_equal(jax.vmap(at_last_token)(x, mask), at_last_token(x, mask))
    np.testing.assert_array_equal(at_last_token(jnp.arange(3), jnp.array([True, True, False])), 1)
