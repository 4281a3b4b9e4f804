"""The DPO step against a loop over pairs, and what may not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import from_logits
from jrlhf.steps import DPOSettings, answer_logprobs, make_dpo_step
from jrlhf.types import RankingBatch
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    bigram,
    bigram_params,
    descend,
    jit,
    moved,
    new_state,
    packed_batch,
    pad_columns,
    preference_batch,
    take,
)
from tests.support.tiny_models import VOCABULARY

SIGMOID = DPOSettings("sigmoid", beta=0.5)
SETTINGS = {
    "sigmoid": SIGMOID,
    "smooth": DPOSettings("sigmoid", beta=0.5, label_smoothing=0.1),
    "ipo": DPOSettings("ipo", beta=0.5),
    "simpo": DPOSettings("simpo", beta=2.0, gamma=0.7),
}
of_each_loss = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def batch_for(settings, **how):
    """SimPO has no reference."""
    batch = preference_batch(**how)
    return batch._replace(ref_logprobs=None) if settings.kind == "simpo" else batch


def pair_loss(difference, reference, margin, settings):
    """The losses as the papers write them."""
    if settings.kind == "simpo":
        return jnp.log1p(jnp.exp(margin + settings.gamma - settings.beta * difference))
    h = difference - reference
    if settings.kind == "ipo":
        return (h - margin / settings.beta - 1 / (2 * settings.beta)) ** 2
    z = settings.beta * h - margin
    smooth = settings.label_smoothing
    return (1 - smooth) * jnp.log1p(jnp.exp(-z)) + smooth * jnp.log1p(jnp.exp(z))


def reference(apply_fn, params, batch, settings):
    """Answer by answer, token by token, pair by pair. Returns the loss, and the figures of every pair."""
    valid, ranks, mask = (np.asarray(x) for x in (batch.valid, batch.ranks, batch.mask))
    marks = np.asarray(batch.loss_mask)
    losses, found = [], []
    for b in range(len(ranks)):
        logps = jax.nn.log_softmax(apply_fn(params, batch.tokens[b], batch.mask[b]), axis=-1)
        logprobs, references = [], []
        for k in range(ranks.shape[1]):
            inside = [t for t in range(1, mask.shape[2]) if marks[b, k, t] and mask[b, k, t] and mask[b, k, t - 1]]
            total = sum((logps[k, t - 1, batch.tokens[b, k, t]] for t in inside), jnp.float32(0.0))
            count = 1 if settings.kind == "sigmoid" else max(len(inside), 1)
            logprobs.append(total / count)
            references.append(0.0 if settings.kind == "simpo" else batch.ref_logprobs[b, k] / count)
        pairs = []
        for i in range(len(logprobs)):
            for j in range(len(logprobs)):
                if valid[b, i] and valid[b, j] and ranks[b, i] < ranks[b, j]:
                    difference, other = logprobs[i] - logprobs[j], references[i] - references[j]
                    pairs.append(pair_loss(difference, other, batch.margin[b], settings))
                    found.append((settings.beta * (difference - other), logprobs[i], logprobs[j]))
        if pairs:
            losses.append(sum(pairs) / len(pairs))
    return sum(losses) / max(len(losses), 1), found


def sgd_step(model, settings=SIGMOID, accumulation=1):
    tx = optax.sgd(1.0)
    step = make_dpo_step(from_logits(model.apply_fn), tx, settings, accumulation=accumulation)
    return jit(step), new_state(model.params, tx)


@of_each_loss
def test_first_update_equals_the_reference_gradient(model, settings):
    step, state = sgd_step(model, settings)
    batch = batch_for(settings, rows=3)
    batch = batch._replace(ranks=batch.ranks.at[0].set(1))  # all tied: the row must not count in the mean
    (loss, pairs), gradient = jit(
        jax.value_and_grad(lambda p: reference(model.apply_fn, p, batch, settings), has_aux=True)
    )(model.params)
    after, metrics = step(state, batch, KEY)
    assert_close(after.params, descend(model.params, gradient))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    margins, chosen, rejected = np.asarray(pairs, np.float64).T
    np.testing.assert_allclose(metrics["accuracy"], np.mean(margins > 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], np.mean(margins), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["logprobs/chosen"], np.mean(chosen), rtol=1e-5)
    np.testing.assert_allclose(metrics["logprobs/rejected"], np.mean(rejected), rtol=1e-5)
    assert metrics["pairs"] == len(pairs)
    valid = np.asarray(batch.loss_mask & batch.mask)[np.asarray(batch.valid)]
    assert metrics["tokens"] == int(valid[:, 1:].sum())
    assert metrics["skipped"] == 0.0
    assert after.step == 1


@of_each_loss
def test_it_learns_which_token_people_like(model, settings):
    tokens = jax.random.randint(jax.random.key(3), (8, 4, 5), 0, VOCABULARY)
    liking = jnp.sum(tokens[:, :, 1:] == 3, axis=-1)
    every = jnp.ones(tokens.shape, bool)
    batch = RankingBatch(tokens, every, 5 - liking, jnp.ones((8, 4), bool), jnp.zeros(8), every)
    logprob_fn = from_logits(model.apply_fn)
    if settings.kind != "simpo":
        batch = batch._replace(ref_logprobs=answer_logprobs(logprob_fn, model.params, batch).total)
    tx = optax.adam(1e-2)
    step = jit(make_dpo_step(logprob_fn, tx, settings, accumulation=1))
    state, history = new_state(model.params, tx), []
    for _ in range(80):
        state, metrics = step(state, batch, KEY)
        history.append((float(metrics["loss"]), float(metrics["accuracy"])))
    assert history[-1][0] < history[0][0]
    assert history[-1][1] > 0.9


def test_the_first_step_is_from_the_reference(plain):
    """Every implicit reward is 0: the loss is log 2, and the gradient that of the log-probs' difference times β / 2."""
    logprob_fn, batch = from_logits(plain.apply_fn), preference_batch()._replace(margin=jnp.zeros(4))
    total = jit(lambda p: answer_logprobs(logprob_fn, p, batch).total)(plain.params)
    _, metrics = (lambda f, s: f(s, batch._replace(ref_logprobs=total), KEY))(*sgd_step(plain))
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], 0.0, atol=1e-6)


@of_each_loss
def test_accumulation_is_a_bigger_batch(model, settings):
    batch = batch_for(settings, rows=4)
    batch = batch._replace(ranks=batch.ranks.at[0].set(1))  # a row without a pair, which must not be counted
    step, state = sgd_step(model, settings)
    whole, metrics = step(state, batch, KEY)
    sliced, sliced_metrics = (lambda f, s: f(s, batch, KEY))(*sgd_step(model, settings, accumulation=4))
    assert_close(sliced.params, whole.params)
    assert_close(sliced_metrics, metrics)


@of_each_loss
def test_padding_columns_row_order_and_completion_order_change_nothing(plain, settings):
    batch = batch_for(settings)
    step, state = sgd_step(plain, settings)
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


@of_each_loss
def test_nan_in_unread_positions_and_missing_completions_changes_nothing(plain, settings):
    batch = batch_for(settings)
    width = batch.mask.shape[-1]
    read = (batch.loss_mask & batch.mask & batch.valid[:, :, None]).reshape(-1, width)
    clean_fn = from_logits(plain.apply_fn)

    def with_nan(params, tokens, mask, /, *, temperature, where=None):
        logprobs, entropy = clean_fn(params, tokens, mask, temperature=temperature, where=where)
        return jnp.where(read, logprobs, jnp.nan), jnp.where(read, entropy, jnp.nan)

    reference = None if batch.ref_logprobs is None else jnp.where(batch.valid, batch.ref_logprobs, jnp.nan)
    dirty = batch._replace(ref_logprobs=reference)
    step, state = sgd_step(plain, settings)
    after, metrics = jit(make_dpo_step(with_nan, optax.sgd(1.0), settings, accumulation=1))(state, dirty, KEY)
    assert all_finite((after.params, metrics))
    clean = step(state, batch, KEY)
    assert_close((after.params, metrics), (clean[0].params, clean[1]))


def test_tokens_of_the_prompt_count_only_as_context(plain):
    """Another first token, which is the prompt's, changes no mask, and a prompt in the loss changes the log-prob."""
    batch, logprob_fn = preference_batch(), from_logits(plain.apply_fn)
    answers = answer_logprobs(logprob_fn, plain.params, batch)
    longer = answer_logprobs(logprob_fn, plain.params, batch._replace(loss_mask=batch.mask))
    np.testing.assert_allclose(answers.total, longer.total, rtol=1e-6)  # nothing predicts the first token
    prompt = (jnp.arange(6) < 3)[None, None, :]
    shorter = answer_logprobs(logprob_fn, plain.params, batch._replace(loss_mask=batch.loss_mask & ~prompt))
    assert (np.asarray(shorter.tokens) <= np.asarray(answers.tokens)).all()
    assert moved(shorter.total, answers.total)


@pytest.mark.parametrize("valid", [[[True, False, False, False]], [[False] * 4], [[True] * 4]])
@of_each_loss
def test_one_completion_none_or_ties_only_is_no_loss(plain, settings, valid):
    batch = jax.tree.map(lambda x: x[:1], batch_for(settings))
    batch = batch._replace(ranks=jnp.zeros((1, 4), jnp.int32), valid=jnp.array(valid))
    step, state = sgd_step(plain, settings)
    after, metrics = step(state, batch, KEY)
    assert_same(after.params, state.params)
    assert all_finite(metrics)
    assert metrics["loss"] == 0.0


@pytest.mark.parametrize("accumulation", [1, 3])
@of_each_loss
def test_packed_rankings_have_the_same_loss_and_update(settings, accumulation):
    batch, params, tx, logprob_fn = batch_for(settings), bigram_params(), optax.sgd(0.1), from_logits(bigram)
    state = new_state(params, tx)
    packed = packed_batch(batch, ((2, 0), (3, 1), ()), width=48)
    expected, was = jit(make_dpo_step(logprob_fn, tx, settings, accumulation=1))(state, batch, KEY)
    found, metrics = jit(make_dpo_step(logprob_fn, tx, settings, accumulation=accumulation))(state, packed, KEY)
    assert was["pairs"] == metrics["pairs"] > 0
    assert_close(metrics, was)
    assert_close(found.params, expected.params)


def test_what_the_batch_lacks_is_named(plain):
    batch = preference_batch()
    step, state = sgd_step(plain)
    with pytest.raises(ValueError, match="no loss_mask"):
        step(state, batch._replace(loss_mask=None), KEY)
    with pytest.raises(ValueError, match="no ref_logprobs, which the loss sigmoid needs"):
        step(state, batch._replace(ref_logprobs=None), KEY)
    simpo, _ = sgd_step(plain, SETTINGS["simpo"])
    with pytest.raises(ValueError, match="has ref_logprobs, but the loss simpo has no reference"):
        simpo(state, batch, KEY)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(plain, bad):
    step, state = sgd_step(plain)
    batch = preference_batch()
    after, metrics = step(state, batch._replace(ref_logprobs=batch.ref_logprobs.at[2, 1].set(bad)), KEY)
    assert metrics["skipped"] == 1.0
    assert_same(after.params, state.params)
    assert after.step == 0


def test_bfloat16_log_probs_bitwise_repeatable_and_traced_once(plain):
    traces = []

    def half(params, tokens, mask):
        traces.append(1)
        return plain.apply_fn(params, tokens, mask).astype(jnp.bfloat16)

    tx = optax.adamw(1e-2)
    step = jit(make_dpo_step(from_logits(half), tx, SIGMOID, accumulation=2))
    start = new_state(plain.params, tx)
    first = step(start, preference_batch(seed=0), KEY)
    count = len(traces)
    second = step(first[0], preference_batch(seed=1), KEY)
    assert len(traces) == count
    assert_same(first, step(start, preference_batch(seed=0), KEY))
    assert moved(first[0].params, second[0].params)
    assert {x.dtype for x in jax.tree.leaves((second[0].params, second[1]))} == {jnp.dtype("float32")}
