"""A KV cache in int8: rounding against a loop, attention over it, what a decoder says with it, its bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.core import answer_keys, positions_from_mask
from jrlhf.models import decoder_fns, init_params, int8_cache
from jrlhf.models.attention import attend, attention_mask
from jrlhf.models.cache import Quantised, append_entries, attend_cached, quantise
from jrlhf.steps import make_generate
from tests.support.attention import HEADS, KV_HEADS, LENGTH, RIGHT, ROWS, WIDTH, by_hand
from tests.support.batches import token_batch

SHAPES = {
    "grouped": {},
    "one head for all": {"num_kv_heads": 1},
    "windows": {"window": 3, "local_layers": (True, False, True)},
    "soft caps": {"attention_softcap": 2.0, "final_softcap": 8.0},
    "learned positions": {"rope": None, "norm": "layer", "gated_mlp": False},
}


def rounded_by_hand(x):
    """A loop over rows, heads, slots and numbers, in double precision."""
    rounded, scales = np.zeros(x.shape, np.int8), np.zeros(x.shape[:-1])
    for at in np.ndindex(scales.shape):
        scales[at] = max(abs(float(number)) for number in x[at]) / 127
        if scales[at] > 0:
            # Python rounds halves to the even neighbour.
            rounded[at] = [round(float(number) / scales[at]) for number in x[at]]
    return rounded, scales


def dequantised(x):
    return np.asarray(x.scales)[..., None] * np.asarray(x.values, np.float32)


def drawn(shape, *, seed, dtype=jnp.float32):
    """Normal numbers whose size differs from vector to vector, of which one is zero."""
    keys = jax.random.split(jax.random.key(seed))
    sizes = 10.0 ** jax.random.uniform(keys[0], (*shape[:-1], 1), minval=-6.0, maxval=6.0)
    return (jax.random.normal(keys[1], shape) * sizes).at[0, 0, 1].set(0.0).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_rounded_as_by_a_loop(dtype):
    x = drawn((3, 2, 5, 8), seed=0, dtype=dtype)
    found = jax.jit(quantise)(x)
    rounded, scales = rounded_by_hand(np.asarray(x, np.float64))
    assert (found.values.dtype, found.scales.dtype) == (jnp.int8, jnp.float32)
    np.testing.assert_array_equal(found.values, rounded)
    np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    assert np.max(np.abs(rounded), axis=-1).tolist() == np.where(scales > 0, 127, 0).tolist()


@given(seed=st.integers(0, 2**31), width=st.sampled_from([1, 8, 128]))
def test_no_number_is_off_by_more_than_half_a_step(seed, width):
    x = np.asarray(drawn((2, 1, 3, width), seed=seed))
    step = np.max(np.abs(x), axis=-1, keepdims=True) / 127
    error = np.abs(dequantised(quantise(jnp.asarray(x))) - x)
    assert np.all(error <= step / 2 * (1 + 1e-5))


def test_halves_go_to_the_even_neighbour():
    x = jnp.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], jnp.float32)[None, None, None]
    for scale in (1.0, 2.0**-20, 2.0**20):
        found = quantise(x * scale)
        assert found.scales.tolist() == [[[scale]]]
        assert found.values.tolist() == [[[[127, 0, 2, 2, 0, -2, -2, 126]]]]


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-40])
def test_a_vector_of_nothing_is_zeros(size):
    """Also one so small that its scale is no normal number, which a processor may take for 0."""
    found = quantise(jnp.full((1, 1, 2, 8), size, jnp.float32))
    assert not np.any(found.values)
    np.testing.assert_allclose(found.scales, size, atol=1e-37)


def test_a_number_that_is_none_is_not_hidden():
    x = jnp.ones((1, 1, 3, 8), jnp.float32).at[0, 0, 1, 3].set(jnp.nan).at[0, 0, 2, 3].set(jnp.inf)
    assert np.isfinite(quantise(x).scales).tolist() == [[[True, False, False]]]


def test_it_is_written_where_the_slots_are_free():
    x = drawn((3, 2, 5, 8), seed=1)
    empty = Quantised(jnp.zeros((3, 2, 9, 8), jnp.int8), jnp.zeros((3, 2, 9), jnp.float32))
    once = append_entries(empty, x, jnp.int32(0))
    twice = append_entries(append_entries(empty, x[:, :, :3], jnp.int32(0)), x[:, :, 3:], jnp.int32(3))
    for found in (once, twice):
        for mine, theirs in zip(found, quantise(x), strict=True):
            np.testing.assert_array_equal(mine[:, :, :5], theirs)
            assert not np.any(mine[:, :, 5:])
    plain = append_entries(jnp.zeros((3, 2, 9, 8), jnp.float32), x, jnp.int32(4))
    np.testing.assert_array_equal(plain[:, :, 4:], x)


def attention_case():
    """Queries by head, keys and values of each slot, and which rows and slots are real."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (jax.random.normal(key, (ROWS, LENGTH, n, WIDTH)) for key, n in zip(keys, heads, strict=True))
    q_BKGTH = q.reshape(ROWS, LENGTH, KV_HEADS, HEADS // KV_HEADS, WIDTH).transpose(0, 2, 3, 1, 4)
    return q, q_BKGTH, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), RIGHT[:, ::-1]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [0, 2])
def test_attention_over_it_is_attention_over_what_it_stands_for(window, cap):
    q, q_BKGTH, k, v, mask = attention_case()
    positions = positions_from_mask(jnp.asarray(mask))
    seen = attention_mask(positions, positions, window=window, segments=None)
    keys, values = quantise(k), quantise(v)
    found = jax.jit(lambda *given: attend_cached(*given, seen, cap=cap))(q_BKGTH, keys, values)
    plain = dequantised(keys), dequantised(values)
    expected = attend(q_BKGTH, *map(jnp.asarray, plain), seen, cap=cap)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if cap is None:
        by_token = (x.transpose(0, 2, 1, 3) for x in plain)
        by_head = by_hand(np.asarray(q), *by_token, np.asarray(seen[:, 0, 0]))
        np.testing.assert_allclose(found.reshape(q.shape)[mask], by_head[mask], atol=1e-5)
    exact = attend(q_BKGTH, k, v, seen, cap=cap)
    assert 1e-4 < float(jnp.max(jnp.abs(found - exact))) < 0.05
    np.testing.assert_array_equal(attend_cached(q_BKGTH, k, v, seen, cap=cap), exact)


def test_in_bfloat16_it_is_as_near_as_bfloat16_is():
    _, *given, mask = attention_case()
    positions = positions_from_mask(jnp.asarray(mask))
    seen = attention_mask(positions, positions, window=0, segments=None)
    q, k, v = (x.astype(jnp.bfloat16) for x in given)
    keys, values = quantise(k), quantise(v)
    found = attend_cached(q, keys, values, seen, cap=None)
    assert found.dtype == jnp.bfloat16
    expected = attend(q.astype(jnp.float32), *(jnp.asarray(dequantised(x)) for x in (keys, values)), seen, cap=None)
    # Weights and result are rounded to 8 bits.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2**-8 * float(jnp.max(jnp.abs(expected))))


def decoded(fns, params, tokens, mask, *, prefill):
    """Logits after each token from the last of the prefill on, and the cache."""
    positions = positions_from_mask(mask)
    decode = jax.jit(fns.decode)
    logits, cache = decode(params, tokens[:, :prefill], positions[:, :prefill], fns.init_cache(len(tokens), 14))
    found = [logits]
    for column in range(prefill, tokens.shape[1]):
        logits, cache = decode(params, tokens[:, column, None], positions[:, column, None], cache)
        found.append(logits)
    return jnp.stack(found, axis=1), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoder_says_nearly_what_it_says_with_an_exact_cache(arch, spread, shape, dtype):
    arch = replace(arch, **SHAPES[shape])
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, _, mask = token_batch()
    fns = decoder_fns(arch, dtype=dtype, remat=False).decode_fns
    exact, _ = decoded(fns, params, tokens, mask, prefill=6)
    found, _ = decoded(int8_cache(fns), params, tokens, mask, prefill=6)
    assert found.dtype == jnp.float32
    real = np.asarray(mask[:, 5:])
    difference, largest = np.abs(found - exact)[real], np.abs(exact[real]).max()
    # Numbers are off by at most 1/254 of their vector's largest. Measured: of the largest logit the worst is off by
    # 1/135, the mean one by 1/780; in bfloat16, which rounds besides, by 1/61 and 1/390.
    assert 1e-4 * largest < difference.max() < (0.02 if dtype == "float32" else 0.04) * largest
    assert difference.mean() < (0.003 if dtype == "float32" else 0.006) * largest


def test_it_does_not_matter_how_much_of_a_prompt_is_read_at_once(arch, spread):
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, _, mask = token_batch()
    fns = int8_cache(decoder_fns(arch, dtype="float32", remat=False).decode_fns)
    one, six, nine = (decoded(fns, params, tokens, mask, prefill=n)[0][:, -2:] for n in (1, 6, 9))
    # A number that another order of sums takes across a half moves a logit by some 0.002.
    np.testing.assert_allclose(one, nine, atol=0.01)
    np.testing.assert_allclose(six, nine, atol=0.01)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_its_leaves_have_rows_first_and_take_a_byte_a_number(arch, dtype, size):
    rows, slots = 3, 14
    plain = decoder_fns(arch, dtype=dtype, remat=False).decode_fns
    cache = int8_cache(plain).init_cache(rows, slots)
    for held in (*cache.keys, *cache.values):
        assert (held.values.dtype, held.scales.dtype) == (jnp.int8, jnp.float32)
        assert held.values.shape == (rows, arch.num_kv_heads, slots, arch.head_dim)
        assert held.scales.shape == (rows, arch.num_kv_heads, slots)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache) if leaf.ndim} == {rows}

    def size_of(cache):
        return sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))

    vectors = 2 * arch.num_layers * rows * arch.num_kv_heads * slots
    assert size_of(cache) == vectors * (arch.head_dim + 4)
    assert size_of(plain.init_cache(rows, slots)) == vectors * arch.head_dim * size
    tokens, _, mask = token_batch()
    _, after = decoded(int8_cache(plain), init_params(arch, jax.random.key(0)), tokens, mask, prefill=6)
    before, found = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (cache, after))
    assert found == before


def test_reading_a_prompt_once_and_leaving_out_what_has_stopped_change_no_answer(arch, spread):
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, _, mask = token_batch()
    fns = int8_cache(decoder_fns(arch, dtype="float32", remat=False).decode_fns)
    settings = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "stop_tokens": tuple(range(9))}

    keys = answer_keys(jax.random.key(3), jnp.arange(len(tokens)), samples=4)

    def answers(tokens, mask, keys, **options):
        generate = make_generate(fns, **settings, pad_token=0, **options)
        return jax.jit(generate)(params, tokens, mask, keys)

    expected = answers(*(jnp.asarray(np.repeat(x, 4, axis=0)) for x in (tokens, mask)), keys.reshape(-1, 1))
    lengths = np.sort(np.asarray(expected.response_mask).sum(axis=-1))
    assert lengths[len(lengths) // 2] < lengths[-1], "rows leave before the last one ends"
    found = answers(tokens, mask, keys, drop_ended=True)
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=0.01)
