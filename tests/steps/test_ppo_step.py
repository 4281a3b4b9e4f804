"""The update itself. Options are in ``test_ppo_options``, what always holds in ``test_ppo_invariants``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrlhf.core import answer_keys, from_logits
from jrlhf.steps import make_experience, make_generate, rollout_metrics, separate
from jrlhf.steps.minibatches import shuffled_minibatches
from jrlhf.types import DecodeFns
from tests.support.batches import (
    KEY,
    assert_close,
    assert_same,
    descend,
    jit,
    rollout_batch,
    sft_batch,
    take,
)
from tests.support.ppo import ppo_step, reference_loss, start
from tests.support.tiny_models import recomputing_decode


def reference_update(model, **how):
    """``(params, rollout)`` -> the parameters after one step of gradient descent with rate 1, and its report."""
    gradient_fn = jit(jax.grad(lambda p, rollout: reference_loss(model, p, rollout, **how), has_aux=True))

    def update(params, rollout):
        gradient, parts = gradient_fn(params, rollout)
        return descend(params, gradient), parts

    return update


def test_first_update_equals_the_reference(model):
    how = {"dual_clip": 1.3, "entropy_coef": 0.5}
    rollout = rollout_batch(model.apply_fn, model.params)
    state = start(model)
    expected, parts = reference_update(model, **how)(state.params, rollout)
    after, metrics = ppo_step(model, **how)(state, rollout, KEY)
    assert_close(after.params, expected)
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert 0.0 < metrics["policy/clipfrac"] < 1.0  # the clip binds somewhere, so it is tested
    assert (int(after.step), int(metrics["policy/updates"])) == (1, 1)


def test_several_epochs_are_the_reference_over_the_shuffled_minibatches(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params)
    state = start(plain)
    expected = state.params
    batches = shuffled_minibatches(rollout, KEY, epochs=2, minibatches=2)
    update, losses = reference_update(plain), []
    for i in range(4):
        expected, parts = update(expected, take(batches, i))
        losses.append(parts["loss"])
    after, metrics = ppo_step(plain, epochs=2, minibatches=2)(state, rollout, KEY)
    assert_close(after.params, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
    assert (int(after.step), int(metrics["policy/updates"])) == (4, 4)


def test_accumulation_is_a_bigger_batch(model):
    rollout = rollout_batch(model.apply_fn, model.params)._replace(ptx=sft_batch((2, 10, 3, 1)))
    how = {"ptx_coef": 0.5, "entropy_coef": 0.1}
    whole, metrics = ppo_step(model, **how)(start(model), rollout, KEY)
    sliced, sliced_metrics = ppo_step(model, accumulation=4, **how)(start(model), rollout, KEY)
    assert_close(sliced.params, whole.params, atol=2e-6)
    assert_close(sliced_metrics, metrics, atol=2e-6)


def experience(model, params, reward, key):
    """One rollout of six prompts, as a stage makes it."""
    generate = make_generate(
        DecodeFns(*recomputing_decode(model.apply_fn)),
        max_new_tokens=5,
        temperature=0.7,
        top_k=0,
        top_p=1.0,
        stop_tokens=(2,),
        pad_token=0,
    )
    make = make_experience(
        separate(from_logits(model.apply_fn), model.score_fn),
        temperature=0.7,
        gamma=1.0,
        lam=0.95,
        kl_estimator="k1",
        missing_eos_penalty=0.0,
        whiten_rewards=False,
    )
    prompts = jnp.array([[0, 1], [0, 2], [3, 1], [4, 4], [0, 5], [6, 3]] * 4, jnp.int32)
    mask = jnp.array([[False, True], [False, True], [True, True], [True, True], [False, True], [True, True]] * 4)
    generation = generate(params.policy, prompts, mask, answer_keys(key, jnp.arange(len(prompts)), samples=1))
    return make(params.policy, model.params, params.value, generation, reward(generation), jnp.float32(0.01))


def share_of_threes(generation):
    hits = jnp.sum((generation.tokens == 3) & generation.response_mask, axis=-1, dtype=jnp.float32)
    return hits / jnp.sum(generation.response_mask, axis=-1, dtype=jnp.float32)


def test_it_learns_to_please(model):
    tx = optax.adam(3e-2)
    rollout_of = jit(lambda params, key: experience(model, params, share_of_threes, key))
    step, state, scores = ppo_step(model, tx, epochs=2, minibatches=2), start(model, tx), []
    for i in range(20):
        rollout = rollout_of(state.params, jax.random.key(i))
        scores.append(float(rollout.scores.mean()))
        state, metrics = step(state, rollout, jax.random.key(100 + i))
        assert metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    assert np.mean(scores[-3:]) > 0.8 > 0.5 > np.mean(scores[:2])


def test_lr_zero_moves_nothing_and_the_ratio_is_one(plain):
    rollout = jit(lambda p, k: experience(plain, p, share_of_threes, k))(start(plain).params, KEY)
    assert rollout_metrics(rollout)["kl"] == 0.0
    tx = optax.adam(0.0)
    state = start(plain, tx)
    after, metrics = ppo_step(plain, tx, epochs=2, minibatches=3)(state, rollout, KEY)
    assert_same(after.params, state.params)
    assert metrics["policy/max_abs_log_ratio"] < 1e-5
    assert metrics["policy/approxkl"] < 1e-10
    assert metrics["policy/clipfrac"] == 0.0
    for name in ("policy/ratio_mean", "policy/ratio_max"):
        np.testing.assert_allclose(metrics[name], 1.0, atol=1e-5)
    forgetful = ppo_step(plain, tx, temperature=1.0)(state, rollout, KEY)[1]
    assert forgetful["policy/first_minibatch_max_abs_log_ratio"] > 1e-2
