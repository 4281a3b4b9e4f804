"""Packed sequences: positions, what sees what, and the same loss and update as one sequence a row."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.core import positions_from_mask, predictable
from jrlhf.models import Rope, decoder_fns, init_params, reward_params
from jrlhf.steps import make_reward_step, make_sft_step
from jrlhf.types import PackedRankingBatch, RankingBatch, SFTBatch, TrainState
from tests.support.archs import small_arch

ARCH = small_arch(qkv_bias=True, window=3, local_layers=(True, False))
LENGTHS = (7, 3, 5, 2, 8, 4)
LAYOUT = ((0, 1, 2), (4, 3, 5), ())  # a row of padding alone too
WIDTH = 16


@pytest.fixture(scope="module")
def fns():
    return decoder_fns(ARCH, dtype="float32", remat=False)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 5.0 if float(jnp.std(x)) > 0.0 else x, init_params(ARCH, jax.random.key(0)))


def sequences():
    rng = np.random.default_rng(3)
    return [rng.integers(1, 61, n).astype(np.int32) for n in LENGTHS]


def unpacked():
    tokens, mask = np.zeros((6, 8), np.int32), np.arange(8) < np.asarray(LENGTHS)[:, None]
    for row, values in enumerate(sequences()):
        tokens[row, : len(values)] = values
    return tokens, mask


def packed():
    """Tokens, segments, and for each sequence its row and first column."""
    tokens, segments, where = np.zeros((3, WIDTH), np.int32), np.zeros((3, WIDTH), np.int32), {}
    for row, members in enumerate(LAYOUT):
        start = 0
        for number, member in enumerate(members, start=1):
            here = slice(start, start + LENGTHS[member])
            tokens[row, here], segments[row, here] = sequences()[member], number
            where[member] = (row, start)
            start = here.stop
    return tokens, segments, where


@given(st.lists(st.integers(1, 4), max_size=5), st.integers(0, 3))
def test_positions_restart_and_nothing_predicts_a_first_token(lengths, padding):
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    segments = np.concatenate([segments, np.zeros(padding, np.int32)])
    if not len(segments):
        return
    expected = [i for n in lengths for i in range(n)] + [-1] * padding
    np.testing.assert_array_equal(positions_from_mask(jnp.asarray(segments)[None])[0], expected)
    np.testing.assert_array_equal(predictable(jnp.asarray(segments)[None])[0], [p > 0 for p in expected])


def test_logprobs_and_scores_are_those_of_the_sequence_alone(fns, params):
    tokens, mask = map(jnp.asarray, unpacked())
    together, segments, where = packed()
    heads = reward_params(params, ARCH, jax.random.key(1))
    alone, _ = fns.logprob_fn(params, tokens, mask, temperature=0.8)
    found, _ = fns.logprob_fn(params, jnp.asarray(together), jnp.asarray(segments), temperature=0.8)
    scores = fns.score_fn(heads, tokens, mask)
    found_scores = fns.score_fn(heads, jnp.asarray(together), jnp.asarray(segments))
    for member, (row, start) in where.items():
        length = LENGTHS[member]
        np.testing.assert_allclose(found[row, start + 1 : start + length], alone[member, 1:length], atol=1e-5)
        np.testing.assert_allclose(found_scores[row, start : start + length], scores[member, :length], atol=1e-5)


def test_a_neighbour_in_the_row_changes_nothing(fns, params):
    tokens, segments, where = packed()
    other = tokens.copy()
    row, start = where[1]
    other[row, start : start + LENGTHS[1]] = 60 - other[row, start : start + LENGTHS[1]]
    logprobs = jax.jit(lambda tokens: fns.logprob_fn(params, tokens, jnp.asarray(segments), temperature=1.0)[0])
    a, b = logprobs(tokens), logprobs(other)
    assert float(jnp.max(jnp.abs(a - b))) > 0.1
    for member in (0, 2):
        place, first = where[member]
        here = slice(first + 1, first + LENGTHS[member])
        np.testing.assert_array_equal(a[place, here], b[place, here])


def after(step, params, batch, *, tx):
    state = TrainState(params, tx.init(params), jnp.int32(0))
    return jax.jit(step)(state, jax.tree.map(jnp.asarray, batch), jax.random.key(0))


@pytest.mark.parametrize("slices", [1, 3])
def test_an_sft_step_has_the_same_loss_and_update(fns, params, slices):
    tokens, mask = unpacked()
    together, segments, where = packed()
    learnt = np.random.default_rng(1).random(tokens.shape) < 0.7
    packed_learnt = np.zeros(together.shape, bool)
    for member, (row, start) in where.items():
        packed_learnt[row, start : start + LENGTHS[member]] = learnt[member, : LENGTHS[member]]
    tx = optax.sgd(0.1)
    step = make_sft_step(fns.logprob_fn, tx, accumulation=1)
    expected, plain = after(step, params, SFTBatch(tokens, mask, learnt), tx=tx)
    step = make_sft_step(fns.logprob_fn, tx, accumulation=slices)
    found, metrics = after(step, params, SFTBatch(together, segments, packed_learnt), tx=tx)
    assert metrics["tokens"] == plain["tokens"] > 10
    np.testing.assert_allclose(metrics["loss"], plain["loss"], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, expected.params)


@pytest.mark.parametrize("slices", [1, 3])
def test_a_reward_step_has_the_same_loss_and_update(fns, params, slices):
    """Two prompts of three and of two completions; the sixth sequence belongs to a prompt with nothing to compare."""
    heads = reward_params(params, ARCH, jax.random.key(1))
    tokens, mask = unpacked()
    together, segments, where = packed()
    prompts = {0: (0, 1, 2), 1: (4, 3), 2: (5,)}
    ranks = {0: (1, 0, 1), 1: (0, 1), 2: (0,)}
    places = {0: (0, 0), 1: (1, 0), 2: (1, 1)}
    plain = RankingBatch(
        np.zeros((3, 3, 8), np.int32), np.zeros((3, 3, 8), bool), np.zeros((3, 3), np.int32), np.zeros((3, 3), bool),
        np.array([0.3, 0.0, 0.0], np.float32),
    )  # fmt: skip
    other = PackedRankingBatch(
        together, segments, np.zeros((3, 2, 3), np.int32), np.zeros((3, 2, 3), np.int32), np.zeros((3, 2, 3), bool),
        np.array([[0.3, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32),
    )  # fmt: skip
    for prompt, members in prompts.items():
        for k, member in enumerate(members):
            plain.tokens[prompt, k], plain.mask[prompt, k] = tokens[member], mask[member]
            plain.ranks[prompt, k], plain.valid[prompt, k] = ranks[prompt][k], True
            row, number = places[prompt]
            assert where[member][0] == row
            other.ends[row, number, k] = where[member][1] + LENGTHS[member] - 1
            other.ranks[row, number, k], other.valid[row, number, k] = ranks[prompt][k], True
    tx = optax.sgd(0.1)
    step = make_reward_step(fns.score_fn, tx, center_coef=0.01, accumulation=1)
    expected, was = after(step, heads, plain, tx=tx)
    step = make_reward_step(fns.score_fn, tx, center_coef=0.01, accumulation=slices)
    found, metrics = after(step, heads, other, tx=tx)
    assert was["pairs"] == metrics["pairs"] == 3
    for name in ("loss", "accuracy", "margin"):
        np.testing.assert_allclose(metrics[name], was[name], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, expected.params)


def test_dynamic_rotary_positions_cannot_be_packed():
    arch = replace(ARCH, rope=Rope("dynamic", 10000.0, factor=2.0, original_max_positions=32))
    fns = decoder_fns(arch, dtype="float32", remat=False)
    params, (tokens, segments, _) = init_params(arch, jax.random.key(0)), packed()
    with pytest.raises(ValueError, match="sequences cannot be packed"):
        fns.logprob_fn(params, jnp.asarray(tokens), jnp.asarray(segments), temperature=1.0)
