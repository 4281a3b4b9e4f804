"""The losses of critic-free methods: clip-higher, CISPO, and the weight between sampler and trainer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from jrlhf.core import cispo_loss, ppo_policy_loss, truncated_weights
from tests.support import oracles
from tests.support.strategies import floats, seeds

wide = jax.jit(lambda lp, old, adv: ppo_policy_loss(lp, old, adv, clip=0.2, clip_high=0.5, dual_clip=None))
cispo = jax.jit(lambda lp, old, adv: cispo_loss(lp, old, adv, clip=0.2, clip_high=0.5))
weights = jax.jit(lambda lp, old: truncated_weights(lp, old, cap=1.5))


def ratio_of(logprob, old):
    return math.exp(max(-20.0, min(20.0, logprob - old)))


def clipped_gain(logprob, old, advantage):
    ratio = ratio_of(logprob, old)
    return max(-advantage * ratio, -advantage * max(0.8, min(1.5, ratio)))


@given(seeds)
def test_losses_equal_the_loop(seed):
    logprobs, old, advantages = floats(seed), floats(seed + 1), floats(seed + 2)
    expected = oracles.each(clipped_gain, logprobs, old, advantages)
    np.testing.assert_allclose(wide(logprobs, old, advantages), expected, rtol=1e-4, atol=1e-5)
    expected = oracles.each(lambda x, y, a: -max(0.8, min(1.5, ratio_of(x, y))) * a * x, logprobs, old, advantages)
    np.testing.assert_allclose(cispo(logprobs, old, advantages), expected, rtol=1e-4, atol=1e-5)
    expected = oracles.each(lambda x, y: min(ratio_of(x, y), 1.5), logprobs, old)
    np.testing.assert_allclose(weights(logprobs, old), expected, rtol=1e-5)


def test_clip_higher_by_hand():
    # Ratios 1.4 and 1.6 with either sign of the advantage, clip 0.2 below and 0.5 above.
    ratio, advantages = jnp.array([[1.4, 1.6, 1.6, 0.7]]), jnp.array([[1.0, 1.0, -1.0, -1.0]])
    found = ppo_policy_loss(jnp.log(ratio), jnp.zeros((1, 4)), advantages, clip=0.2, clip_high=0.5, dual_clip=None)
    np.testing.assert_allclose(found, [[-1.4, -1.5, 1.6, 0.8]], rtol=1e-6)


def numeric_gradient(function, x, step=1e-2):
    """Central differences; ``function`` is elementwise."""
    return (function(x + step) - function(x - step)) / (2 * step)


def test_gradients_equal_finite_differences():
    logprobs, old, advantages = jnp.asarray(floats(0)), jnp.asarray(floats(1)), jnp.asarray(floats(2))
    ratio = np.exp(np.asarray(logprobs - old))
    far = (np.abs(ratio - 0.8) > 0.05) & (np.abs(ratio - 1.5) > 0.05)  # not at an edge of the clip
    found = jax.grad(lambda lp: jnp.sum(wide(lp, old, advantages)))(logprobs)
    expected = numeric_gradient(lambda lp: wide(lp, old, advantages), logprobs)
    np.testing.assert_allclose(found[far], expected[far], rtol=2e-2, atol=2e-3)
    # CISPO's weight is a constant: its gradient is the weight's times A, also where the clip binds.
    found = jax.grad(lambda lp: jnp.sum(cispo(lp, old, advantages)))(logprobs)
    np.testing.assert_allclose(found, -np.clip(ratio, 0.8, 1.5) * advantages, rtol=1e-5)
    assert np.all(np.asarray(found) != 0.0)
    assert np.any(ratio > 1.5)


def test_a_weight_has_no_gradient_and_is_one_where_the_programs_agree():
    logprobs, old = jnp.asarray(floats(0)), jnp.asarray(floats(1))
    gradient = jax.grad(lambda lp: jnp.sum(weights(lp, old)))(logprobs)
    np.testing.assert_array_equal(gradient, np.zeros(logprobs.shape))
    np.testing.assert_array_equal(weights(logprobs, logprobs), np.ones(logprobs.shape))
    assert float(jnp.max(weights(logprobs, old))) == 1.5
