"""Attention by the splash kernel, interpreted step by step on a CPU, beside XLA's own: values and gradients."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import positions_from_mask
from jrlhf.core.masks import real_tokens
from jrlhf.models import decoder_fns, init_params
from jrlhf.models import splash as splash_module
from jrlhf.models.attention import attention_mask, causal_attend
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.models.splash import Segments, needs_interpreter, splash_attention
from jrlhf.parallel import make_mesh, shard_batch, tree_shardings

HEADS, KV_HEADS, WIDTH = 4, 2, 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 128 places: sequences of a few hundred take several."""
    set_blocks(monkeypatch, keys=128)


def set_blocks(monkeypatch, *, keys, queries=1024):
    monkeypatch.setattr(splash_module, "MAX_KEYS", keys)
    monkeypatch.setattr(splash_module, "MAX_QUERIES", queries)
    monkeypatch.setattr(splash_module, "KEYS_AT_ONCE", 128)


def layout(name, rows, length):
    """Token masks; of packed sequences some end where a block does, one is a single token, and padding follows."""
    at = np.arange(length)[None]
    match name:
        case "right":
            return at < np.linspace(length, 1, rows).astype(int)[:, None]
        case "left":
            return at >= np.linspace(0, length - 1, rows).astype(int)[:, None]
        case "holes":
            return (at + np.arange(rows)[:, None]) % 3 > 0
        case "packed":
            ends = np.array([100, 101, 128, length - 5])
            number = np.where(at < length - 5, 1 + np.searchsorted(ends, at, side="right"), 0)
            return number.astype(np.int32).repeat(rows, 0)


def drawn(rows, length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, of_each = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return (q * WIDTH**-0.5, k, v), of_each


def by_splash(q, k, v, mask, *, window=0, cap=None, mesh=None):
    seen = Segments(mask.astype(jnp.int32), jnp.int32(0))
    return splash_attention(q, k, v, seen, windows=(window,), cap=cap, mesh=mesh, interpret=needs_interpreter(mesh))


def by_xla(q, k, v, mask, *, window=0, cap=None):
    rows, length, _, width = q.shape
    positions = positions_from_mask(mask)
    segments = None if mask.dtype == jnp.bool_ else mask
    seen = attention_mask(positions, positions, window=window, segments=segments)
    q_BKGTH = q.reshape(rows, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return causal_attend(q_BKGTH, k_BKTH, v_BKTH, seen, cap=cap).reshape(q.shape)


def with_gradients(attention, given, of_each, mask):
    """What real tokens get, and the gradients of a sum of it; jitted, as the interpreter is slow without."""

    def total(q, k, v):
        found = jnp.where(real_tokens(mask)[..., None, None], attention(q, k, v, mask).astype(jnp.float32), 0.0)
        return jnp.sum(found * of_each.astype(jnp.float32)), found

    (_, found), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*given)
    return found, *gradients


def off(found, expected):
    """The largest difference of each array, as a share of the largest value."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, expected, strict=True)]
    return max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)


@pytest.mark.parametrize(
    ("where", "length", "window", "cap", "largest"),
    [
        ("right", 256, 0, None, 128),
        ("left", 200, 70, None, 128),
        ("holes", 129, 0, None, 128),
        ("packed", 300, 0, 1.5, 128),
        ("packed", 384, 20, None, 128),
        ("left", 900, 200, None, 512),
        ("left", 5, 2, 0.5, 512),
    ],
)
def test_it_is_xlas_attention(monkeypatch, where, length, window, cap, largest):
    """Sums of up to 900 float32 products in another order: a few units in the last place, 1.2e-7, of each."""
    set_blocks(monkeypatch, keys=largest, queries=256)
    mask = jnp.asarray(layout(where, 2, length))
    given, of_each = drawn(2, length)
    ours, theirs = (partial(attention, window=window, cap=cap) for attention in (by_splash, by_xla))
    assert off(with_gradients(ours, given, of_each, mask), with_gradients(theirs, given, of_each, mask)) < 3e-6


def test_bfloat16_is_rounded_no_further_than_by_xlas_own():
    """Beside float32 of the same numbers: weights, means and gradients are rounded to 8 bits by either."""
    mask = jnp.asarray(layout("packed", 2, 300))
    given, of_each = drawn(2, 300, jnp.bfloat16)
    exact = with_gradients(by_xla, tuple(x.astype(jnp.float32) for x in given), of_each, mask)
    ours, theirs = (with_gradients(attention, given, of_each, mask) for attention in (by_splash, by_xla))
    assert [x.dtype for x in ours[1:]] == [jnp.bfloat16] * 3
    assert off(ours, exact) < 1.5 * off(theirs, exact) < 0.01


def test_padding_stays_finite_and_touches_nothing():
    """A row of nothing else, and what stands in padding: no real token's number or gradient knows of it."""
    mask = jnp.asarray(np.stack([layout("left", 1, 200)[0] & False, np.arange(200) % 150 > 20]))
    given, of_each = drawn(2, 200)
    real = mask[..., None, None]
    found, *gradients = with_gradients(by_splash, given, of_each, mask)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (by_splash(*given, mask), *gradients))
    assert not any(np.any(np.where(real, 0.0, x)) for x in gradients)
    other = tuple(jnp.where(real, x, 30.0 - x) for x in given)
    for before, after in zip((found, *gradients), with_gradients(by_splash, other, of_each, mask), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "rows"),
    [(2, 2, 2, 4), (1, 2, 4, 2), (4, 1, 2, 2)],
    ids=["rows and heads", "two heads on four devices", "two rows on four devices"],
)
def test_it_is_spread_over_a_mesh(data, fsdp, tensor, rows):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    mask = jnp.asarray(layout("left", rows, 200))
    given, of_each = drawn(rows, 200)
    found = with_gradients(partial(by_splash, mesh=mesh), given, of_each, mask)
    assert off(found, with_gradients(by_xla, given, of_each, mask)) < 3e-6


@pytest.fixture(scope="module")
def mixed(arch):
    """Local layers beside a global one, grouped queries and a soft cap, as in Gemma 2."""
    return replace(arch, max_positions=256, attention_softcap=20.0, window=40, local_layers=(True, False, True))


def logprobs_and_gradients(arch, params, tokens, mask, **settings):
    """Of the tokens after a real one: a row's first is told by what stands before it, padding perhaps."""
    fns = decoder_fns(arch, dtype="float32", **{"remat": False} | settings)
    real = real_tokens(jnp.asarray(mask))
    told = real & jnp.pad(real, ((0, 0), (1, 0)))[:, :-1]

    def total(params):
        logprobs = jnp.where(told, fns.logprob_fn(params, tokens, mask, temperature=1.0)[0], 0.0)
        return jnp.sum(logprobs), logprobs

    (_, logprobs), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return jax.tree.leaves((logprobs, gradients))


def texts(arch, where):
    return np.random.default_rng(0).integers(0, arch.vocab_size, (4, 160), np.int32), layout(where, 4, 160)


@pytest.mark.parametrize(("where", "remat"), [("packed", False), ("left", True)])
def test_a_decoder_gives_the_same_with_it(mixed, spread, where, remat):
    params = spread(init_params(mixed, jax.random.key(0)))
    batch = jax.tree.map(jnp.asarray, texts(mixed, where))
    expected = logprobs_and_gradients(mixed, params, *batch)
    assert off(logprobs_and_gradients(mixed, params, *batch, attention="splash", remat=remat), expected) < 1e-5


def test_a_decoder_gives_the_same_with_it_on_eight_devices(mixed, spread):
    params = spread(init_params(mixed, jax.random.key(0)))
    batch, mesh = texts(mixed, "left"), make_mesh(data=2, fsdp=2, tensor=2)
    expected = logprobs_and_gradients(mixed, params, *jax.tree.map(jnp.asarray, batch))
    placed = jax.device_put(params, tree_shardings(params, mesh, SHARDING_RULES))
    found = logprobs_and_gradients(mixed, placed, *shard_batch(batch, mesh), attention="splash", mesh=mesh)
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_does_not_attend_again(mixed, remat):
    """What the kernels gave is kept, whatever a layer's kind; only where whole layers are recomputed they run again."""
    params = init_params(mixed, jax.random.key(0))
    tokens, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), jnp.bool_)
    fns = decoder_fns(mixed, dtype="float32", remat=remat, attention="splash")
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(fns.apply_fn(p, tokens, mask))))
    again = re.findall(r"rematted_computation\S*splash_mha_fwd", gradient.lower(params).compile().as_text())
    assert bool(again) == remat


@pytest.mark.parametrize("width", [8, 80, 128])
def test_for_a_tpu_its_kernels_are_lowered_and_not_interpreted(width):
    """As far as no TPU is needed: to two kernels a kind, forward and of all gradients, for a mesh too."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    q, k, v = (jnp.zeros((4, 300, heads, width), jnp.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = jnp.asarray(layout("packed", 4, 300))

    def total(q, k, v, seen):
        found = splash_attention(q, k, v, seen, windows=(0, 70), cap=30.0, mesh=mesh, interpret=False)
        return jnp.sum(found.astype(jnp.float32) ** 2.0)

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v, Segments(mask, jnp.int32(0)))
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call(") == 2 * 2


def test_more_than_the_default_precision_of_bfloat16_is_refused():
    given, _ = drawn(1, 8, jnp.bfloat16)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match="attention: splash takes bfloat16 at the default matmul precision alone"),
    ):
        by_splash(*given, jnp.ones((1, 8), jnp.bool_))
