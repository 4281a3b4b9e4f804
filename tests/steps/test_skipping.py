"""A loss or gradient that is not finite moves nothing, in any stage, and is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import from_logits
from jrlhf.steps import make_reward_step, make_sft_step
from jrlhf.steps.ppo import shuffled_minibatches
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    jit,
    moved,
    new_state,
    ranking_batch,
    rollout_batch,
    sft_batch,
)
from tests.support.ppo import ppo_step, start

TX = optax.adam(0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient alone"])
def test_sft_and_reward_steps_leave_a_bad_batch_out(plain, where, bad):
    @jax.custom_vjp
    def broken(x):
        return x * jnp.float32(bad) if where == "loss" else x

    broken.defvjp(lambda x: (broken(x), None), lambda _, dy: (dy * jnp.float32(bad),))

    def steps(spoil):
        sft = make_sft_step(from_logits(lambda p, t, m: spoil(plain.apply_fn(p, t, m))), TX, accumulation=1)
        reward = make_reward_step(lambda p, t, m: spoil(plain.score_fn(p, t, m)), TX, center_coef=0.1, accumulation=1)
        return (sft, plain.params, sft_batch()), (reward, plain.value_params, ranking_batch())

    for (good, params, batch), (step, _, _) in zip(steps(lambda x: x), steps(broken), strict=True):
        before, metrics = jit(good)(new_state(params, TX), batch, KEY)
        assert metrics["skipped"] == 0
        after, metrics = jit(step)(before, batch, KEY)
        assert_same(after, before)
        assert (metrics["skipped"], after.step) == (1, 1)


@pytest.mark.parametrize("name", ["logprobs", "advantages", "returns"])
def test_ppo_leaves_out_the_minibatch_alone_that_is_bad(plain, name):
    rollout = rollout_batch(plain.apply_fn, plain.params, noise=0.0)
    spoilt = rollout._replace(**{name: getattr(rollout, name).at[2, 5].set(jnp.nan)})
    assert rollout.response_mask[2, 5]
    state = start(plain, TX, ema=plain.params)
    step = ppo_step(plain, TX, minibatches=2, ema_decay=0.9)
    after, metrics = step(state, spoilt, KEY)
    assert (metrics["skipped"], metrics["policy/updates"], after.step) == (1, 1, 1)
    assert moved(after.params, state.params)
    assert all_finite((after, metrics["loss"], metrics["grad_norm"], metrics["policy/ratio_max"]))
    spoilt_all = rollout._replace(**{name: jnp.full_like(getattr(rollout, name), jnp.nan)})
    unmoved, metrics = step(after, spoilt_all, KEY)
    assert_same(unmoved, after)
    assert (metrics["skipped"], metrics["policy/updates"]) == (2, 0)
    assert not np.isfinite(metrics["loss"])


def test_a_good_minibatch_s_update_is_that_of_the_step_without_the_bad_one(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params, noise=0.0)
    state = start(plain, TX)
    halves = shuffled_minibatches(rollout, KEY, epochs=1, minibatches=2)
    good, bad = (jax.tree.map(lambda x, i=i: x[i], halves) for i in (1, 0))
    rows = {tuple(row) for row in np.asarray(bad.tokens).tolist()}
    is_bad = jnp.asarray([tuple(row) in rows for row in np.asarray(rollout.tokens).tolist()])
    spoilt = rollout._replace(advantages=jnp.where(is_bad[:, None], jnp.nan, rollout.advantages))
    after, _ = ppo_step(plain, TX, minibatches=2)(state, spoilt, KEY)
    expected, _ = ppo_step(plain, TX)(state, good, KEY)
    assert_close(after, expected, atol=1e-5)
