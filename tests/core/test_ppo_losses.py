import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jrlhf.core import importance_ratio, masked_mean, ppo_policy_loss, ppo_value_loss
from tests.support import oracles
from tests.support.strategies import floats, masks, seeds, with_nan


def policy(clip, dual_clip):
    return jax.jit(lambda lp, old, adv: ppo_policy_loss(lp, old, adv, clip=clip, dual_clip=dual_clip))


POLICIES = {dual: policy(0.2, dual) for dual in (None, 3.0)}
value_loss = jax.jit(lambda v, old, r: ppo_value_loss(v, old, r, clip=0.2))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@given(seeds)
def test_policy_loss_equals_the_loop(dual_clip, seed):
    logprobs, old, advantages = floats(seed), floats(seed + 1), floats(seed + 2)
    expected = oracles.each(lambda *x: oracles.policy_loss(*x, 0.2, dual_clip), logprobs, old, advantages)
    np.testing.assert_allclose(POLICIES[dual_clip](logprobs, old, advantages), expected, rtol=1e-4, atol=1e-5)


def test_policy_loss_by_hand():
    # Ratios 1.5 and 0.5 with either sign of the advantage, clip 0.2.
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5]])
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    got = ppo_policy_loss(jnp.log(ratio), jnp.zeros((1, 4)), advantages, clip=0.2, dual_clip=None)
    np.testing.assert_allclose(got, [[-1.2, 1.5, -0.5, 0.8]], rtol=1e-6)
    # Dual clip: a ratio of 5 with A = -1 costs 3, not 5, and has no gradient; with A = 1 nothing changes.
    far = jnp.log(jnp.array([[5.0, 5.0]]))
    loss = lambda lp: ppo_policy_loss(lp, jnp.zeros((1, 2)), jnp.array([[-1.0, 1.0]]), clip=0.2, dual_clip=3.0)  # noqa: E731
    np.testing.assert_allclose(loss(far), [[3.0, -1.2]], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda lp: jnp.sum(loss(lp)))(far), [[0.0, 0.0]])


def test_gradient_at_the_first_minibatch_is_the_policy_gradient():
    logprobs, advantages = jnp.asarray(floats(0)), jnp.asarray(floats(1))
    gradient = jax.grad(lambda lp: jnp.sum(POLICIES[None](lp, logprobs, advantages)))(logprobs)
    np.testing.assert_allclose(gradient, -advantages, rtol=1e-6)


def test_ratio_is_one_at_equality_and_never_overflows():
    x = jnp.asarray(floats(0))
    np.testing.assert_array_equal(importance_ratio(x, x), jnp.ones_like(x))
    far = jnp.array([[-1e4, 1e4]])
    np.testing.assert_allclose(importance_ratio(far, -far), jnp.exp(jnp.array([[-20.0, 20.0]])), rtol=1e-6)
    for dual_clip, loss in POLICIES.items():
        for sign in (1e4, -1e4):
            advantages = jnp.full((1, 2), sign)
            assert jnp.isfinite(loss(far, -far, advantages)).all(), dual_clip
            gradient = jax.grad(lambda lp, loss=loss, a=advantages: jnp.sum(loss(lp, -far, a)))(far)
            assert jnp.isfinite(gradient).all(), dual_clip


@given(seeds)
def test_value_loss_equals_the_loop(seed):
    values, old, returns = floats(seed), floats(seed + 1), floats(seed + 2)
    expected = oracles.each(lambda *x: oracles.value_loss(*x, 0.2), values, old, returns)
    np.testing.assert_allclose(value_loss(values, old, returns), expected, rtol=1e-4, atol=1e-5)


def test_value_loss_by_hand():
    # V = 1, V_old = 0, clip 0.2 -> clipped 0.2. R = 1: max(0, 0.64)/2. R = 0: max(1, 0.04)/2.
    ones, zeros = jnp.ones((1, 2)), jnp.zeros((1, 2))
    np.testing.assert_allclose(ppo_value_loss(ones, zeros, jnp.array([[1.0, 0.0]]), clip=0.2), [[0.32, 0.5]], rtol=1e-6)


def test_value_gradient_stops_where_the_clip_binds_away_from_the_return():
    values, old = jnp.array([[1.0, 0.1]]), jnp.zeros((1, 2))
    gradient = jax.grad(lambda v: jnp.sum(ppo_value_loss(v, old, jnp.array([[1.0, 1.0]]), clip=0.2)))(values)
    np.testing.assert_allclose(gradient, [[0.0, -0.9]], rtol=1e-6)


@jax.jit
def masked_losses(logprobs, old, advantages, values, old_values, returns, mask):
    """How a step must use the losses: select first, so that NaN behind the mask is out of the arithmetic."""

    def loss(logprobs, values):
        selected = [jnp.where(mask, x, 0.0) for x in (logprobs, old, advantages, values, old_values, returns)]
        return masked_mean(POLICIES[None](*selected[:3]) + value_loss(*selected[3:]), mask)

    return jax.value_and_grad(loss, argnums=(0, 1))(logprobs, values)


@given(seeds, masks())
def test_nan_behind_the_mask_changes_neither_loss_nor_gradient(seed, mask):
    arrays = [floats(seed + i) for i in range(6)]
    clean = masked_losses(*arrays, mask)
    dirty = masked_losses(*(with_nan(x, mask) for x in arrays), mask)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
        assert jnp.isfinite(b).all()


def test_jit_and_vmap_agree_with_plain_calls():
    arrays = [jnp.asarray(floats(i, 2, 3, 4)) for i in range(3)]
    plain = jnp.stack([ppo_policy_loss(*(x[i] for x in arrays), clip=0.2, dual_clip=3.0) for i in range(2)])
    mapped = jax.jit(jax.vmap(lambda *x: ppo_policy_loss(*x, clip=0.2, dual_clip=3.0)))(*arrays)
    np.testing.assert_allclose(mapped, plain, rtol=1e-6)
    plain = jnp.stack([ppo_value_loss(*(x[i] for x in arrays), clip=0.2) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(lambda *x: ppo_value_loss(*x, clip=0.2))(*arrays), plain, rtol=1e-6)
