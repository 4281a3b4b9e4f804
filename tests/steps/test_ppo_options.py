"""What can be switched on in a PPO step, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.steps.minibatches import shuffled_minibatches
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    descend,
    jit,
    moved,
    rollout_batch,
    sft_batch,
)
from tests.support.ppo import ppo_step, reference_loss, start
from tests.support.sft import reference_loss as sft_reference_loss


@pytest.fixture(scope="module")
def rollout(plain):
    """Old log-probs are the policy's own, as after a real rollout."""
    return rollout_batch(plain.apply_fn, plain.params, noise=0.0)


def minibatch(rollout, index, **how):
    return jax.tree.map(lambda x: x[index], shuffled_minibatches(rollout, KEY, **how))


def test_early_stop_leaves_the_last_good_update(plain, rollout):
    tx = optax.adam(0.1)
    state = start(plain, tx)
    how = {"epochs": 2, "minibatches": 2}
    good, _ = ppo_step(plain, tx)(state, minibatch(rollout, 0, **how), KEY)
    # The first minibatch has no KL yet, so its update lands; the second sees what it did and is dropped with the rest.
    after, metrics = ppo_step(plain, tx, target_approx_kl=1e-4, **how)(state, rollout, KEY)
    assert_close(after, good, atol=1e-5)
    assert (int(after.step), int(metrics["policy/updates"])) == (1, 1)
    assert metrics["policy/approxkl"] > 1e-4 / 2  # the mean over the two that were looked at
    free, metrics = ppo_step(plain, tx, target_approx_kl=1e6, **how)(state, rollout, KEY)
    assert (int(free.step), int(metrics["policy/updates"])) == (4, 4)


def test_a_nan_stops_before_it_lands(plain, rollout):
    broken = rollout._replace(logprobs=jnp.full_like(rollout.logprobs, jnp.nan))
    state = start(plain)
    after, metrics = ppo_step(plain, target_approx_kl=0.1, minibatches=2)(state, broken, KEY)
    assert_same(after, state)
    assert metrics["policy/updates"] == 0


def test_critic_warmup_freezes_the_policy_exactly(plain, rollout):
    tx = optax.adamw(1e-2, weight_decay=0.5)
    state = start(plain, tx, ema=plain.params)
    step = ppo_step(plain, tx, minibatches=2, critic_warmup_updates=2, ema_decay=0.9)
    warm, _ = step(state, rollout, KEY)
    assert_same(warm.params.policy, state.params.policy)
    assert_close(warm.ema, state.ema)
    assert moved(warm.params.value, state.params.value)
    after, _ = step(warm, rollout, KEY)
    assert moved(after.params.policy, warm.params.policy)
    # The critic learns as it would without the warm-up.
    free, _ = ppo_step(plain, tx, minibatches=2)(start(plain, tx), rollout, KEY)
    assert_close(warm.params.value, free.params.value)


def test_warmup_ends_between_minibatches(plain, rollout):
    step = ppo_step(plain, minibatches=2, critic_warmup_updates=1)
    after, _ = step(start(plain), rollout, KEY)
    second = minibatch(rollout, 1, epochs=1, minibatches=2)
    expected, _ = ppo_step(plain)(start(plain), second, KEY)
    assert_close(after.params.policy, expected.params.policy)


def test_ema_follows_its_recurrence(plain, rollout):
    state = start(plain, ema=jax.tree.map(jnp.ones_like, plain.params))
    step = ppo_step(plain, ema_decay=0.9)
    by_hand = state.ema
    for i in range(3):
        state, _ = step(state, rollout, jax.random.key(i))
        by_hand = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, by_hand, state.params.policy)
        assert_close(state.ema, by_hand)


def test_ptx_adds_its_own_gradient(plain, rollout):
    text = sft_batch()
    without, _ = ppo_step(plain)(start(plain), rollout, KEY)
    with_text, metrics = ppo_step(plain, ptx_coef=0.3)(start(plain), rollout._replace(ptx=text), KEY)
    nll, gradient = jit(jax.value_and_grad(lambda p: sft_reference_loss(plain.apply_fn, p, text)))(plain.params)
    expected = descend(without.params.policy, gradient, lr=0.3)
    assert_close(with_text.params.policy, expected)
    assert_same(with_text.params.value, without.params.value)
    np.testing.assert_allclose(metrics["loss/ptx"], nll, rtol=1e-5)
    # A coefficient of 0 does not look at the text.
    unused, _ = ppo_step(plain)(start(plain), rollout._replace(ptx=text), KEY)
    assert_close(unused.params, without.params)


def test_ptx_text_may_have_rows_of_its_own_number_and_width(plain, rollout):
    text = sft_batch((2, 12), width=12)
    after, metrics = ppo_step(plain, ptx_coef=0.3, minibatches=2)(start(plain), rollout._replace(ptx=text), KEY)
    assert all_finite((after.params, metrics))


def test_the_entropy_bonus_raises_entropy(plain, rollout):
    flat = rollout._replace(advantages=jnp.zeros_like(rollout.advantages))
    step = ppo_step(plain, entropy_coef=0.5)
    state = start(plain)
    after, before = step(state, flat, KEY)
    assert step(after, flat, KEY)[1]["policy/entropy"] > before["policy/entropy"] + 1e-3
    gradient = jit(jax.grad(lambda p: reference_loss(plain, p, flat)[1]["policy/entropy"]))(state.params)
    expected = descend(plain.params, gradient.policy, lr=-0.5)
    assert_close(after.params.policy, expected)


def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative(plain, rollout):
    # Old log-probs far below the new ones: every ratio is e².
    far = rollout._replace(logprobs=rollout.logprobs - 2.0, advantages=jnp.full_like(rollout.advantages, -1.0))
    bounded, metrics = ppo_step(plain, dual_clip=3.0)(start(plain), far, KEY)
    np.testing.assert_allclose(metrics["loss/policy"], 3.0, rtol=1e-5)
    assert_same(bounded.params.policy, plain.params)  # no gradient beyond the bound
    free, metrics = ppo_step(plain)(start(plain), far, KEY)
    np.testing.assert_allclose(metrics["loss/policy"], np.exp(2.0), rtol=1e-4)
    assert moved(free.params.policy, plain.params)


def test_actor_and_critic_share_no_gradient(plain, rollout):
    after, _ = ppo_step(plain, value_coef=0.0)(start(plain), rollout, KEY)
    assert_same(after.params.value, plain.value_params)
    again, _ = ppo_step(plain, value_coef=5.0)(start(plain), rollout, KEY)
    assert_close(again.params.policy, after.params.policy)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"minibatches": 3}, "4 rows do not divide into 3 minibatches"),
        ({"minibatches": 2, "accumulation": 4}, "2 rows do not divide into 4"),
        ({"ptx_coef": 0.1}, "carries no ptx"),
        ({"ema_decay": 0.9}, "has no ema"),
    ],
)
def test_what_cannot_work_is_refused(plain, rollout, how, message):
    with pytest.raises(ValueError, match=message):
        ppo_step(plain, **how)(start(plain), rollout, KEY)


def test_a_token_s_loss_is_weighted_by_what_its_sampler_did(plain):
    """A weight of 1 everywhere changes nothing; elsewhere the loss is that of the advantages times the weights."""
    rollout = rollout_batch(plain.apply_fn, plain.params)
    state = start(plain)
    after, _ = ppo_step(plain)(state, rollout, KEY)
    same, metrics = ppo_step(plain, sampler_weight_cap=1.5)(state, rollout, KEY)
    assert_same(same.params, after.params)
    assert metrics["sampler/weight_max"] == 1.0
    assert (metrics["sampler/weight_mean"], metrics["sampler/weight_capped"]) == (1.0, 0.0)
    off = 0.5 * rollout.rewards
    weights = np.minimum(np.exp(np.asarray(off)), 1.5)
    expected, _ = ppo_step(plain)(state, rollout._replace(advantages=rollout.advantages * weights), KEY)
    other = rollout._replace(sampler_logprobs=rollout.logprobs - off)
    found, metrics = ppo_step(plain, sampler_weight_cap=1.5)(state, other, KEY)
    assert_close(found.params, expected.params, atol=1e-6)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(metrics["sampler/weight_mean"], weights[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler/weight_max"], np.exp(np.asarray(off))[mask].max(), rtol=1e-5)
    capped = (np.exp(np.asarray(off)) > 1.5)[mask].mean()
    np.testing.assert_allclose(metrics["sampler/weight_capped"], capped, rtol=1e-5)
    assert 0.0 < capped < 1.0
