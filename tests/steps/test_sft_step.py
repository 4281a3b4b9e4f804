import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import from_logits
from jrlhf.steps import make_sft_eval, make_sft_step
from jrlhf.types import SFTBatch
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
    sft_batch,
    take,
)
from tests.support.sft import reference_loss
from tests.support.tiny_models import VOCABULARY


def sgd_step(model, accumulation=1, lr=1.0):
    tx = optax.sgd(lr)
    step = jit(make_sft_step(from_logits(model.apply_fn), tx, accumulation=accumulation))
    return step, new_state(model.params, tx)


def test_first_update_equals_the_reference_gradient(model):
    step, state = sgd_step(model)
    batch = sft_batch()
    loss, gradient = jit(jax.value_and_grad(lambda p: reference_loss(model.apply_fn, p, batch)))(model.params)
    after, metrics = step(state, batch, KEY)
    assert_close(after.params, descend(model.params, gradient))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["tokens"] == sum(n - 1 for n in (2, 9, 3, 5))
    assert after.step == 1


def test_it_learns_to_count(model):
    tokens = (jnp.arange(8)[:, None] + jnp.arange(6)[None]).astype(jnp.int32) % VOCABULARY
    batch = SFTBatch(tokens, jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, bool))
    tx = optax.adam(3e-2)
    step = jit(make_sft_step(from_logits(model.apply_fn), tx, accumulation=1))
    state, losses = new_state(model.params, tx), []
    for _ in range(60):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 1.0
    assert losses[-1] < 0.1


def test_accumulation_is_a_bigger_batch(model):
    batch = sft_batch(lengths=(2, 10, 3, 1))  # 1, 9, 2 and no trained tokens: a mean of means would be far off
    step, state = sgd_step(model)
    whole, metrics = step(state, batch, KEY)
    step, state = sgd_step(model, accumulation=4)
    sliced, sliced_metrics = step(state, batch, KEY)
    assert_close(sliced.params, whole.params)
    assert_close(sliced_metrics, metrics)


def test_a_mean_of_slice_means_would_be_caught(plain):
    batch = sft_batch(lengths=(2, 10, 3, 1))
    halves = [take(batch, slice(i, None, 2)) for i in range(2)]
    wrong = sum(reference_loss(plain.apply_fn, plain.params, half) for half in halves) / 2
    assert abs(wrong - reference_loss(plain.apply_fn, plain.params, batch)) > 1e-2


def test_padding_columns_and_row_order_change_nothing(plain):
    batch = sft_batch()
    step, state = sgd_step(plain)
    after, metrics = step(state, batch, KEY)
    order = jnp.array([2, 0, 3, 1])
    for other in (pad_columns(batch, 0, 5, fill=3), pad_columns(batch, 4, 1), take(batch, order)):
        again, other_metrics = step(state, other, KEY)
        assert_close(again.params, after.params)
        assert_close(other_metrics, metrics)


def test_what_padding_holds_is_never_read(plain):
    batch = sft_batch()
    other = batch._replace(tokens=jnp.where(batch.mask, batch.tokens, 6))
    step, state = sgd_step(plain)
    assert_same(step(state, other, KEY), step(state, batch, KEY))


def test_nan_logits_at_padding_reach_no_gradient(plain):
    def with_nan_hidden(params, tokens, mask):
        hidden = jnp.where(mask[:, :, None], plain.apply_fn(params["model"], tokens, mask), jnp.nan)
        return hidden + params["bias"]

    params, tx, batch = {"model": plain.params, "bias": jnp.zeros((1, 1, VOCABULARY))}, optax.sgd(1.0), sft_batch()
    dirty = jit(make_sft_step(from_logits(with_nan_hidden), tx, accumulation=2))
    after, metrics = dirty(new_state(params, tx), batch, KEY)
    step, state = sgd_step(plain, accumulation=2)
    clean, clean_metrics = step(state, batch, KEY)
    assert_close(after.params["model"], clean.params)
    np.testing.assert_allclose(metrics["loss"], clean_metrics["loss"], rtol=1e-6)
    assert all_finite(after.params)


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0), (0, 4)])
def test_rows_without_a_trained_token_are_no_loss(plain, lengths):
    step, state = sgd_step(plain)
    after, metrics = step(state, sft_batch(lengths), KEY)
    assert all_finite((after.params, metrics))
    assert moved(after.params, state.params) == (max(lengths) > 1)
    assert metrics["tokens"] == sum(max(n - 1, 0) for n in lengths)


def test_eval_sums_add_up_over_batches(plain):
    evaluate = jit(make_sft_eval(from_logits(plain.apply_fn)))
    batches = [sft_batch(seed=i, lengths=lengths) for i, lengths in enumerate([(2, 9, 3, 5), (1, 1, 7, 10)])]
    nll, tokens = (sum(x) for x in zip(*(evaluate(plain.params, b) for b in batches), strict=True))
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    np.testing.assert_allclose(nll / tokens, reference_loss(plain.apply_fn, plain.params, whole), rtol=1e-5)


def test_bfloat16_model_float32_loss(plain):
    def half(params, tokens, mask):
        return plain.apply_fn(params, tokens, mask).astype(jnp.bfloat16)

    tx = optax.sgd(0.1)
    after, metrics = jit(make_sft_step(from_logits(half), tx, accumulation=2))(
        new_state(plain.params, tx), sft_batch(), KEY
    )
    assert {x.dtype for x in jax.tree.leaves((after.params, metrics))} == {jnp.dtype("float32")}


def test_traced_once_and_bitwise_repeatable(plain):
    traces = []

    def counted(params, tokens, mask):
        traces.append(1)
        return plain.apply_fn(params, tokens, mask)

    tx = optax.adamw(1e-2)
    step = jit(make_sft_step(from_logits(counted), tx, accumulation=1))
    start = new_state(plain.params, tx)
    state, _ = step(start, sft_batch(seed=0), KEY)
    before = len(traces)
    second = step(state, sft_batch(seed=1), jax.random.key(1))
    assert len(traces) == before
    assert_same(second, step(step(start, sft_batch(seed=0), KEY)[0], sft_batch(seed=1), jax.random.key(1)))


def test_rows_that_do_not_divide_are_named(plain):
    step, state = sgd_step(plain, accumulation=3)
    with pytest.raises(ValueError, match="4 rows do not divide into 3"):
        step(state, sft_batch(), KEY)
