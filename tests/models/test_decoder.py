"""The decoder as pure functions: padding, cache, chunks, dtypes, remat, sampling."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jrlhf.core import answer_keys, from_logits, positions_from_mask, predictable
from jrlhf.models import decoder, decoder_fns, init_params, reward_params, token_slices
from jrlhf.models.arch import Rope
from jrlhf.models.functions import abstract_params, abstract_reward_params
from jrlhf.models.rope import inverse_frequencies
from jrlhf.steps import make_generate
from jrlhf.types import DecodeFns
from tests.support.batches import token_batch


@pytest.fixture(scope="module")
def params(arch, spread):
    return spread(init_params(arch, jax.random.key(0)))


@pytest.fixture(scope="module")
def fns(arch):
    return decoder_fns(arch, dtype="float32", remat=False)


@pytest.fixture(scope="module")
def jitted_logprobs(fns):
    return jax.jit(lambda params, tokens, mask: fns.logprob_fn(params, tokens, mask, temperature=0.7))


ROW = np.random.default_rng(1).integers(1, 61, 8).astype(np.int32)


@given(length=st.integers(2, 8), width=st.sampled_from([8, 12]), shift=st.integers(0, 12), junk=st.integers(0, 60))
def test_padding_changes_no_logprob(params, jitted_logprobs, length, width, shift, junk):
    """A row alone against the same row beside a stranger, anywhere in a wider batch, whatever the padding holds."""
    row = ROW[:length]
    alone = jitted_logprobs(params, jnp.asarray(row)[None], jnp.ones((1, length), jnp.bool_))
    start = min(shift, width - length)
    tokens, mask = np.full((2, width), junk, np.int32), np.zeros((2, width), bool)
    tokens[0, start : start + length], mask[0, start : start + length] = row, True
    tokens[1, -5:], mask[1, -5:] = ROW[:5], True
    padded = jitted_logprobs(params, jnp.asarray(tokens), jnp.asarray(mask))
    for found, expected in zip(padded, alone, strict=True):
        np.testing.assert_allclose(found[0, start + 1 : start + length], expected[0, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefill", [1, 6, 9])
def test_cached_decode_equals_the_full_forward(arch, fns, params, prefill):
    """Left-padded prompts, prefilled in one go, then token by token."""
    tokens, _, mask = token_batch()
    full = fns.apply_fn(params, tokens, mask)
    positions = positions_from_mask(mask)
    cache = fns.decode_fns.init_cache(3, 14)
    decode = jax.jit(fns.decode_fns.decode)
    logits, cache = decode(params, tokens[:, :prefill], positions[:, :prefill], cache)
    for column in range(prefill, 11):
        real = mask[:, column - 1]
        np.testing.assert_allclose(logits[real], full[:, column - 1][real], atol=1e-5)
        assert bool(jnp.all(jnp.isfinite(logits)))
        if column < 10:
            logits, cache = decode(params, tokens[:, column, None], positions[:, column, None], cache)
    assert int(cache.used) == 10
    assert cache.keys[0].shape == (3, arch.num_kv_heads, 14, arch.head_dim)


def test_a_cache_that_is_too_short_is_refused(fns, params):
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3"):
        fns.decode_fns.decode(
            params, jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32), fns.decode_fns.init_cache(1, 3)
        )


def test_sampler_logprobs_equal_the_forward(fns, params):
    tokens, _, mask = token_batch()
    generate = make_generate(
        fns.decode_fns, max_new_tokens=6, temperature=0.7, top_k=0, top_p=1.0, stop_tokens=(5,), pad_token=0
    )
    out = jax.jit(generate)(params, tokens, mask, answer_keys(jax.random.key(2), jnp.arange(len(tokens)), samples=1))
    logprobs, _ = fns.logprob_fn(params, out.tokens, out.mask, temperature=0.7)
    difference = jnp.where(out.response_mask, logprobs - out.logprobs, 0.0)
    assert float(jnp.max(jnp.abs(difference))) < 1e-5
    assert float(jnp.min(out.logprobs)) < -0.5


def test_reading_a_prompt_once_and_leaving_out_what_has_stopped_change_no_answer(fns, params):
    tokens, _, mask = token_batch()
    settings = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "stop_tokens": tuple(range(9))}

    keys = answer_keys(jax.random.key(2), jnp.arange(len(tokens)), samples=4)

    def drawn(tokens, mask, keys, **options):
        generate = make_generate(fns.decode_fns, **settings, pad_token=0, **options)
        return jax.jit(generate)(params, tokens, mask, keys)

    expected = drawn(*(jnp.asarray(np.repeat(x, 4, axis=0)) for x in (tokens, mask)), keys.reshape(-1, 1))
    lengths = np.sort(np.asarray(expected.response_mask).sum(axis=-1))
    assert lengths[len(lengths) // 2] < lengths[-1], "rows leave before the last one ends"
    found = drawn(tokens, mask, keys, drop_ended=True)
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_weights_that_are_cast_once_give_the_same_tokens(arch, params):
    """In bfloat16 a step of decoding reads half the bytes; norms keep their float32 scales."""
    tokens, _, mask = token_batch()
    fns = decoder_fns(arch, dtype="bfloat16", remat=False).decode_fns
    kinds = {path[-1].key: leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(fns.prepare(params))}
    assert kinds["kernel"] == kinds["embed"] == "bfloat16"
    assert kinds["scale"] == "float32"
    settings = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "stop_tokens": (), "pad_token": 0}
    keys = answer_keys(jax.random.key(2), jnp.arange(len(tokens)), samples=1)
    found, expected = (
        jax.jit(make_generate(given, **settings))(params, tokens, mask, keys)
        for given in (fns, DecodeFns(fns.init_cache, fns.decode))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("tied", "columns"), [(True, 1), (False, 4)])
def test_chunked_logprobs_and_their_gradient_equal_the_plain_ones(arch, spread, tied, columns):
    arch = replace(arch, tie_embeddings=tied)
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, mask, _ = token_batch()
    chunked = decoder_fns(arch, dtype="float32", remat=True, logits_at_once=3 * 61 * columns)
    plain = decoder_fns(arch, dtype="float32", remat=False)
    weights = jax.random.normal(jax.random.key(5), tokens.shape)

    def loss(logprob_fn):
        def of_params(params):
            logprobs, entropy = logprob_fn(params, tokens, mask, temperature=0.7)
            return jnp.sum(jnp.where(mask, (logprobs + 0.1 * entropy) * weights, 0.0)), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)

    (_, found), grads = loss(chunked.logprob_fn)
    (_, expected), expected_grads = loss(from_logits(plain.apply_fn))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[predictable(mask)], b[predictable(mask)], atol=1e-5)
        assert np.all(a[:, 0] == 0.0)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))
    assert float(jnp.max(jnp.abs(grads["embed"]))) > 1e-3


WANTED = {
    "answers": lambda mask: mask & (jnp.arange(10)[None] >= jnp.array([6, 2, 5])[:, None]),
    "a few": lambda mask: mask & (jax.random.uniform(jax.random.key(3), mask.shape) < 0.3),
    "all": predictable,
    "none": lambda mask: mask & False,
}


@pytest.mark.parametrize("which", WANTED)
@pytest.mark.parametrize("columns", [3, 30])
def test_what_is_wanted_and_its_gradient_are_what_they_are_among_all(arch, params, monkeypatch, which, columns):
    """Slices of nine tokens, and of as many as all logits would take: two then, by the sizes set here."""
    monkeypatch.setattr(token_slices, "MAX_SLICES", 2)
    monkeypatch.setattr(token_slices, "MIN_SLICE_TOKENS", 1)
    tokens, mask, _ = token_batch()
    wanted = WANTED[which](mask)
    fns = decoder_fns(arch, dtype="float32", remat=False, logits_at_once=3 * 61 * columns)
    weights = jax.random.normal(jax.random.key(5), tokens.shape)

    def loss(logprob_fn, **only):
        def of_params(params):
            found = logprob_fn(params, tokens, mask, temperature=0.7, **only)
            logprobs, entropy = (jnp.where(wanted, x, 0.0) for x in found)
            return jnp.sum((logprobs + 0.1 * entropy) * weights), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)

    (_, found), grads = loss(fns.logprob_fn, where=wanted)
    (_, expected), expected_grads = loss(from_logits(fns.apply_fn))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))
    assert bool(jnp.any(grads["embed"] != 0.0)) == bool(jnp.any(wanted))


def test_no_chunk_holds_more_logits_than_asked(arch):
    tokens, mask, _ = token_batch()
    fns = decoder_fns(arch, dtype="float32", remat=False, logits_at_once=3 * 61 * 4)
    run = partial(fns.logprob_fn, temperature=1.0)
    shapes = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(variable.aval.shape for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(run)(abstract_params(arch), tokens, mask).jaxpr)
    assert (10, 61) in shapes
    assert (30, 61) not in shapes
    assert (3, 10, 61) not in shapes


def test_an_all_masked_row_is_finite_and_changes_nothing(fns, params):
    tokens, mask, _ = token_batch()

    def loss(params, tokens, mask):
        logprobs, entropy = fns.logprob_fn(params, tokens, mask, temperature=1.0)
        return jnp.sum(jnp.where(mask, logprobs + entropy, 0.0))

    empty = jnp.concatenate([mask, jnp.zeros((1, 10), jnp.bool_)])
    more = jnp.concatenate([tokens, tokens[:1]])
    gradient = jax.jit(jax.value_and_grad(loss))
    value, grads = gradient(params, more, empty)
    expected, expected_grads = gradient(params, tokens, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert bool(jnp.all(jnp.isfinite(fns.apply_fn(params, more, empty))))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_computes_close_to_float32_with_float32_logits(arch, params):
    fns = decoder_fns(arch, dtype="bfloat16", remat=False)
    exact = decoder_fns(arch, dtype="float32", remat=False)
    tokens, _, mask = token_batch()
    logits = fns.apply_fn(params, tokens, mask)
    expected = exact.apply_fn(params, tokens, mask)
    assert logits.dtype == jnp.float32
    difference = jnp.where(mask[..., None], logits - expected, 0.0)
    assert 1e-5 < float(jnp.max(jnp.abs(difference))) < 0.05 * float(jnp.max(jnp.abs(expected)))
    last, cache = fns.decode_fns.decode(params, tokens, positions_from_mask(mask), fns.decode_fns.init_cache(3, 12))
    assert last.dtype == jnp.float32
    assert cache.keys[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(last, logits[:, -1], atol=0.03 * float(jnp.max(jnp.abs(expected))))
    reward = reward_params(params, arch, jax.random.key(1))
    assert fns.score_fn(reward, tokens, mask).dtype == jnp.float32


def test_what_is_computed_again_changes_no_gradient(arch, params, monkeypatch):
    tokens, mask, _ = token_batch()
    reward = reward_params(params, arch, jax.random.key(1))

    def grads(remat):
        score_fn = decoder_fns(arch, dtype="float32", remat=remat).score_fn
        return jax.jit(jax.grad(lambda p: jnp.sum(score_fn(p, tokens, mask))))(reward)

    def close(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a, b)

    usual, least = grads(False), grads(True)
    monkeypatch.setattr(decoder.nn, "remat", lambda block, **_: block)
    everything_kept = grads(False)
    close(usual, everything_kept)
    close(least, everything_kept)


@pytest.mark.parametrize("remat", [False, True])
def test_of_attention_nothing_is_kept_for_the_backward_pass(arch, params, remat):
    """Products with a weight alone, and with ``remat`` only what goes into each layer."""
    rows, length = 5, 23
    tokens, mask = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), jnp.bool_)
    reward = reward_params(params, arch, jax.random.key(1))
    score_fn = decoder_fns(arch, dtype="float32", remat=remat).score_fn
    _, pull_back = jax.vjp(lambda p: score_fn(p, tokens, mask), reward)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull_back) if leaf.dtype == jnp.float32]
    a_layer = [shape for shape in kept if shape[0] == arch.num_layers and rows in shape]
    assert not [shape for shape in a_layer if shape.count(length) > 1]
    wide = [shape for shape in a_layer if arch.intermediate_size in shape]
    assert (len(wide) == 0) if remat else (len(wide) == 2), a_layer


def test_abstract_trees_have_the_shapes_of_real_ones(arch):
    untied = replace(arch, tie_embeddings=False)
    params = init_params(untied, jax.random.key(0))
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 48, 32)
    reward = reward_params(params, untied, jax.random.key(0))
    for real, abstract in ((params, abstract_params(untied)), (reward, abstract_reward_params(untied))):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), real)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones():
    """A pair that turns more than 4 times in 64 positions is kept, one that turns less than once is 8 times slower."""
    rope = Rope("llama3", 10000.0, 8.0, 1.0, 4.0, 64)
    scaled, plain = inverse_frequencies(rope, 16), inverse_frequencies(Rope("default", 10000.0), 16)
    turns = 64 * plain / (2 * math.pi)
    assert turns[0] > 4
    assert 1 < turns[1] < 4
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[3:], plain[3:] / 8, rtol=1e-6)
    smooth = (turns[1] - 1) / 3
    np.testing.assert_allclose(scaled[1], plain[1] * (smooth + (1 - smooth) / 8), rtol=1e-6)
