"""The KTO step against a loop over answers, and what may not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import from_logits
from jrlhf.steps import KTOSettings, Labelled, answer_logprobs, kto_figures, make_kto_step
from jrlhf.types import RankingBatch, UnpairedBatch
from tests.support import oracles
from tests.support.batches import (
    KEY,
    all_finite,
    assert_close,
    assert_same,
    bigram,
    bigram_params,
    descend,
    jit,
    new_state,
    packed_batch,
    pad_columns,
    preference_batch,
    take,
)
from tests.support.tiny_models import VOCABULARY

SETTINGS = KTOSettings(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)


def unpaired_batch(rows=6, seed=0):
    """Answers of both kinds, the last of which is not there, and mismatched pairs that the reference dislikes."""

    def single(batch, shift):
        one = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x, batch)
        valid = jnp.arange(rows)[:, None] < rows - 1
        ranks = jnp.asarray(np.arange(rows) % 3 > 0, jnp.int32)[:, None]
        return one._replace(ref_logprobs=one.ref_logprobs + shift, valid=valid, ranks=ranks)

    return UnpairedBatch(single(preference_batch(rows, seed), -3.0), single(preference_batch(rows, seed + 1), -9.0))


def log_ratios(apply_fn, params, batch):
    """Token by token. Returns the log-ratio of every answer that is there, and the log-prob."""
    ratios, logprobs = [], []
    for b in np.flatnonzero(np.asarray(batch.valid)):
        logps = jax.nn.log_softmax(apply_fn(params, batch.tokens[b], batch.mask[b]), axis=-1)[0]
        inside = np.asarray(batch.loss_mask)[b, 0, 1:] & np.asarray(batch.mask)[b, 0, :-1]
        total = sum((logps[t, batch.tokens[b, 0, t + 1]] for t in np.flatnonzero(inside)), jnp.float32(0.0))
        ratios.append(total - batch.ref_logprobs[b, 0])
        logprobs.append(total)
    return ratios, logprobs


def reference_loss(apply_fn, params, batch, point):
    ratios, logprobs = log_ratios(apply_fn, params, batch.answers)
    losses = []
    for ratio, rank in zip(ratios, batch.answers.ranks[:, 0], strict=False):
        gain = SETTINGS.beta * (ratio - point)
        good = SETTINGS.desirable_weight * (1 - 1 / (1 + jnp.exp(-gain)))
        losses.append(jnp.where(rank == 0, good, SETTINGS.undesirable_weight * (1 - 1 / (1 + jnp.exp(gain)))))
    return sum(losses) / len(losses), (ratios, logprobs)


def sgd_step(model, accumulation=1, apply_fn=None):
    tx = optax.sgd(1.0)
    step = make_kto_step(from_logits(apply_fn or model.apply_fn), tx, SETTINGS, accumulation=accumulation)
    return jit(step), new_state(model.params, tx)


def test_first_update_equals_the_reference_gradient(model):
    batch = unpaired_batch()
    mismatched, _ = log_ratios(model.apply_fn, model.params, batch.mismatched)
    point = float(np.mean(mismatched))
    assert point > 0.5
    (loss, (ratios, logprobs)), gradient = jit(
        jax.value_and_grad(lambda p: reference_loss(model.apply_fn, p, batch, point), has_aux=True)
    )(model.params)
    step, state = sgd_step(model)
    after, metrics = step(state, batch, KEY)
    assert_close(after.params, descend(model.params, gradient))
    desirable = np.asarray(batch.answers.ranks[:-1, 0] == 0)
    weights = {"desirable_weight": SETTINGS.desirable_weight, "undesirable_weight": SETTINGS.undesirable_weight}
    np.testing.assert_allclose(
        loss, np.mean(oracles.kto(ratios, desirable, mismatched, SETTINGS.beta, **weights)), rtol=1e-5
    )
    rewards, logprobs = SETTINGS.beta * np.asarray(ratios), np.asarray(logprobs)
    expected = {
        "loss": loss,
        "reference_point": point,
        "accuracy": np.mean(rewards[desirable][:, None] > rewards[~desirable][None]),
        "margin": rewards[desirable].mean() - rewards[~desirable].mean(),
        "rewards/chosen": rewards[desirable].mean(),
        "rewards/rejected": rewards[~desirable].mean(),
        "logprobs/chosen": logprobs[desirable].mean(),
        "logprobs/rejected": logprobs[~desirable].mean(),
        "answers": 5,
        "answers/desirable": 2,
        "answers/undesirable": 3,
        "tokens": np.sum((batch.answers.loss_mask & batch.answers.mask)[:-1]),
        "skipped": 0.0,
    }
    assert_close({name: metrics[name] for name in expected}, expected, rtol=1e-4)


def test_neither_slices_padding_nor_order_changes_the_step(plain):
    """z₀ is that of the whole batch, and the accuracy compares answers of all slices."""
    batch = unpaired_batch()
    step, state = sgd_step(plain)
    after, metrics = step(state, batch, KEY)
    sliced = sgd_step(plain, accumulation=3)[0](state, batch, KEY)
    padded = UnpairedBatch(pad_columns(batch.answers, 0, 3, fill=5), pad_columns(batch.mismatched, 2, 0))
    order = jnp.array([2, 0, 5, 3, 1, 4])
    for other, figures in (sliced, step(state, padded, KEY), step(state, take(batch, order), KEY)):
        assert_close(other.params, after.params)
        assert_close(figures, metrics)


def test_nan_in_missing_answers_changes_nothing(plain):
    step, state = sgd_step(plain)
    batch = unpaired_batch()
    parts = (part._replace(ref_logprobs=jnp.where(part.valid, part.ref_logprobs, jnp.nan)) for part in batch)
    assert_same(step(state, UnpairedBatch(*parts), KEY), step(state, batch, KEY))
    none = UnpairedBatch(*(part._replace(valid=jnp.zeros((6, 1), bool)) for part in batch))
    after, metrics = step(state, none, KEY)
    assert_same(after.params, state.params)
    assert all_finite(metrics)
    assert metrics["loss"] == metrics["reference_point"] == 0.0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_packed_answers_have_the_same_loss_and_update(accumulation):
    params, tx, logprob_fn = bigram_params(), optax.sgd(0.1), from_logits(bigram)
    batch, state = unpaired_batch(), new_state(params, tx)
    packed = UnpairedBatch(*(packed_batch(part, ((2, 0, 4), (3, 1), (5,)), width=24) for part in batch))
    expected, was = jit(make_kto_step(logprob_fn, tx, SETTINGS, accumulation=1))(state, batch, KEY)
    found, metrics = jit(make_kto_step(logprob_fn, tx, SETTINGS, accumulation=accumulation))(state, packed, KEY)
    assert was["answers"] == 5
    assert_close(metrics, was)
    assert_close(found.params, expected.params)


def test_it_learns_which_token_people_like(model):
    tokens = jax.random.randint(jax.random.key(3), (32, 1, 5), 0, VOCABULARY)
    every, there = jnp.ones(tokens.shape, bool), jnp.ones((32, 1), bool)
    disliked = 1 - jnp.any(tokens[:, :, 1:] == 3, axis=-1).astype(jnp.int32)
    answers = RankingBatch(tokens, every, disliked, there, jnp.zeros(32), every)
    others = answers._replace(tokens=jnp.roll(tokens, 1, axis=0))
    logprob_fn, tx = from_logits(model.apply_fn), optax.adam(1e-2)
    parts = (part._replace(ref_logprobs=answer_logprobs(logprob_fn, model.params, part).total)
             for part in (answers, others))  # fmt: skip
    batch = UnpairedBatch(*parts)
    step = jit(make_kto_step(logprob_fn, tx, SETTINGS, accumulation=1))
    state, history = new_state(model.params, tx), []
    for _ in range(60):
        state, metrics = step(state, batch, KEY)
        history.append(metrics)
    # At the reference every reward and z₀ are 0, so half of the weights is lost.
    lost = np.where(disliked == 0, SETTINGS.desirable_weight, SETTINGS.undesirable_weight).mean() / 2
    np.testing.assert_allclose(history[0]["loss"], lost, rtol=1e-5)
    assert history[0]["reference_point"] < 1e-5
    assert history[-1]["loss"] < 0.8 * lost
    assert history[-1]["accuracy"] > 0.95
    assert history[-1]["rewards/chosen"] > history[-1]["rewards/rejected"]


def test_figures_of_ties_and_of_one_kind_alone():
    def figures(ratios, desirable):
        logprobs = jnp.asarray(ratios, jnp.float32)
        there = jnp.ones(len(ratios), bool)
        return kto_figures(Labelled(logprobs, jnp.zeros(len(ratios)), jnp.asarray(desirable), there), SETTINGS)

    # Pairs: 2 > 1, 2 > 0, 1 = 1, 1 > 0: a tie is not won.
    assert figures([2.0, 1.0, 1.0, 0.0], [True, True, False, False])["accuracy"] == 0.75
    alone = figures([2.0, 1.0], [True, True])
    assert alone["accuracy"] == alone["margin"] == alone["rewards/rejected"] == 0.0
    assert alone["rewards/chosen"] == 0.75


def test_what_the_batch_lacks_is_named(plain):
    batch = unpaired_batch()
    step, state = sgd_step(plain)
    for part in ("answers", "mismatched"):
        lacking = batch._replace(**{part: getattr(batch, part)._replace(ref_logprobs=None)})
        with pytest.raises(ValueError, match="no ref_logprobs, which the loss kto needs"):
            step(state, lacking, KEY)
    with pytest.raises(ValueError, match="KTO reads one answer a ranking, but the batch has 4"):
        step(state, UnpairedBatch(preference_batch(), preference_batch()), KEY)


def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(plain):
    step, state = sgd_step(plain)
    batch = unpaired_batch()
    reference = batch.mismatched.ref_logprobs.at[2, 0].set(jnp.nan)
    after, metrics = step(state, batch._replace(mismatched=batch.mismatched._replace(ref_logprobs=reference)), KEY)
    assert metrics["skipped"] == 1.0
    assert_same(after.params, state.params)
