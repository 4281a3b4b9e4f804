"""GRPO's update and its relatives', held against their formulas and against PPO's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import answer_keys, from_logits, group_advantages
from jrlhf.models import decoder_fns, init_params
from jrlhf.steps import make_generate, make_group_targets, make_grpo_step, make_policy_readings
from jrlhf.types import DecodeFns
from tests.support.archs import ONE_LAYER
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    descend,
    jit,
    moved,
    new_state,
    pad_columns,
    rollout_batch,
    take,
)
from tests.support.grpo import grpo_settings, grpo_step, reference_loss, start
from tests.support.ppo import ppo_step
from tests.support.ppo import start as ppo_start
from tests.support.tiny_models import recomputing_decode

METHODS = {
    "grpo": {"aggregation": "sequence"},
    "dapo": {"clip_high": 0.4},
    "dr-grpo": {"aggregation": "constant"},
    "gspo": {"ratio": "sequence", "aggregation": "sequence", "clip": 0.05, "clip_high": 0.1},
    "cispo": {"loss": "cispo", "clip": 0.9, "clip_high": 0.3},
    "all else": {"dual_clip": 1.3, "entropy_coef": 0.5, "leave_out_cut": True, "sampler_weight_cap": 1.2},
}


def group_rollout(model, **how):
    """A rollout without a critic: one advantage an answer, a reference in the loss, and a sampler of its own."""
    return without_critic(rollout_batch(model.apply_fn, model.params, **how))


def without_critic(rollout):
    rows = rollout.scores.shape[0]
    return rollout._replace(
        values=None,
        returns=None,
        advantages=jnp.broadcast_to(rollout.scores[:, None], rollout.tokens.shape),
        sampler_logprobs=rollout.logprobs + 0.5 * rollout.rewards,
        stopped=jnp.arange(rows) != 1,
        kl_coef=jnp.full(rows, 0.3),
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_update_equals_the_reference(plain, method):
    rollout, state = group_rollout(plain), start(plain)
    settings = grpo_settings(**METHODS[method])
    value, gradient = jit(jax.value_and_grad(lambda p: reference_loss(plain, p, _outside(rollout), settings)))(
        state.params
    )
    after, metrics = grpo_step(plain, **METHODS[method])(state, rollout, KEY)
    assert_close(after.params, descend(state.params, gradient), atol=2e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    assert 0.0 < metrics["policy/clipfrac"] < 1.0  # the clip binds somewhere, so it is tested
    assert (int(after.step), int(metrics["policy/updates"])) == (1, 1)


def _outside(rollout):
    """The rollout as NumPy, so that loops can look at its masks."""
    return jax.tree.map(np.asarray, rollout)


def test_it_is_ppo_s_policy_step_for_the_same_advantages(plain):
    """K = 1 and no baseline: what differs is the critic alone."""
    rollout = rollout_batch(plain.apply_fn, plain.params)
    rollout = rollout._replace(sampler_logprobs=rollout.logprobs + 0.5 * rollout.rewards)
    how = {"epochs": 2, "minibatches": 2, "clip": 0.2, "entropy_coef": 0.1, "accumulation": 2}
    how |= {"sampler_weight_cap": 1.2}
    expected, was = ppo_step(plain, value_coef=0.0, **how)(ppo_start(plain), rollout, KEY)
    after, metrics = grpo_step(plain, **how)(start(plain), rollout._replace(values=None, returns=None), KEY)
    assert_close(after.params, expected.params.policy, atol=1e-6)
    same = ("loss", "loss/policy", "policy/entropy", "policy/approxkl", "policy/clipfrac", "policy/ratio_mean")
    same += ("policy/ratio_max", "policy/max_abs_log_ratio", "policy/first_minibatch_max_abs_log_ratio")
    same += ("sampler/weight_mean", "sampler/weight_capped", "sampler/weight_max")
    for name in same:
        np.testing.assert_allclose(metrics[name], was[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(metrics) == {*was} - {"loss/value", "value/clipfrac"}


@pytest.mark.parametrize("method", ["grpo", "gspo", "all else"])
def test_slices_padding_and_row_order_change_nothing(plain, method):
    rollout, state = group_rollout(plain), start(plain)
    after, metrics = grpo_step(plain, **METHODS[method])(state, rollout, KEY)
    others = [
        (rollout, {"accumulation": 4}),
        (pad_columns(rollout, 3, 2, fill=4), {}),
        (take(rollout, jnp.array([3, 1, 0, 2])), {}),
    ]
    for other, how in others:
        again, other_metrics = grpo_step(plain, **METHODS[method], **how)(state, other, KEY)
        assert_close(again.params, after.params, atol=2e-6)
        assert_close(other_metrics, metrics, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_packed_answers_have_the_same_update(method):
    """Several answers share a row, so an answer's mean is over its segment."""
    fns, params = decoder_fns(ONE_LAYER, dtype="float32", remat=False), init_params(ONE_LAYER, KEY)
    rollout = without_critic(rollout_batch(fns.apply_fn, params, rows=8, prompt=4, response=12))
    found = []
    for how in ({}, {"drop_padding": True, "accumulation": 4}):
        step = make_grpo_step(fns.logprob_fn, optax.sgd(1.0), grpo_settings(**METHODS[method], **how))
        found.append(jit(step)(new_state(params, optax.sgd(1.0)), rollout, KEY))
    (expected, was), (after, metrics) = found
    assert_close(after.params, expected.params, atol=1e-5)
    assert_close(metrics, was, atol=1e-4)


def test_nan_behind_the_mask_changes_nothing(plain):
    rollout, state = group_rollout(plain), start(plain)
    hide = lambda x: jnp.where(rollout.response_mask, x, jnp.nan)  # noqa: E731
    floats = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "rewards", "advantages")
    dirty = rollout._replace(**{name: hide(getattr(rollout, name)) for name in floats})
    for how in ({"ratio": "sequence"}, METHODS["all else"]):
        clean = grpo_step(plain, **how)(state, rollout, KEY)
        assert_same(grpo_step(plain, **how)(state, dirty, KEY), clean)
        assert all_finite(clean)


def test_an_update_that_would_learn_nothing_moves_nothing(plain):
    """No response, or an advantage that is not a number; momentum and decay alone would move it."""
    tx = optax.adamw(1e-2, weight_decay=0.1)
    rollout, state = group_rollout(plain), start(plain, tx)
    step = grpo_step(plain, tx, leave_out_cut=True)
    for other, skipped in (
        (rollout._replace(response_mask=rollout.response_mask & False), 0.0),
        (rollout._replace(stopped=rollout.stopped & False), 0.0),
        (rollout._replace(advantages=jnp.full(rollout.tokens.shape, jnp.nan)), 1.0),
    ):
        after, metrics = step(state, other, KEY)
        assert not moved(after.params, state.params)
        assert metrics["skipped"] == skipped


def test_the_average_follows_and_a_distance_stops_the_updates(plain):
    rollout, state = group_rollout(plain), start(plain, ema=plain.params)
    after, _ = grpo_step(plain, ema_decay=0.9)(state, rollout, KEY)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, plain.params, after.params)
    assert_close(after.ema, expected)
    stopped, metrics = grpo_step(plain, epochs=3, target_approx_kl=1e-9)(start(plain), rollout, KEY)
    assert not moved(stopped.params, plain.params)
    assert metrics["policy/updates"] == 0


def test_what_cannot_be_is_refused(plain):
    fn, tx = from_logits(plain.apply_fn), optax.sgd(1.0)
    for how in ({"ratio": "sequence"}, {"dual_clip": 2.0}):
        with pytest.raises(ValueError, match="cispo weighs single tokens"):
            make_grpo_step(fn, tx, grpo_settings(loss="cispo", **how))
    with pytest.raises(ValueError, match="no ema"):
        make_grpo_step(fn, tx, grpo_settings(ema_decay=0.5))(start(plain), group_rollout(plain), KEY)


SAMPLES = 4


def experience(model, params, key, *, reference=None, **how):
    """A rollout of four answers to each of six prompts, scored by the share of threes."""
    settings = {"baseline": "mean", "scale": True, "weights": None, "kl_place": None, "kl_estimator": "k3"}
    settings |= {"missing_eos_penalty": 0.0, "max_new_tokens": 5, "overlong_buffer": 0, "overlong_penalty": 0.0}
    generate = make_generate(
        DecodeFns(*recomputing_decode(model.apply_fn)),
        max_new_tokens=5,
        temperature=0.7,
        top_k=0,
        top_p=1.0,
        stop_tokens=(2,),
        pad_token=0,
    )
    prompts = jnp.array([[0, 1], [0, 2], [3, 1], [4, 4], [0, 5], [6, 3]], jnp.int32)
    keys = answer_keys(key, jnp.arange(len(prompts)), samples=SAMPLES)
    generation = generate(params, prompts, prompts > 0, keys)
    hits = jnp.sum((generation.tokens == 3) & generation.response_mask, axis=-1, dtype=jnp.float32)
    scores = hits / jnp.sum(generation.response_mask, axis=-1, dtype=jnp.float32)
    readings = make_policy_readings(from_logits(model.apply_fn), temperature=0.7)(params, reference, generation)
    targets = make_group_targets(samples=SAMPLES, **settings | how)
    return targets(generation, readings, scores, {}, jnp.float32(0.01))


@pytest.mark.parametrize("method", ["grpo", "rloo", "dr-grpo", "gspo", "cispo", "kl"])
def test_it_learns_to_please(plain, method):
    step_how, how = METHODS.get(method, {}), {}
    match method:
        case "rloo":
            how = {"baseline": "leave_one_out", "scale": False}
        case "dr-grpo":
            how = {"scale": False}
        case "kl":
            how = {"kl_place": "loss", "reference": plain.params}
    tx = optax.adam(3e-2)
    rollout_of = jit(lambda params, key: experience(plain, params, key, **how))
    step, state, scores = grpo_step(plain, tx, epochs=2, **step_how), start(plain, tx), []
    for i in range(25):
        rollout = rollout_of(state.params, jax.random.key(i))
        scores.append(float(rollout.scores.mean()))
        state, metrics = step(state, rollout, jax.random.key(100 + i))
        assert metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    assert np.mean(scores[-3:]) > 0.75 > 0.5 > np.mean(scores[:2])


def test_a_rollout_s_advantages_are_its_groups(plain):
    rollout = jit(lambda p, k: experience(plain, p, k))(plain.params, KEY)
    assert rollout.values is rollout.returns is rollout.ref_logprobs is rollout.kl_coef is None
    groups = jnp.arange(24, dtype=jnp.int32) // SAMPLES
    expected = group_advantages(rollout.scores, groups, baseline="mean", scale=True)
    spread = jnp.where(rollout.response_mask, expected[:, None], 0.0)
    np.testing.assert_allclose(rollout.advantages, spread, atol=1e-6)
