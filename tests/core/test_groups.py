"""Advantages within groups of answers, held against a loop over the groups."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jrlhf.core import equal_scores, group_advantages
from tests.support.strategies import seeds

ROWS = 8
CASES = [("mean", False), ("mean", True), ("leave_one_out", False), ("leave_one_out", True), ("none", False)]
advantages_of = {
    case: jax.jit(lambda s, g, v, case=case: group_advantages(s, g, baseline=case[0], scale=case[1], valid=v))
    for case in CASES
}


def loop(scores, groups, valid, baseline, scale):
    """Each answer for itself, from the definition."""
    out = []
    for i, own in enumerate(scores):
        members = [
            j for j in range(len(scores)) if groups[j] == groups[i] and valid[j] and math.isfinite(float(scores[j]))
        ]
        if i not in members:
            out.append(0.0)
            continue
        if baseline == "none":
            out.append(float(own))
            continue
        known = [float(scores[j]) for j in members]
        others = [float(scores[j]) for j in members if j != i]
        if len(known) < 2 or min(known) == max(known):
            out.append(0.0)
            continue
        base = statistics.fmean(known if baseline == "mean" else others)
        out.append((float(own) - base) / (statistics.stdev(known) + 1e-4 if scale else 1.0))
    return np.array(out)


@pytest.mark.parametrize("case", CASES)
@given(seeds, hnp.arrays(np.int32, ROWS, elements=st.integers(0, 3)), hnp.arrays(np.bool_, ROWS))
def test_advantages_equal_the_loop(case, seed, groups, valid):
    rng = np.random.default_rng(seed)
    # Few different scores, so that groups of equal ones occur; some are missing.
    scores = rng.choice([0.0, 0.1, 1.0, 2.5, np.nan], ROWS).astype(np.float32)
    found = advantages_of[case](scores, groups, valid)
    np.testing.assert_allclose(found, loop(scores, groups, valid, *case), rtol=1e-4, atol=1e-5)


def test_by_hand():
    scores, groups = jnp.array([1.0, 0.0, 5.0, 5.0]), jnp.array([0, 0, 1, 1])
    mean = group_advantages(scores, groups, baseline="mean", scale=False)
    np.testing.assert_allclose(mean, [0.5, -0.5, 0.0, 0.0])
    others = group_advantages(scores, groups, baseline="leave_one_out", scale=False)
    np.testing.assert_allclose(others, [1.0, -1.0, 0.0, 0.0])
    # The standard deviation of 1 and 0 over n - 1 is √½.
    scaled = group_advantages(scores, groups, baseline="mean", scale=True)
    np.testing.assert_allclose(scaled, np.array([0.5, -0.5, 0.0, 0.0]) / (math.sqrt(0.5) + 1e-4), rtol=1e-6)


@pytest.mark.parametrize("case", CASES[:4])
def test_equal_scores_give_exactly_nothing(case):
    """Three times 0.1 is not 0.3: the mean alone would leave a rounding, which 1e-4 would turn into a signal."""
    scores = jnp.full(ROWS, 0.1)
    found = group_advantages(scores, jnp.array([0, 0, 0, 1, 1, 1, 1, 2]), baseline=case[0], scale=case[1])
    np.testing.assert_array_equal(found, np.zeros(ROWS))


def test_whole_numbers_are_scores_too():
    found = group_advantages(jnp.array([2, 1]), jnp.array([0, 0]), baseline="mean", scale=False)
    np.testing.assert_allclose(found, [0.5, -0.5])


def test_leave_one_out_is_the_mean_s_advantage_times_n_over_n_minus_one():
    scores, groups = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.zeros(4, jnp.int32)
    mean, others = (group_advantages(scores, groups, baseline=b, scale=False) for b in ("mean", "leave_one_out"))
    np.testing.assert_allclose(others, mean * 4 / 3, rtol=1e-6)


def test_a_group_is_equal_by_its_valid_scores_alone():
    scores = jnp.array([1.0, 1.0, 3.0, jnp.nan, 2.0, 4.0, jnp.nan, jnp.nan])
    groups, valid = jnp.array([0, 0, 0, 1, 1, 2, 3, 3]), jnp.arange(8) != 2
    expected = [True, True, True, True, True, True, True, True]
    np.testing.assert_array_equal(equal_scores(scores, groups, valid=valid), expected)
    np.testing.assert_array_equal(equal_scores(scores, groups)[:3], [False] * 3)


def test_scale_needs_a_baseline():
    with pytest.raises(ValueError, match="needs one"):
        group_advantages(jnp.ones(2), jnp.zeros(2, jnp.int32), baseline="none", scale=True)
