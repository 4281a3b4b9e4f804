"""What must hold of a PPO step whatever it learns: order, padding, masks, degenerate rollouts, determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import from_logits
from jrlhf.steps import make_ppo_step, separate
from jrlhf.steps.minibatches import shuffled_minibatches
from jrlhf.types import PPOParams, SFTBatch
from tests.steps.test_ppo_step import ppo_step, start
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    jit,
    moved,
    new_state,
    pad_columns,
    ppo_settings,
    rollout_batch,
    sft_batch,
    take,
)
from tests.support.tiny_models import VOCABULARY


def test_each_epoch_visits_each_row_once(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params, rows=6)
    rollout = rollout._replace(scores=jnp.arange(6.0), ptx=sft_batch((1, 2, 3)))
    batches = shuffled_minibatches(rollout, KEY, epochs=4, minibatches=3)
    order = np.asarray(batches.scores).reshape(4, 6).astype(int)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(6), (4, 1)))
    assert len({tuple(epoch) for epoch in order}) == 4
    # A row's arrays stay together.
    np.testing.assert_array_equal(batches.tokens.reshape(24, -1), rollout.tokens[order.ravel()])
    np.testing.assert_array_equal(batches.logprobs.reshape(24, -1), rollout.logprobs[order.ravel()])
    lengths = np.asarray(batches.ptx.mask.sum(-1)).reshape(4, 3)
    np.testing.assert_array_equal(np.sort(lengths, axis=1), np.tile([1, 2, 3], (4, 1)))


def test_the_step_itself_visits_each_row_once_an_epoch(plain):
    """A policy with one parameter a row, and an optimizer that only counts which gradients are not zero."""
    rollout = rollout_batch(plain.apply_fn, plain.params, rows=6)
    rollout = rollout._replace(
        tokens=rollout.tokens.at[:, 0].set(jnp.arange(6)),
        logprobs=jnp.zeros((6, 9)),
        advantages=jnp.ones((6, 9)),
    )

    def logprob_fn(params, tokens, mask, *, temperature, where):
        logprobs = jnp.broadcast_to(params[tokens[:, 0]][:, None], tokens.shape)
        return logprobs, jnp.zeros(tokens.shape)

    count = optax.GradientTransformation(
        lambda params: jnp.zeros(6),
        lambda grads, seen, params: (jax.tree.map(jnp.zeros_like, grads), seen + (grads.policy != 0.0)),
    )
    step = make_ppo_step(separate(logprob_fn, plain.score_fn), count, ppo_settings(epochs=3, minibatches=3))
    after, _ = jit(step)(new_state(PPOParams(jnp.zeros(6), plain.value_params), count), rollout, KEY)
    np.testing.assert_array_equal(after.opt_state, np.full(6, 3.0))


def test_padding_columns_and_row_order_change_nothing(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params)
    step, state = ppo_step(plain), start(plain)
    after, metrics = step(state, rollout, KEY)
    order = jnp.array([3, 1, 0, 2])
    for other in (
        pad_columns(rollout, 3, 2, fill=4),
        take(rollout, order),
    ):
        again, other_metrics = step(state, other, KEY)
        assert_close(again.params, after.params)
        assert_close(other_metrics, metrics)


def test_nan_behind_the_mask_changes_nothing(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params)
    hide = lambda x: jnp.where(rollout.response_mask, x, jnp.nan)  # noqa: E731
    floats = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "values", "rewards", "advantages", "returns")
    dirty = rollout._replace(**{name: hide(getattr(rollout, name)) for name in floats})
    step, state = ppo_step(plain, minibatches=2, accumulation=2), start(plain)
    clean = step(state, rollout, KEY)
    assert_same(step(state, dirty, KEY), clean)
    assert all_finite(clean)

    def nan_logprobs(params, tokens, mask, *, temperature, where):
        pair = from_logits(plain.apply_fn)(params, tokens, mask, temperature=temperature)
        return tuple(jnp.where(mask & (jnp.cumsum(mask, axis=1) > 1), x, jnp.nan) for x in pair)

    nan_step = make_ppo_step(separate(nan_logprobs, plain.score_fn), optax.sgd(1.0), ppo_settings(entropy_coef=0.1))
    got = jit(nan_step)(state, rollout, KEY)
    assert_close(got, ppo_step(plain, entropy_coef=0.1)(state, rollout, KEY))
    assert all_finite(got)


@pytest.mark.parametrize("case", ["one row", "masked row", "all masked", "no advantage", "far log-probs"])
def test_degenerate_rollouts_are_finite(plain, case):
    rollout = rollout_batch(plain.apply_fn, plain.params)
    mask = rollout.response_mask
    rollout = {
        "one row": take(rollout, slice(1)),
        "masked row": rollout._replace(response_mask=mask.at[0].set(False)),
        "all masked": rollout._replace(response_mask=mask & False),
        "no advantage": rollout._replace(advantages=jnp.zeros(mask.shape)),
        "far log-probs": rollout._replace(logprobs=jnp.where(mask, -1e4, rollout.logprobs)),
    }[case]
    state = start(plain)
    after, metrics = ppo_step(plain)(state, rollout, KEY)
    assert all_finite((after.params, metrics))
    if case == "all masked":
        assert not moved(after.params, state.params)


def test_bitwise_repeatable_and_traced_once(plain):
    traces = []

    def counted(params, tokens, mask):
        traces.append(1)
        return plain.apply_fn(params, tokens, mask)

    tx = optax.adamw(1e-2)
    step = ppo_step(plain._replace(apply_fn=counted), tx, epochs=2, minibatches=2, accumulation=2)
    rollouts = [rollout_batch(plain.apply_fn, plain.params, seed=i) for i in range(2)]
    first = step(start(plain, tx), rollouts[0], KEY)
    count = len(traces)
    step(first[0], rollouts[1], jax.random.key(1))
    assert len(traces) == count
    assert_same(step(start(plain, tx), rollouts[0], KEY), first)
    assert moved(step(start(plain, tx), rollouts[0], jax.random.key(1))[0].params, first[0].params)


def test_bfloat16_models_keep_float32_state_and_metrics(plain):
    half = plain._replace(
        apply_fn=lambda *args: plain.apply_fn(*args).astype(jnp.bfloat16),
        score_fn=lambda *args: plain.score_fn(*args).astype(jnp.bfloat16),
    )
    rollout = rollout_batch(plain.apply_fn, plain.params)._replace(ptx=SFTBatch(*sft_batch()))
    after, metrics = ppo_step(half, ptx_coef=0.1, accumulation=2)(start(plain), rollout, KEY)
    assert {x.dtype for x in jax.tree.leaves((after.params, metrics))} == {jnp.dtype("float32")}
    assert all_finite((after.params, metrics))
    assert rollout.tokens.max() < VOCABULARY
