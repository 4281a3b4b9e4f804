"""An episode without a response is in no loss: the update is that of the batch without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrlhf.core import from_logits
from jrlhf.steps import make_experience, make_readings, make_targets, rollout_metrics, separate
from jrlhf.types import Generation
from tests.steps.test_ppo_step import ppo_step, start
from tests.support.batches import KEY, assert_close, assert_same, jit, rollout_batch

OUT = 2


SHAPING = {"gamma": 1.0, "lam": 0.95, "kl_estimator": "k1", "missing_eos_penalty": 0.5, "whiten_rewards": True}


def networks(model):
    return model.params, jax.tree.map(lambda x: x * 0.9, model.params), model.value_params


def experience_of(model, generation, scores):
    make = make_experience(separate(from_logits(model.apply_fn), model.score_fn), temperature=0.7, **SHAPING)
    return jit(make)(*networks(model), generation, scores, jnp.float32(0.1))


def sampled(model):
    rollout = rollout_batch(model.apply_fn, model.params, rows=5, noise=0.0)
    stopped = jnp.arange(5) % 2 == 0
    return Generation(rollout.tokens, rollout.mask, rollout.response_mask, rollout.logprobs, stopped)


def test_the_update_is_that_of_the_batch_without_it(plain):
    whole, scores = sampled(plain), jnp.asarray([1.0, -2.0, 50.0, 0.5, 3.0])
    others = np.arange(5) != OUT
    emptied = whole._replace(response_mask=whole.response_mask & others[:, None])
    rest = jax.tree.map(lambda x: x[others], whole)
    with_it = experience_of(plain, emptied, jnp.where(others, scores, 0.0))
    without = experience_of(plain, rest, scores[others])
    assert_close(rollout_metrics(with_it), rollout_metrics(without), atol=1e-5)
    for tx in (None, optax.adam(0.01)):
        after, metrics = ppo_step(plain, tx)(start(plain, tx), with_it, KEY)
        expected, expected_metrics = ppo_step(plain, tx)(start(plain, tx), without, KEY)
        assert_close(after.params, expected.params, atol=1e-5)
        assert_close(metrics["loss"], expected_metrics["loss"], atol=1e-5)
    # It is not as if its score had been 0.
    zero = experience_of(plain, whole, jnp.where(others, scores, 0.0))
    other, _ = ppo_step(plain)(start(plain), zero, KEY)
    mine, _ = ppo_step(plain)(start(plain), with_it, KEY)
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), other.params, mine.params)
    assert max(jax.tree.leaves(gaps)) > 1e-3


def test_it_may_be_left_out_after_it_was_read(plain):
    """The networks are at the answers before the rules have said which have a score."""
    whole, scores = sampled(plain), jnp.asarray([1.0, -2.0, 0.0, 0.5, 3.0])
    emptied = whole._replace(response_mask=whole.response_mask & (jnp.arange(5) != OUT)[:, None])
    read = make_readings(separate(from_logits(plain.apply_fn), plain.score_fn), temperature=0.7)
    readings = jit(read)(*networks(plain), whole)
    made = jit(make_targets(**SHAPING))(emptied, readings, scores, jnp.float32(0.1))
    expected = experience_of(plain, emptied, scores)
    assert_close(made, expected, atol=1e-6)
    # What was read of it is in nothing.
    wild = readings._replace(logprobs=readings.logprobs.at[OUT].set(jnp.nan), values=readings.values.at[OUT].set(9e9))
    again = jit(make_targets(**SHAPING))(emptied, wild, scores, jnp.float32(0.1))
    for name in ("rewards", "advantages", "returns"):
        there = jnp.where(emptied.response_mask, getattr(again, name) - getattr(made, name), 0.0)
        assert_same(there, jnp.zeros_like(there))


def test_a_minibatch_of_none_but_such_moves_nothing(plain):
    rollout = rollout_batch(plain.apply_fn, plain.params, noise=0.0)
    tx = optax.adam(0.1)
    step = ppo_step(plain, tx)
    moving, _ = step(start(plain, tx), rollout, KEY)
    after, metrics = step(moving, rollout._replace(response_mask=jnp.zeros_like(rollout.response_mask)), KEY)
    assert_same(after, moving)
    # Nothing in it was wrong.
    assert (metrics["skipped"], metrics["policy/updates"]) == (0, 0)
