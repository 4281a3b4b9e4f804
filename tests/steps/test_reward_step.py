import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.steps import make_reward_step, score_completions, score_sequences
from jrlhf.types import RankingBatch
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
    ranking_batch,
    take,
)
from tests.support.tiny_models import VOCABULARY


def reference(score_fn, params, batch, center_coef=0.0):
    """Pair by pair. Returns the loss, and the s_better - s_worse of every pair."""
    rows, completions, width = batch.tokens.shape
    every = score_fn(params, batch.tokens.reshape(-1, width), batch.mask.reshape(-1, width))
    every = every.reshape(rows, completions, width)
    last = [[max(np.flatnonzero(row), default=0) for row in rows] for rows in np.asarray(batch.mask)]
    valid, ranks = np.asarray(batch.valid), np.asarray(batch.ranks)
    losses, differences = [], []
    for b in range(rows):
        pairs = []
        scores = [every[b, k, t] for k, t in enumerate(last[b])]
        for i in range(len(scores)):
            for j in range(len(scores)):
                if valid[b, i] and valid[b, j] and ranks[b, i] < ranks[b, j]:
                    difference = scores[i] - scores[j]
                    differences.append(difference)
                    centre = center_coef * (scores[i] + scores[j]) ** 2
                    pairs.append(jnp.log1p(jnp.exp(batch.margin[b] - difference)) + centre)
        if pairs:
            losses.append(sum(pairs) / len(pairs))
    return sum(losses) / max(len(losses), 1), differences


def sgd_step(model, **changes):
    tx = optax.sgd(1.0)
    step = make_reward_step(model.score_fn, tx, **({"center_coef": 0.0, "accumulation": 1} | changes))
    return jit(step), new_state(model.value_params, tx)


def test_first_update_equals_the_reference_gradient(model):
    center_coef = 0.1
    step, state = sgd_step(model, center_coef=center_coef)
    batch = ranking_batch(rows=3)
    batch = batch._replace(ranks=batch.ranks.at[0].set(1))  # all tied: the row must not count in the mean
    (loss, differences), gradient = jit(
        jax.value_and_grad(lambda p: reference(model.score_fn, p, batch, center_coef), has_aux=True)
    )(model.value_params)
    after, metrics = step(state, batch, KEY)
    assert_close(after.params, descend(model.value_params, gradient))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(np.array(differences) > 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], np.mean(differences), rtol=1e-4, atol=1e-6)
    assert metrics["pairs"] == len(differences)


def test_it_learns_which_token_people_like(model):
    tokens = jax.random.randint(jax.random.key(3), (8, 4, 5), 0, VOCABULARY)
    liking = jnp.sum(tokens == 3, axis=-1)
    every = jnp.ones(tokens.shape, bool)
    batch = RankingBatch(tokens, every, 5 - liking, jnp.ones((8, 4), bool), jnp.zeros(8))
    tx = optax.adam(3e-2)
    step = jit(make_reward_step(model.score_fn, tx, center_coef=0.01, accumulation=1))
    state, history = new_state(model.value_params, tx), []
    for _ in range(60):
        state, metrics = step(state, batch, KEY)
        history.append((float(metrics["loss"]), float(metrics["accuracy"])))
    assert history[-1][0] < 0.3 * history[0][0]
    assert history[-1][1] > 0.95


def test_accumulation_is_a_bigger_batch(model):
    batch = ranking_batch(rows=4)
    batch = batch._replace(ranks=batch.ranks.at[0].set(1))  # a row without a pair, which must not be counted
    step, state = sgd_step(model, center_coef=0.1)
    whole, metrics = step(state, batch, KEY)
    sliced, sliced_metrics = (lambda f, s: f(s, batch, KEY))(*sgd_step(model, center_coef=0.1, accumulation=4))
    assert_close(sliced.params, whole.params)
    assert_close(sliced_metrics, metrics)


def test_two_completions_are_the_pairwise_step(plain):
    batch = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 else x, ranking_batch())
    batch = batch._replace(ranks=jnp.tile(jnp.array([[0, 1]]), (4, 1)), valid=jnp.ones((4, 2), bool))

    def pairwise(params):
        chosen, rejected = (
            score_sequences(plain.score_fn, params, batch.tokens[:, k], batch.mask[:, k]) for k in (0, 1)
        )
        return jnp.mean(jnp.log1p(jnp.exp(rejected + batch.margin - chosen)))

    step, state = sgd_step(plain)
    after, metrics = step(state, batch, KEY)
    loss, gradient = jit(jax.value_and_grad(pairwise))(plain.value_params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(after.params, descend(plain.value_params, gradient))


def test_a_score_is_read_at_the_last_real_token(plain):
    values = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    mask = jnp.array([[True, True, False, False], [False, True, True, False], [True, True, True, True]])
    got = score_sequences(lambda *_: values, None, jnp.zeros((3, 4), jnp.int32), mask)
    np.testing.assert_array_equal(got, [1.0, 6.0, 11.0])
    # Token ids have no say: pad == EOS and an EOS that ends a full-length row are read like any other.
    batch = ranking_batch()
    n = int(batch.mask[0, 1].sum())
    alone = [
        score_sequences(plain.score_fn, plain.value_params, tokens[None], jnp.ones((1, len(tokens)), bool))[0]
        for tokens in (batch.tokens[0, 0], batch.tokens[0, 1, :n])
    ]
    np.testing.assert_allclose(score_completions(plain.score_fn, plain.value_params, batch)[0, :2], alone, atol=1e-5)


def test_padding_columns_row_order_and_completion_order_change_nothing(plain):
    batch = ranking_batch()
    step, state = sgd_step(plain, center_coef=0.1)
    after, metrics = step(state, batch, KEY)
    order = jnp.array([2, 0, 3, 1])
    for other in (
        pad_columns(batch, 0, 3, fill=5),
        pad_columns(batch, 2, 0),
        take(batch, order),
        jax.tree.map(lambda x: x[:, order] if x.ndim > 1 else x, batch),
    ):
        again, other_metrics = step(state, other, KEY)
        assert_close(again.params, after.params)
        assert_close(other_metrics, metrics)


def test_nan_in_unread_positions_and_missing_completions_changes_nothing(plain):
    batch = ranking_batch()
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    last = jnp.argmax(jnp.where(flat(batch.mask), jnp.arange(6)[None], -1), axis=-1)
    read = (jnp.arange(6)[None] == last[:, None]) & batch.valid.reshape(-1, 1)

    def with_nan(params, tokens, mask):
        return jnp.where(read, plain.score_fn(params, tokens, mask), jnp.nan)

    tx = optax.sgd(1.0)
    dirty = make_reward_step(with_nan, tx, center_coef=0.1, accumulation=1)
    step, state = sgd_step(plain, center_coef=0.1)
    after, metrics = jit(dirty)(state, batch, KEY)
    assert all_finite((after.params, metrics))
    clean = step(state, batch, KEY)
    assert_close((after.params, metrics), (clean[0].params, clean[1]))


@pytest.mark.parametrize("valid", [[[True, False, False, False]], [[False] * 4], [[True] * 4]])
def test_one_completion_none_or_ties_only_is_no_loss(plain, valid):
    batch = jax.tree.map(lambda x: x[:1], ranking_batch())
    batch = batch._replace(ranks=jnp.zeros((1, 4), jnp.int32), valid=jnp.array(valid))
    step, state = sgd_step(plain, center_coef=0.1)
    after, metrics = step(state, batch, KEY)
    assert_same(after.params, state.params)
    assert all_finite(metrics)
    assert metrics["loss"] == 0.0


def test_bfloat16_scores_bitwise_repeatable_and_traced_once(plain):
    traces = []

    def half(params, tokens, mask):
        traces.append(1)
        return plain.score_fn(params, tokens, mask).astype(jnp.bfloat16)

    tx = optax.adamw(1e-2)
    step = jit(make_reward_step(half, tx, center_coef=0.0, accumulation=2))
    start = new_state(plain.value_params, tx)
    first = step(start, ranking_batch(seed=0), KEY)
    count = len(traces)
    second = step(first[0], ranking_batch(seed=1), KEY)
    assert len(traces) == count
    assert_same(first, step(start, ranking_batch(seed=0), KEY))
    assert moved(first[0].params, second[0].params)
    assert {x.dtype for x in jax.tree.leaves((second[0].params, second[1]))} == {jnp.dtype("float32")}
