import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jrlhf.core import dpo_loss, kto_loss, kwise_dpo_loss, kwise_ranking_loss, ranking_loss, reference_point
from tests.support import oracles
from tests.support.strategies import floats, masks, seeds, with_nan

ROWS, K = 3, 4
KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("simpo", 0.0)]
of_each_kind = pytest.mark.parametrize(("kind", "label_smoothing"), KINDS)
ranks_with_ties = hnp.arrays(np.int32, (ROWS, K), elements=st.integers(0, 3))
pairwise = jax.jit(dpo_loss, static_argnames=("beta", "kind", "label_smoothing"))
kwise = jax.jit(kwise_dpo_loss, static_argnames=("beta", "kind", "label_smoothing"))


@of_each_kind
@given(seeds)
def test_pairs_equal_the_loop(kind, label_smoothing, seed):
    policy, reference = floats(seed, 5, scale=4.0), floats(seed + 1, 5, scale=4.0)
    margin = np.abs(floats(seed + 2, 5))
    options = {"beta": 0.3, "kind": kind, "label_smoothing": label_smoothing}
    expected = oracles.each(lambda p, r, m: oracles.dpo(p, r, m, **options), policy, reference, margin)
    np.testing.assert_allclose(pairwise(policy, reference, margin, **options), expected, rtol=2e-5, atol=1e-5)


@of_each_kind
@given(seeds, ranks_with_ties, masks(ROWS, K))
def test_rankings_equal_the_loop_over_their_pairs(kind, label_smoothing, seed, ranks, mask):
    logprobs, ref_logprobs = floats(seed, ROWS, K, scale=4.0), floats(seed + 1, ROWS, K, scale=4.0)
    margin = np.abs(floats(seed + 2, ROWS))
    options = {"beta": 0.3, "kind": kind, "label_smoothing": label_smoothing}
    rows = zip(logprobs, ref_logprobs, ranks, mask, margin, strict=True)
    expected = [oracles.kwise_dpo(*row, **options) for row in rows]
    hidden = with_nan(logprobs, mask), with_nan(ref_logprobs, mask)
    np.testing.assert_allclose(kwise(*hidden, ranks, mask, margin, **options), expected, rtol=2e-5, atol=1e-5)


def test_by_hand():
    # β·(Δπ - Δref) = 0.5 · (3 - 1) = 1, and with a margin of 1 it is 0.
    policy, reference = jnp.array([3.0]), jnp.array([1.0])
    options = {"beta": 0.5, "label_smoothing": 0.0}
    np.testing.assert_allclose(dpo_loss(policy, reference, kind="sigmoid", **options), [0.313262], rtol=1e-5)
    np.testing.assert_allclose(dpo_loss(policy, reference, 1.0, kind="sigmoid", **options), [math.log(2)], rtol=1e-6)
    # (2 - 1 / (2 · 0.5))² = 1
    np.testing.assert_allclose(dpo_loss(policy, reference, kind="ipo", **options), [1.0], rtol=1e-6)
    # 0.5 · 3 - 1.5 = 0, whatever a reference would say
    simpo = dpo_loss(policy, jnp.array([jnp.nan]), 1.5, kind="simpo", **options)
    np.testing.assert_allclose(simpo, [math.log(2)], rtol=1e-6)
    # 0.9 · 0.313262 + 0.1 · 1.313262
    smooth = dpo_loss(policy, reference, beta=0.5, kind="sigmoid", label_smoothing=0.1)
    np.testing.assert_allclose(smooth, [0.413262], rtol=1e-5)


@of_each_kind
def test_the_gradient_is_that_of_finite_differences(kind, label_smoothing):
    policy, reference, margin = 1.3, 0.4, 0.2
    options = {"beta": 0.7, "kind": kind, "label_smoothing": label_smoothing}
    gradient = jax.grad(lambda p: dpo_loss(p, jnp.float32(reference), jnp.float32(margin), **options))(
        jnp.float32(policy)
    )
    step = 1e-5
    above, below = (oracles.dpo(policy + s, reference, margin, **options) for s in (step, -step))
    np.testing.assert_allclose(gradient, (above - below) / (2 * step), rtol=1e-4)


def test_the_gradient_is_the_paper_s_weight():
    """Rafailov et al. 2023, section 4: -β·σ(-z), large where the implicit reward has the wrong order."""
    gradient = jax.grad(lambda p: jnp.sum(dpo_loss(p, jnp.zeros(2), beta=0.1, kind="sigmoid", label_smoothing=0.0)))
    np.testing.assert_allclose(
        gradient(jnp.array([30.0, -30.0])), [-0.1 / (1 + math.exp(3)), -0.1 / (1 + math.exp(-3))], rtol=1e-5
    )


def test_as_beta_falls_to_zero_nothing_is_ordered():
    policy, reference = jnp.asarray(floats(0, 5)), jnp.asarray(floats(1, 5))
    for beta, atol in ((1e-3, 5e-3), (0.0, 1e-7)):
        options = {"beta": beta, "kind": "sigmoid", "label_smoothing": 0.0}
        np.testing.assert_allclose(dpo_loss(policy, reference, **options), math.log(2), atol=atol)
        gradient = jax.grad(lambda p, o=options: jnp.sum(dpo_loss(p, reference, **o)))(policy)
        np.testing.assert_allclose(gradient, 0.0, atol=atol)


@of_each_kind
def test_two_answers_are_the_pair(kind, label_smoothing):
    logprobs, ref_logprobs = jnp.asarray(floats(0, 5, 2)), jnp.asarray(floats(1, 5, 2))
    margin = jnp.abs(jnp.asarray(floats(2, 5)))
    ranks, mask = jnp.tile(jnp.array([[0, 1]]), (5, 1)), jnp.ones((5, 2), bool)
    options = {"beta": 0.4, "kind": kind, "label_smoothing": label_smoothing}
    differences = (x[:, 0] - x[:, 1] for x in (logprobs, ref_logprobs))
    expected = dpo_loss(*differences, margin, **options)
    np.testing.assert_array_equal(kwise_dpo_loss(logprobs, ref_logprobs, ranks, mask, margin, **options), expected)
    # and with the better one second
    swapped = kwise_dpo_loss(logprobs[:, ::-1], ref_logprobs[:, ::-1], 1 - ranks, mask, margin, **options)
    np.testing.assert_array_equal(swapped, expected)


def test_it_is_the_ranking_loss_of_the_implicit_rewards():
    logprobs, ref_logprobs = jnp.asarray(floats(0, ROWS, K)), jnp.asarray(floats(1, ROWS, K))
    ranks, mask, margin = jnp.array([[0, 1, 1, 2]] * ROWS), jnp.ones((ROWS, K), bool), jnp.full(ROWS, 0.3)
    rewards = 0.5 * (logprobs - ref_logprobs)
    found = kwise_dpo_loss(logprobs, ref_logprobs, ranks, mask, margin, beta=0.5, kind="sigmoid", label_smoothing=0.0)
    np.testing.assert_allclose(found, kwise_ranking_loss(rewards, ranks, mask, margin), rtol=1e-5)
    pair = dpo_loss(logprobs[:, 0], ref_logprobs[:, 0], beta=0.5, kind="sigmoid", label_smoothing=0.0)
    np.testing.assert_allclose(pair, ranking_loss(rewards[:, 0], jnp.zeros(ROWS)), rtol=1e-5)


@pytest.mark.parametrize("mask", [[[True, True, True]], [[True, False, False]], [[False, False, False]]])
@of_each_kind
def test_no_strict_pair_is_no_loss(kind, label_smoothing, mask):
    ranks, logprobs = jnp.zeros((1, 3), jnp.int32), jnp.array([[-1.0, -2.0, -3.0]])
    options = {"beta": 0.1, "kind": kind, "label_smoothing": label_smoothing}

    def loss(x):
        return jnp.sum(kwise_dpo_loss(x, jnp.zeros((1, 3)), ranks, jnp.array(mask), 1.0, **options))

    assert loss(logprobs) == 0.0
    np.testing.assert_array_equal(jax.grad(loss)(logprobs), jnp.zeros((1, 3)))


@of_each_kind
@given(seeds, ranks_with_ties, masks(ROWS, K))
def test_nan_in_a_missing_answer_changes_no_gradient(kind, label_smoothing, seed, ranks, mask):
    logprobs, reference = floats(seed, ROWS, K), floats(seed + 1, ROWS, K)
    options = {"beta": 0.3, "kind": kind, "label_smoothing": label_smoothing}

    def gradient(x, ref):
        return jax.grad(lambda x: jnp.sum(kwise(x, ref, ranks, mask, **options)))(x)

    found = gradient(with_nan(logprobs, mask), with_nan(reference, mask))
    np.testing.assert_array_equal(found, gradient(np.where(mask, logprobs, 7.0), np.where(mask, reference, -7.0)))
    assert jnp.isfinite(found).all()
    assert (np.asarray(found)[~mask] == 0.0).all()


@of_each_kind
def test_huge_log_probs_are_finite(kind, label_smoothing):
    policy = jnp.array([1e4, -1e4], jnp.bfloat16)
    options = {"beta": 0.1, "kind": kind, "label_smoothing": label_smoothing}
    loss, gradient = jax.value_and_grad(lambda p: jnp.sum(dpo_loss(p, jnp.zeros(2, jnp.bfloat16), **options)))(policy)
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["ipo", "simpo"])
def test_only_the_sigmoid_has_smooth_labels(kind):
    with pytest.raises(ValueError, match=f"the loss {kind} has no label smoothing"):
        dpo_loss(jnp.ones(1), jnp.ones(1), beta=0.1, kind=kind, label_smoothing=0.1)


KTO = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
kto = jax.jit(
    lambda ratios, desirable, mismatched: kto_loss(
        ratios, desirable, reference_point(jnp.sum(mismatched), jnp.float32(len(mismatched))), **KTO
    )
)


@given(seeds, masks(5), st.sampled_from([-3.0, 0.0, 3.0]))
def test_labelled_answers_equal_the_loop(seed, desirable, shift):
    ratios, mismatched = floats(seed, 5, scale=6.0), floats(seed + 1, 5, scale=2.0) + np.float32(shift)
    expected = oracles.kto(ratios, desirable, mismatched, **KTO)
    np.testing.assert_allclose(kto(ratios, desirable, mismatched), expected, rtol=2e-5, atol=1e-6)


def test_labelled_answers_by_hand():
    # z₀ = mean(2, 0) = 1: of r = 1 half of λ is lost, and of r = 3 σ(-1) of λ = 2, or σ(1) of λ = 3
    point = reference_point(jnp.float32(2.0), jnp.float32(2.0))
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    losses = kto_loss(jnp.array([1.0, 1.0, 3.0, 3.0]), jnp.array([True, False] * 2), point, **options)
    np.testing.assert_allclose(losses, [1.0, 1.5, 2 * 0.268941, 3 * 0.731059], rtol=1e-5)
    assert reference_point(jnp.float32(-4.0), jnp.float32(2.0)) == 0.0
    assert reference_point(jnp.float32(0.0), jnp.float32(0.0)) == 0.0


@pytest.mark.parametrize("good", [True, False])
def test_the_gradient_of_a_labelled_answer_is_that_of_finite_differences(good):
    def loss(ratio, mismatched):
        point = reference_point(mismatched, jnp.float32(1.0))
        return kto_loss(ratio, jnp.bool_(good), point, **KTO)

    gradient, of_point = jax.grad(loss, argnums=(0, 1))(jnp.float32(1.3), jnp.float32(0.4))
    above, below = (oracles.kto([1.3 + s], [good], [0.4], **KTO)[0] for s in (1e-5, -1e-5))
    np.testing.assert_allclose(gradient, (above - below) / 2e-5, rtol=1e-4)
    assert of_point == 0.0, "z₀ is a constant"


def test_far_from_the_point_a_labelled_answer_has_no_gradient_and_is_finite():
    ratios, desirable = jnp.array([1e4, -1e4, 1e4, -1e4], jnp.bfloat16), jnp.array([True, True, False, False])
    loss, gradient = jax.value_and_grad(lambda r: jnp.sum(kto_loss(r, desirable, jnp.float32(1.0), **KTO)))(ratios)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1.3 + 0.7, rtol=1e-6)
    np.testing.assert_array_equal(gradient, jnp.zeros(4))
