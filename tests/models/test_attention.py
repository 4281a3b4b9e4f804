"""Attention in blocks and by a fused kernel, against a loop; and a kernel never falls back in silence."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import positions_from_mask
from jrlhf.models import attention as attention_module
from jrlhf.models import decoder_fns, init_params
from jrlhf.models.attention import attend, attention_mask, causal_attend, fused_attention
from tests.support.attention import HEADS, KV_HEADS, LENGTH, RIGHT, ROWS, WIDTH, by_hand


def in_blocks(q, k, v, seen):
    """``causal_attend`` in the form of ``fused_attention``."""
    q_BKGTH = q.reshape(ROWS, LENGTH, KV_HEADS, HEADS // KV_HEADS, WIDTH).transpose(0, 2, 3, 1, 4)
    found = causal_attend(q_BKGTH, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), seen, cap=None)
    return found.reshape(ROWS, LENGTH, HEADS, WIDTH)


@pytest.mark.parametrize(
    ("attention", "queries", "most"),
    [(partial(fused_attention, implementation="xla"), 0, 0), (in_blocks, 2, 3), (in_blocks, 4, 8), (in_blocks, 1, 2)],
)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_it_is_attention_over_what_each_query_sees(monkeypatch, attention, queries, most, layout, window):
    monkeypatch.setattr(attention_module, "MIN_BLOCK_QUERIES", queries)
    monkeypatch.setattr(attention_module, "MAX_BLOCKS", most)
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 0, 0]], np.int32)
    mask = {"right": RIGHT, "left": RIGHT[:, ::-1], "packed": segments}[layout]
    positions = positions_from_mask(jnp.asarray(mask))
    seen = attention_mask(
        positions, positions, window=window, segments=jnp.asarray(segments) if layout == "packed" else None
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def total(q, k, v):
        found = attention(q, k, v, seen)
        return jnp.sum(jnp.where((mask > 0)[:, :, None, None], found, 0.0)), found

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    real = np.asarray(mask) > 0
    np.testing.assert_allclose(found[real], by_hand(*map(np.asarray, (q, k, v, seen[:, 0, 0])))[real], atol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (found, *gradients))


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize(("queries", "most"), [(2, 3), (4, 8), (16, 8)])
def test_its_gradient_is_that_of_the_plain_form(monkeypatch, queries, most, window, cap):
    """Of sequences packed and padded; what a padding query's mean is worth comes back to nobody."""
    monkeypatch.setattr(attention_module, "MIN_BLOCK_QUERIES", queries)
    monkeypatch.setattr(attention_module, "MAX_BLOCKS", most)
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], jnp.int32)
    positions = positions_from_mask(segments)
    seen = attention_mask(positions, positions, window=window, segments=segments)
    keys = jax.random.split(jax.random.key(1), 4)
    groups = HEADS // KV_HEADS
    shapes = [(ROWS, KV_HEADS, groups, LENGTH, WIDTH), *[(ROWS, KV_HEADS, LENGTH, WIDTH)] * 2]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    of_each = jax.random.normal(keys[3], (ROWS, LENGTH, KV_HEADS, groups, WIDTH))

    def plain(q, k, v):
        scores = attention_module.soft_cap(jnp.einsum("BKGTH,BKSH->BKGTS", q, k), cap)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        found = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v)
        return jnp.where((segments > 0)[:, :, None, None, None], found, 0.0)

    def total(attention):
        return lambda *given: jnp.sum(attention(*given) * of_each)

    expected = jax.grad(total(plain), argnums=(0, 1, 2))(q, k, v)
    found = jax.grad(total(partial(causal_attend, mask=seen, cap=cap)), argnums=(0, 1, 2))(q, k, v)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert not np.any(np.concatenate([x[2].ravel() for x in found]))


@pytest.mark.parametrize(("remat", "squares"), [(False, 2), (True, 3)])
def test_the_backward_pass_does_not_attend_again(arch, remat, squares):
    """Forward each weight is made once, backward once more; only where whole layers are recomputed a third time."""
    params = init_params(arch, jax.random.key(0))
    tokens, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), jnp.bool_)
    fns = decoder_fns(arch, dtype="float32", remat=remat)
    traced = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(fns.apply_fn(p, tokens, mask))))(params))
    assert len(re.findall(r":f32\[1,2,\d,\d,8\] = exp ", traced)) == squares


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1])
def test_a_decoder_takes_the_kernel_it_is_told_to(arch, spread, monkeypatch, length):
    """Rows of odd length are padded, since cuDNN has no gradient for them."""
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, mask = jnp.arange(3 * LENGTH, dtype=jnp.int32).reshape(3, LENGTH), jnp.asarray(RIGHT)
    tokens, mask = tokens[:, :length], mask[:, :length]
    told = decoder_fns(arch, dtype="float32", remat=False, attention="cudnn")
    plain = decoder_fns(arch, dtype="float32", remat=False)
    with pytest.raises(Exception, match="cuDNN"):
        told.apply_fn(params, tokens, mask)
    asked, usual = [], jax.nn.dot_product_attention

    def noted(*given, implementation, **settings):
        asked.append(implementation)
        assert given[0].shape[1] % 2 == given[1].shape[1] % 2 == 0
        return usual(*given, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    found, expected = (fns.apply_fn(params, tokens, mask) for fns in (told, plain))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
    assert set(asked) == {"cudnn"}


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_single_query_in_bfloat16_is_that_of_float32(cap):
    """As in decoding without groups: it is computed beside its copy, and no copy of keys and values is made."""
    rows, heads, slots, width = 3, 2, 40, 16
    q, k, v = (
        jax.random.normal(jax.random.key(n), (rows, heads, *shape), jnp.float32).astype(jnp.bfloat16)
        for n, shape in enumerate([(1, 1, width), (slots, width), (slots, width)])
    )
    filled = jnp.array([40, 7, 1])
    seen = (jnp.arange(slots)[None] < filled[:, None])[:, None, None, None]
    program = jax.jit(partial(attend, cap=cap)).lower(q, k, v, seen).compile()
    found = np.asarray(program(q, k, v, seen), np.float64)
    exact_q, exact_k, exact_v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, n in np.ndindex(rows, heads):
        scores = exact_k[b, n, : filled[b]] @ exact_q[b, n, 0, 0]
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        # A weight, and what comes out, is rounded to 8 bits.
        np.testing.assert_allclose(found[b, 0, n, 0], weights / weights.sum() @ exact_v[b, n, : filled[b]], atol=0.02)
    if jax.__version_info__ >= (0, 12):
        assert f"f32[{rows},{heads},{slots},{width}]" not in program.as_text()


def test_a_soft_cap_is_refused(arch):
    with pytest.raises(ValueError, match="attention: 'cudnn' has no soft cap"):
        decoder_fns(replace(arch, attention_softcap=50.0), dtype="bfloat16", remat=False, attention="cudnn")
