from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.core import gae, shape_rewards
from tests.support import oracles
from tests.support.strategies import LENGTH, floats, masks, seeds, with_nan


@partial(jax.jit, static_argnames=("gamma", "lam"))
def batched_gae(rewards, values, mask, gamma, lam):
    return jax.vmap(lambda r, v, m: gae(r, v, m, gamma=gamma, lam=lam))(rewards, values, mask)


shape = jax.jit(lambda s, k, m, c: shape_rewards(s, k, m, kl_coef=c))


@given(seeds, masks(), st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (0.0, 0.5)]))
def test_gae_equals_the_definition_with_any_mask(seed, mask, constants):
    gamma, lam = constants
    rewards, values = floats(seed), floats(seed + 1)
    expected = [oracles.gae(r, v, m, gamma, lam) for r, v, m in zip(rewards, values, mask, strict=True)]
    # Prompt, holes and padding hold NaN: none of it may be read.
    got = batched_gae(with_nan(rewards, mask), with_nan(values, mask), mask, gamma=gamma, lam=lam)
    for a, b in zip(got, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(a, np.stack(b), rtol=1e-4, atol=1e-5)


def test_gae_by_hand():
    # Two response tokens after a prompt, before padding; γ = 0.5, λ = 0.5.
    # δ₂ = 2 - 1 = 1 and A₂ = 1; δ₁ = 1 + 0.5·1 - 2 = -0.5 and A₁ = -0.5 + 0.25·1 = -0.25.
    rewards, values = jnp.array([9.0, 1.0, 2.0, 9.0]), jnp.array([9.0, 2.0, 1.0, 9.0])
    mask = jnp.array([False, True, True, False])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages, [0.0, -0.25, 1.0, 0.0])
    np.testing.assert_allclose(returns, [0.0, 1.75, 2.0, 0.0])


def test_gae_does_not_see_where_the_response_lies():
    rewards, values = jnp.asarray(floats(0, 3)), jnp.asarray(floats(1, 3))
    alone = gae(rewards, values, jnp.ones(3, bool), gamma=1.0, lam=0.95)
    for offset in (0, 2, LENGTH - 3):
        pad = (offset, LENGTH - 3 - offset)
        rows = [jnp.pad(x, pad, constant_values=np.nan) for x in (rewards, values)]
        moved = gae(*rows, jnp.pad(jnp.ones(3, bool), pad), gamma=1.0, lam=0.95)
        for a, b in zip(alone, moved, strict=True):
            np.testing.assert_array_equal(a, b[offset : offset + 3])


def test_lambda_one_returns_are_the_discounted_rewards_to_go():
    rewards, values = jnp.asarray(floats(2, 5)), jnp.asarray(floats(3, 5))
    _, returns = gae(rewards, values, jnp.ones(5, bool), gamma=0.9, lam=1.0)
    to_go = [sum(0.9 ** (j - i) * rewards[j] for j in range(i, 5)) for i in range(5)]
    np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-6)


def test_gae_of_an_all_masked_row_and_of_constants_is_finite():
    nan = jnp.full(4, jnp.nan)
    for out in gae(nan, nan, jnp.zeros(4, bool), gamma=1.0, lam=0.95):
        np.testing.assert_array_equal(out, np.zeros(4))
    advantages, _ = gae(jnp.zeros(4), jnp.full(4, 3.0), jnp.ones(4, bool), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[-1], -3.0)
    assert jnp.isfinite(advantages).all()


@given(seeds, masks())
def test_shaped_rewards_equal_the_loop(seed, mask):
    scores, kl = floats(seed, mask.shape[0]), floats(seed + 1)
    got = shape(scores, with_nan(kl, mask), mask, 0.3)
    np.testing.assert_allclose(got, oracles.shape_rewards(scores, kl, mask, 0.3), rtol=1e-5, atol=1e-6)


def test_shaped_rewards_by_hand():
    mask = jnp.array([[False, True, True, False], [False, False, False, False]])
    kl = jnp.array([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    got = shape_rewards(jnp.array([5.0, 7.0]), kl, mask, kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.0, -0.5, 4.0, 0.0], [0.0] * 4])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_rewards_are_float32_whatever_dtype_the_scores_have(dtype):
    # An integer array would cut the penalty off, bfloat16 would round it.
    got = shape_rewards(jnp.array([1], dtype), jnp.array([[0.3]]), jnp.array([[True]]), kl_coef=0.1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[0.97]], rtol=1e-6)
