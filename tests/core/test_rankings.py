import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jrlhf.core import kwise_centering_loss, kwise_ranking_loss, ordered_pairs, ranking_loss
from tests.support import oracles
from tests.support.strategies import floats, masks, seeds, with_nan

ROWS, K = 3, 4
ranks_with_ties = hnp.arrays(np.int32, (ROWS, K), elements=st.integers(0, 3))
kwise = jax.jit(kwise_ranking_loss)
centering = jax.jit(kwise_centering_loss)
kwise_gradient = jax.jit(jax.grad(lambda s, r, m: jnp.sum(kwise_ranking_loss(s, r, m) + kwise_centering_loss(s, r, m))))


@given(seeds)
def test_pairwise_equals_the_loop(seed):
    chosen, rejected, margin = floats(seed, ROWS), floats(seed + 1, ROWS), np.abs(floats(seed + 2, ROWS))
    expected = oracles.each(lambda c, r, m: oracles.minus_log_sigmoid(c - r - m), chosen, rejected, margin)
    np.testing.assert_allclose(jax.jit(ranking_loss)(chosen, rejected, margin), expected, rtol=1e-5, atol=1e-6)


def test_pairwise_by_hand():
    chosen, rejected = jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(ranking_loss(chosen, rejected), [0.693147, 2.126928], rtol=1e-5)
    np.testing.assert_allclose(ranking_loss(chosen, rejected, 1.0), [1.313262, 3.048587], rtol=1e-5)


@given(seeds, ranks_with_ties, masks(ROWS, K))
def test_kwise_and_centring_equal_the_loop(seed, ranks, mask):
    scores, margin = floats(seed, ROWS, K), np.abs(floats(seed + 1, ROWS))
    hidden = with_nan(scores, mask)
    expected = [oracles.kwise_ranking(s, r, m, g) for s, r, m, g in zip(scores, ranks, mask, margin, strict=True)]
    np.testing.assert_allclose(kwise(hidden, ranks, mask, margin), expected, rtol=1e-5, atol=1e-6)
    expected = [oracles.kwise_centering(s, r, m) for s, r, m in zip(scores, ranks, mask, strict=True)]
    np.testing.assert_allclose(centering(hidden, ranks, mask), expected, rtol=1e-5, atol=1e-6)


@given(seeds, ranks_with_ties, masks(ROWS, K))
def test_nan_in_a_missing_completion_changes_no_gradient(seed, ranks, mask):
    scores = floats(seed, ROWS, K)
    gradient = kwise_gradient(with_nan(scores, mask), ranks, mask)
    np.testing.assert_array_equal(gradient, kwise_gradient(np.where(mask, scores, 7.0), ranks, mask))
    assert jnp.isfinite(gradient).all()
    assert (np.asarray(gradient)[~mask] == 0.0).all()


@given(seeds, ranks_with_ties, masks(ROWS, K))
def test_order_of_the_completions_does_not_matter(seed, ranks, mask):
    scores, order = floats(seed, ROWS, K), np.random.default_rng(seed).permutation(K)
    moved = kwise(scores[:, order], ranks[:, order], mask[:, order])
    np.testing.assert_allclose(moved, kwise(scores, ranks, mask), rtol=1e-5, atol=1e-6)


def test_two_completions_are_the_pairwise_loss():
    scores, margin = jnp.asarray(floats(0, 5, 2)), jnp.abs(jnp.asarray(floats(1, 5)))
    ranks, mask = jnp.tile(jnp.array([[0, 1]]), (5, 1)), jnp.ones((5, 2), bool)
    pairwise = ranking_loss(scores[:, 0], scores[:, 1], margin)
    np.testing.assert_array_equal(kwise_ranking_loss(scores, ranks, mask, margin), pairwise)
    # and with the better one second
    np.testing.assert_array_equal(kwise_ranking_loss(scores[:, ::-1], 1 - ranks, mask, margin), pairwise)


def test_kwise_by_hand():
    scores = jnp.array([[2.0, 1.0, 0.0]])
    every, ties = jnp.array([[0, 1, 2]]), jnp.array([[0, 1, 1]])
    mask = jnp.ones((1, 3), bool)
    one, two = 0.313262, 0.126928  # -log σ(1), -log σ(2)
    np.testing.assert_allclose(kwise_ranking_loss(scores, every, mask), [(2 * one + two) / 3], rtol=1e-5)
    np.testing.assert_allclose(kwise_ranking_loss(scores, ties, mask), [(one + two) / 2], rtol=1e-5)
    np.testing.assert_allclose(kwise_centering_loss(scores, ties, mask), [(9.0 + 4.0) / 2], rtol=1e-6)
    pairs = ordered_pairs(ties, jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(pairs, [[[False, True, False], [False] * 3, [False] * 3]])


@pytest.mark.parametrize("mask", [[[True, True, True]], [[True, False, False]], [[False, False, False]]])
def test_no_strict_pair_is_no_loss(mask):
    ranks = jnp.zeros((1, 3), jnp.int32)  # all tied, one completion, none
    scores = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(kwise_ranking_loss(scores, ranks, jnp.array(mask), 1.0), [0.0])
    np.testing.assert_array_equal(kwise_centering_loss(scores, ranks, jnp.array(mask)), [0.0])
    np.testing.assert_array_equal(kwise_gradient(scores, ranks, jnp.array(mask)), jnp.zeros((1, 3)))


def test_huge_scores_are_finite():
    scores, ranks = jnp.array([[-1e4, 1e4], [1e4, -1e4]]), jnp.array([[0, 1], [0, 1]])
    mask = jnp.ones((2, 2), bool)
    np.testing.assert_allclose(kwise_ranking_loss(scores, ranks, mask), [2e4, 0.0])
    np.testing.assert_allclose(
        jax.grad(lambda s: jnp.sum(kwise_ranking_loss(s, ranks, mask)))(scores), [[-1.0, 1.0], [0.0, 0.0]]
    )
    assert ranking_loss(scores[:, 0].astype(jnp.bfloat16), scores[:, 1].astype(jnp.bfloat16)).dtype == jnp.float32


def test_vmap_over_models():
    scores = jnp.asarray(floats(0, 2, ROWS, K))
    ranks, mask = jnp.tile(jnp.arange(K), (ROWS, 1)), jnp.ones((ROWS, K), bool)
    each = jax.vmap(lambda s: kwise_ranking_loss(s, ranks, mask))(scores)
    for got, s in zip(each, scores, strict=True):
        np.testing.assert_allclose(got, kwise_ranking_loss(s, ranks, mask), rtol=1e-6)
