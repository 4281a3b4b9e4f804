import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import kl_penalty, update_kl_coef
from tests.support import oracles
from tests.support.strategies import floats

ESTIMATORS = ("k1", "k2", "k3")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_loop(estimator):
    logprobs, ref = jnp.asarray(floats(0)), jnp.asarray(floats(1))
    expected = oracles.each(lambda a, b: oracles.kl(a, b, estimator), logprobs, ref)
    for variant in (lambda f: f, jax.jit, jax.vmap):
        kl = variant(lambda a, b: kl_penalty(a, b, estimator=estimator))(logprobs, ref)
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
    logprobs, ref = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))  # x = log 2
    for estimator, expected in zip(ESTIMATORS, (0.693147, 0.240227, 0.193147), strict=True):
        np.testing.assert_allclose(kl_penalty(logprobs, ref, estimator=estimator), [expected], atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_kl(estimator):
    p, q = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.3, 0.3, 0.4])
    exact = np.sum(np.array(p) * np.log(np.array(p) / np.array(q)))
    np.testing.assert_allclose(jnp.sum(p * kl_penalty(jnp.log(p), jnp.log(q), estimator=estimator)), exact, rtol=1e-5)


def test_expected_gradient_of_k2_is_that_of_the_reverse_kl():
    logits, q = jnp.array([0.5, -0.3, 0.1]), jnp.array([0.3, 0.3, 0.4])

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - jnp.log(q)))

    def sampled(logits, estimator):  # the sample's own distribution is not differentiated
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * kl_penalty(logp, jnp.log(q), estimator=estimator))

    np.testing.assert_allclose(jax.grad(sampled)(logits, "k2"), jax.grad(exact)(logits), atol=1e-6)
    np.testing.assert_allclose(jax.grad(sampled)(logits, "k1"), jnp.zeros(3), atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_at_equality_finite_at_extremes(estimator):
    x = jnp.asarray(floats(2))
    np.testing.assert_array_equal(kl_penalty(x, x, estimator=estimator), np.zeros_like(x))
    far = jnp.array([[-1e4, 1e4]])
    assert jnp.isfinite(kl_penalty(far, -far, estimator=estimator)).all()
    gradient = jax.grad(lambda x: jnp.sum(kl_penalty(x, -far, estimator=estimator)))(far)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("observed", [0.0, 3.0, 5.9, 6.0, 6.6, 7.2, 50.0, -1.0])
def test_controller_equals_the_loop(observed):
    update = jax.jit(lambda c, k, n: update_kl_coef(c, k, n, target=6.0, horizon=10_000))
    got = update(jnp.float32(0.15), jnp.float32(observed), jnp.int32(64))
    np.testing.assert_allclose(got, oracles.kl_coef(0.15, observed, 64, 6.0, 10_000), rtol=1e-6)


def test_controller_by_hand():
    # KL twice the target: the error is clipped to 0.2, so 0.1 · (1 + 0.2 · 512 / 1024) = 0.11.
    got = update_kl_coef(jnp.float32(0.1), jnp.float32(12.0), 512, target=6.0, horizon=1024)
    np.testing.assert_allclose(got, 0.11, rtol=1e-6)
    assert got.dtype == jnp.float32
