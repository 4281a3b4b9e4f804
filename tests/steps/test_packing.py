"""Padding dropped on the device: the layout against brute force, and results that do not change."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jrlhf.data.packing import pack
from jrlhf.models import decoder_fns, init_params, reward_params
from jrlhf.parallel import jit_step, make_mesh, shard_batch, tree_shardings
from jrlhf.steps import (
    make_experience,
    make_ppo_step,
    make_sft_eval,
    make_sft_step,
    rollout_metrics,
    separate,
    without_padding,
)
from jrlhf.steps.packing import packed_layout
from jrlhf.types import Generation, PPOParams, TrainState
from tests.steps.test_packed import ARCH as TWO_LAYERS
from tests.support.batches import KEY, assert_close, assert_same, jit, ppo_settings, rollout_batch, sft_batch

ARCH = replace(TWO_LAYERS, num_layers=1, local_layers=())
FNS = decoder_fns(ARCH, dtype="float32", remat=False)
NETWORKS = separate(FNS.logprob_fn, FNS.score_fn)
layout_of = jax.jit(packed_layout, static_argnames="slices")


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=60)
def test_every_token_stands_once_in_one_piece(bounds, slices):
    at = np.arange(7)
    mask = np.asarray([(at >= min(b)) & (at < max(b)) for b in bounds])
    layout = jax.device_get(layout_of(jnp.asarray(mask), slices=slices))
    real = layout.source < mask.size
    np.testing.assert_array_equal(real, layout.segments > 0)
    np.testing.assert_array_equal(np.sort(layout.source[real]), np.flatnonzero(mask))
    pieces = {}
    for row in range(6):
        for column in np.flatnonzero(real[row]):
            pieces.setdefault((row, layout.segments[row, column]), []).append((column, layout.source[row, column]))
    for (_, number), piece in pieces.items():
        columns, sources = map(np.asarray, zip(*piece, strict=True))
        np.testing.assert_array_equal(np.diff(columns), 1)
        np.testing.assert_array_equal(np.diff(sources), 1)
        assert len({source // 7 for source in sources}) == 1
        assert number >= 1
    assert len(pieces) == mask.any(axis=1).sum()


@given(st.lists(st.integers(1, 9), min_size=8, max_size=8))
def test_it_takes_no_more_rows_than_packing_on_the_host(lengths):
    mask = np.arange(9) < np.asarray(lengths)[:, None]
    layout = jax.device_get(layout_of(jnp.asarray(mask), slices=8))
    filled = (layout.segments > 0).any(axis=1)
    assert filled.sum() == len(pack(np.asarray(lengths), 9)) == layout.used
    # Slice p is row p here: they are filled from the first on.
    np.testing.assert_array_equal(filled, np.arange(8) < layout.used)


def test_slices_are_filled_one_after_the_other():
    """Twelve rows in three slices, of which rows 0, 3, 6 and 9 are the first; six sequences of half a row."""
    mask = jnp.asarray(np.arange(4) < np.asarray([2] * 6 + [0] * 6)[:, None])
    layout = jax.device_get(layout_of(mask, slices=3))
    assert layout.used == 1
    np.testing.assert_array_equal(np.flatnonzero((layout.segments > 0).all(axis=1)), [0, 3, 6])
    with pytest.raises(ValueError, match="12 rows do not divide into 5 slices"):
        packed_layout(mask, slices=5)


def test_what_is_packed_can_be_unpacked():
    mask = np.random.default_rng(0).random((4, 6)) < 0.6
    layout = packed_layout(jnp.asarray(mask), slices=2)
    for x in (np.arange(24).reshape(4, 6), np.random.default_rng(1).random((4, 6)) < 0.5):
        there = layout.unpack(layout.pack(jnp.asarray(x)))
        np.testing.assert_array_equal(there, np.where(mask, x, 0))


@pytest.fixture(scope="module")
def params():
    policy = jax.tree.map(lambda x: x * 5.0 if float(jnp.std(x)) > 0.0 else x, init_params(ARCH, KEY))
    return PPOParams(policy, reward_params(policy, ARCH, jax.random.key(1)))


@pytest.fixture(scope="module")
def rollout(params):
    """Left-padded prompts, answers of 1 to 12 tokens."""
    return rollout_batch(FNS.apply_fn, params.policy, rows=8, prompt=4, response=12)


@pytest.mark.parametrize("slices", [1, 4])
def test_log_probs_and_scores_stay_what_they_are(params, rollout, slices):
    real, answer = np.asarray(rollout.mask), np.asarray(rollout.response_mask)
    expected = FNS.logprob_fn(params.policy, rollout.tokens, rollout.mask, temperature=0.7)
    fn = jax.jit(partial(without_padding(FNS.logprob_fn, slices=slices), temperature=0.7))
    for found, wanted in zip(fn(params.policy, rollout.tokens, rollout.mask), expected, strict=True):
        np.testing.assert_allclose(np.asarray(found)[answer], np.asarray(wanted)[answer], atol=1e-5)
        assert not np.asarray(found)[~real].any()
    score = jax.jit(without_padding(FNS.score_fn, slices=slices))
    found, wanted = (fn(params.value, rollout.tokens, rollout.mask) for fn in (score, FNS.score_fn))
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=1e-5)


def test_only_the_answers_are_asked_about(params, rollout):
    asked = []

    def noted(params, tokens, mask, *, temperature, where):
        jax.debug.callback(lambda mask, where: asked.append((mask, where)), mask, where)
        return FNS.logprob_fn(params, tokens, mask, temperature=temperature, where=where)

    fn = without_padding(noted, slices=4)
    answer = np.asarray(rollout.response_mask)
    found = fn(params.policy, rollout.tokens, rollout.mask, temperature=0.7, where=rollout.response_mask)
    jax.effects_barrier()
    for one, other in zip(found, FNS.logprob_fn(params.policy, *rollout[:2], temperature=0.7), strict=True):
        np.testing.assert_allclose(np.asarray(one)[answer], np.asarray(other)[answer], atol=1e-5)
    masks, where = (np.concatenate(x) for x in zip(*asked, strict=True))
    assert where.sum() == answer.sum()
    assert not (where & (masks == 0)).any()


def everywhere(params, tokens, mask, /, *, temperature, where=None):
    """The log-probs of every token, whichever are read."""
    return FNS.logprob_fn(params, tokens, mask, temperature=temperature)


@cache
def compiled(logprob_fn, changes):
    networks = separate(logprob_fn, FNS.score_fn)
    return jit(make_ppo_step(networks, optax.sgd(0.1), ppo_settings(**dict(changes))))


def update(params, rollout, logprob_fn=FNS.logprob_fn, **changes):
    state = TrainState(params, optax.sgd(1.0).init(params), jnp.int32(0))
    return compiled(logprob_fn, tuple(sorted(changes.items())))(state, rollout, KEY)


@pytest.mark.parametrize("how", [{"accumulation": 4}, {"accumulation": 2, "epochs": 2, "minibatches": 2}])
@pytest.mark.parametrize(
    "saved",
    [{"drop_padding": True, "logprob_fn": everywhere}, {}, {"drop_padding": True}],
    ids=["padding", "positions", "both"],
)
def test_the_update_stays_what_it_is(params, rollout, how, saved):
    rollout = rollout._replace(ptx=sft_batch((2, 9, 3, 5, 1, 10, 4, 4)))
    how = {"entropy_coef": 0.1, "ptx_coef": 0.2} | how
    expected, metrics = update(params, rollout, logprob_fn=everywhere, **how)
    found, packed_metrics = update(params, rollout, **saved, **how)
    assert_close(found.params, expected.params, atol=1e-5)
    assert_close(packed_metrics, metrics, atol=1e-5, rtol=1e-4)
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), expected.params, params)
    assert max(jax.tree.leaves(gaps)) > 1e-2


PACKED = {"drop_padding": True, "accumulation": 4}


def test_sft_stays_what_it_is_where_only_trained_tokens_are_asked_about(params):
    tx, batch = optax.sgd(0.1), sft_batch((2, 9, 3, 5), prompt=3)
    state = TrainState(params.policy, tx.init(params.policy), jnp.int32(0))
    expected, found = (
        jit(make_sft_step(logprob_fn, tx, accumulation=2))(state, batch, KEY)
        for logprob_fn in (everywhere, FNS.logprob_fn)
    )
    assert_close(found, expected)
    evaluate = make_sft_eval(FNS.logprob_fn)
    assert_close(evaluate(params.policy, batch), make_sft_eval(everywhere)(params.policy, batch))


def test_experience_stays_what_it_is_where_only_answers_are_asked_about(params, rollout):
    generation = Generation(
        rollout.tokens, rollout.mask, rollout.response_mask, rollout.sampler_logprobs, rollout.stopped
    )
    settings = {
        "temperature": 0.7,
        "gamma": 1.0,
        "lam": 0.9,
        "kl_estimator": "k1",
        "missing_eos_penalty": 0.0,
        "whiten_rewards": False,
    }
    reference = jax.tree.map(lambda x: x * 1.1, params.policy)
    given = params.policy, reference, params.value, generation, rollout.scores, jnp.float32(0.3)
    expected, found = (
        jit(make_experience(separate(logprob_fn, FNS.score_fn), **settings))(*given)
        for logprob_fn in (everywhere, FNS.logprob_fn)
    )
    for name in ("logprobs", "ref_logprobs", "entropy", "rewards", "advantages", "returns"):
        a, b = (np.where(rollout.response_mask, getattr(x, name), 0.0) for x in (found, expected))
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert_close(rollout_metrics(found), rollout_metrics(expected), atol=1e-5)


def test_what_stands_behind_the_mask_changes_nothing(params, rollout):
    dirty = rollout._replace(
        tokens=jnp.where(rollout.mask, rollout.tokens, 60),
        **{
            name: jnp.where(rollout.response_mask, getattr(rollout, name), jnp.nan)
            for name in ("logprobs", "values", "advantages", "returns")
        },
    )
    assert_same(update(params, dirty, **PACKED), update(params, rollout, **PACKED))


def test_nothing_at_all_moves_nothing(params, rollout):
    nothing = rollout._replace(mask=rollout.mask & False, response_mask=rollout.mask & False)
    after, metrics = update(params, nothing, **PACKED)
    assert_same(after.params, params)
    assert all(np.isfinite(x) for x in metrics.values())


def test_slices_without_a_token_are_not_computed(params, rollout):
    """A log-prob function that counts its calls while they happen."""
    calls = []

    def counted(params, tokens, mask, *, temperature):
        jax.debug.callback(lambda: calls.append(1))
        return FNS.logprob_fn(params, tokens, mask, temperature=temperature)

    # 8 episodes of 4 to 16 tokens, together less than half of 8 x 16.
    short = rollout._replace(
        mask=rollout.mask.at[:, 8:].set(False), response_mask=rollout.response_mask.at[:, 8:].set(False)
    )
    jax.block_until_ready(without_padding(counted, slices=4)(params.policy, short.tokens, short.mask, temperature=1.0))
    jax.effects_barrier()
    expected = int(packed_layout(short.mask, slices=4).used)
    assert len(calls) == expected < 4


def test_eight_devices_give_the_update_of_one(params):
    rollout = jax.device_get(rollout_batch(FNS.apply_fn, params.policy, rows=16, prompt=4, response=12))
    tx = optax.sgd(0.1)
    step = make_ppo_step(NETWORKS, tx, ppo_settings(epochs=2, **PACKED | {"accumulation": 2}))
    state = TrainState(params, tx.init(params), jnp.int32(0))
    expected, _ = jit(step)(state, rollout, KEY)
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    shardings = tree_shardings(jax.eval_shape(lambda: state), mesh, ())
    spread = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    found, _ = jit_step(step, mesh=mesh, state_shardings=shardings)(spread, shard_batch(rollout, mesh), KEY)
    assert_close(jax.device_get(found.params), expected.params, atol=1e-5)
