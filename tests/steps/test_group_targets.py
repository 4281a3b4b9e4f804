"""GRPO's targets: penalties, the place of the KL, several rewards apart, answers without a score; all by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.steps import group_metrics, make_group_targets, make_policy_readings, rollout_metrics
from jrlhf.steps.groups import group_numbers, overlong_excess
from jrlhf.types import Generation, Readings

LENGTHS = (2, 4, 4, 1)
RESPONSE = jnp.arange(6)[None] - 2 < jnp.array(LENGTHS)[:, None]
RESPONSE = RESPONSE & (jnp.arange(6) >= 2)[None]
SCORES = jnp.array([1.0, 0.0, 2.0, 2.0])
OFF = {
    "samples": 2,
    "baseline": "mean",
    "scale": False,
    "weights": None,
    "kl_place": None,
    "kl_estimator": "k1",
    "missing_eos_penalty": 0.0,
    "max_new_tokens": 4,
    "overlong_buffer": 0,
    "overlong_penalty": 0.0,
}


def generation(response=RESPONSE):
    mask = response | (jnp.arange(6) < 2)[None]
    tokens = jnp.ones((4, 6), jnp.int32)
    return Generation(tokens, mask, response, jnp.full((4, 6), -0.5), jnp.array([True, False, False, True]))


def readings(kl=None):
    """The reference is ``kl`` nats below the policy at every token; None: there is none."""
    logprobs = jnp.full((4, 6), -1.0)
    return Readings(logprobs, jnp.ones((4, 6)), None if kl is None else logprobs - kl, None)


def targets(scores=SCORES, *, kl=None, beta=0.0, parts=None, response=RESPONSE, **how):
    return make_group_targets(**OFF | how)(generation(response), readings(kl), scores, parts or {}, jnp.float32(beta))


def advantages(*args, **how):
    """One an answer, after a look at whether all its tokens have the same and all other tokens none."""
    rollout = targets(*args, **how)
    found = np.asarray(rollout.advantages)
    own = found[np.arange(4), np.asarray(rollout.response_mask).argmax(axis=1)]
    np.testing.assert_array_equal(found, np.where(rollout.response_mask, own[:, None], 0.0))
    return own


def test_baselines_by_hand():
    np.testing.assert_allclose(advantages(), [0.5, -0.5, 0.0, 0.0])
    np.testing.assert_allclose(advantages(baseline="leave_one_out"), [1.0, -1.0, 0.0, 0.0])
    np.testing.assert_allclose(advantages(baseline="none"), SCORES)


def test_penalties_are_taken_from_the_scores():
    # The second and third answers were cut.
    np.testing.assert_allclose(advantages(missing_eos_penalty=0.5), [0.75, -0.75, -0.25, 0.25])
    # Both have 4 of 4 tokens, so they reach to the end of the buffer; the first has 2 of 4: its begin.
    np.testing.assert_allclose(overlong_excess(RESPONSE, max_new_tokens=4, buffer=2), [0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(overlong_excess(RESPONSE, max_new_tokens=5, buffer=2), [0.0, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(overlong_excess(RESPONSE, max_new_tokens=4, buffer=0), np.zeros(4))
    np.testing.assert_allclose(advantages(overlong_buffer=2, overlong_penalty=0.5), [0.75, -0.75, -0.25, 0.25])


def test_the_kl_is_in_the_score_or_in_the_loss_or_nowhere():
    # 0.1 nats a token and β 0.5: answers of 2, 4, 4 and 1 tokens lose 0.1, 0.2, 0.2 and 0.05.
    found = targets(kl=0.1, beta=0.5, kl_place="reward")
    np.testing.assert_allclose(jnp.sum(found.rewards, axis=-1), SCORES - jnp.array([0.1, 0.2, 0.2, 0.05]), rtol=1e-5)
    expected = [0.55, -0.55, -0.075, 0.075]
    np.testing.assert_allclose(advantages(kl=0.1, beta=0.5, kl_place="reward"), expected, rtol=1e-4)
    assert found.kl_coef is None
    found = targets(kl=0.1, beta=0.5, kl_place="loss")
    np.testing.assert_allclose(found.kl_coef, np.full(4, 0.5))
    np.testing.assert_allclose(jnp.sum(found.rewards, axis=-1), SCORES)
    assert targets(kl=0.1, beta=0.5).kl_coef is None
    for place in ("reward", "loss"):
        with pytest.raises(ValueError, match="needs the readings of a reference"):
            targets(kl_place=place)


def test_an_answer_alone_has_no_baseline():
    for baseline in ("mean", "leave_one_out"):
        with pytest.raises(
            ValueError, match=f"samples is 1, but the baseline {baseline} sets an answer against its group"
        ):
            targets(samples=1, baseline=baseline)
    np.testing.assert_allclose(advantages(samples=1, baseline="none"), SCORES)


def test_rewards_apart_are_scaled_each_and_whitened_together():
    parts = {"model": jnp.array([100.0, 0.0, 50.0, 50.0]), "rule/stop": jnp.array([0.0, 1.0, 0.0, 1.0])}
    found = advantages(parts=parts, scale=True, weights={"model": 1.0, "rule/stop": 3.0})
    unit = np.sqrt(0.5)  # (1 - ½) / the standard deviation of 1 and 0
    mixed = np.array([unit - 3 * unit, -unit + 3 * unit, -3 * unit, 3 * unit])
    np.testing.assert_allclose(found, mixed / mixed.std(), rtol=1e-3)
    # Added first, the model's hundreds drown the rule.
    total = parts["model"] + 3 * parts["rule/stop"]
    np.testing.assert_allclose(advantages(total, scale=True)[:2], [unit, -unit], rtol=1e-3)


def test_an_answer_without_a_score_is_in_no_baseline():
    response = RESPONSE.at[1].set(False)
    found = targets(SCORES.at[1].set(0.0), response=response)
    np.testing.assert_array_equal(found.advantages, np.zeros((4, 6)))
    # With a response, a score that is not a number must stop the update.
    found = np.asarray(targets(SCORES.at[1].set(jnp.nan)).advantages)
    np.testing.assert_array_equal(np.isnan(found).any(axis=1), [False, True, False, False])


def test_readings_need_no_reference_and_no_forward_pass_of_the_sampler_s_own():
    calls = []

    def logprob_fn(params, tokens, mask, /, *, temperature, where):
        calls.append(params)
        return jnp.full(tokens.shape, float(params)), jnp.ones(tokens.shape)

    read = make_policy_readings(logprob_fn, temperature=0.7)
    alone, both = read(-1, None, generation()), read(-1, -2, generation())
    assert (alone.values, alone.ref_logprobs) == (None, None)
    np.testing.assert_array_equal(both.ref_logprobs - both.logprobs, np.full((4, 6), -1.0))
    assert calls == [-1, -1, -2]
    sampled = make_policy_readings(logprob_fn, temperature=0.7, from_sampler=True)(-1, None, generation())
    np.testing.assert_array_equal(sampled.logprobs, np.full((4, 6), -0.5))
    np.testing.assert_array_equal(sampled.entropy, np.full((4, 6), 0.5))
    assert len(calls) == 3


def test_metrics_of_a_rollout_without_critic_and_reference():
    rollout = targets()
    metrics = rollout_metrics(rollout)
    assert not {"kl", "value/explained_variance"} & {*metrics}
    assert metrics["reward/score_mean"] == 1.25
    assert "kl" in rollout_metrics(targets(kl=0.1))
    groups = group_metrics(rollout, samples=2)
    np.testing.assert_allclose(groups["groups/degenerate"], 0.5)
    np.testing.assert_allclose(groups["groups/score_std"], np.sqrt(0.5) / 2, rtol=1e-6)
    # A group without an answer is no group.
    empty = targets(response=RESPONSE.at[2:].set(False))
    np.testing.assert_allclose(group_metrics(empty, samples=2)["groups/degenerate"], 0.0)


def test_groups_are_neighbours():
    np.testing.assert_array_equal(group_numbers(6, 3), [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="not groups of 4"):
        group_numbers(6, 4)
