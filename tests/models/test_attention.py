"""Attention in blocks and by a fused kernel, against a loop; and a kernel never falls back in silence."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import positions_from_mask
from jrlhf.models import decoder_fns, init_params, layers
from jrlhf.models.layers import attention_mask, causal_attend, fused_attention

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 3, 6, 4, 2, 8
RIGHT = np.arange(LENGTH)[None] < np.array([[6], [3], [1]])


def by_hand(q, k, v, mask):
    """A loop over rows, heads and queries; nothing where a query sees nothing."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(ROWS, LENGTH, HEADS):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = k[b, seen, n // (HEADS // KV_HEADS)] @ q[b, t, n]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // (HEADS // KV_HEADS)]
    return out


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
    monkeypatch.setattr(layers, "QUERIES", queries)
    monkeypatch.setattr(layers, "MOST_BLOCKS", most)
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


def test_a_decoder_takes_the_kernel_it_is_told_to(arch, spread, monkeypatch):
    params = spread(init_params(arch, jax.random.key(0)))
    tokens, mask = jnp.arange(3 * LENGTH, dtype=jnp.int32).reshape(3, LENGTH), jnp.asarray(RIGHT)
    told = decoder_fns(arch, dtype="float32", remat=False, attention="cudnn")
    plain = decoder_fns(arch, dtype="float32", remat=False)
    with pytest.raises(Exception, match="cuDNN"):
        told.apply_fn(params, tokens, mask)
    asked, usual = [], jax.nn.dot_product_attention

    def noted(*given, implementation, **settings):
        asked.append(implementation)
        return usual(*given, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    found, expected = (fns.apply_fn(params, tokens, mask) for fns in (told, plain))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
    assert set(asked) == {"cudnn"}


def test_a_soft_cap_is_refused(arch):
    with pytest.raises(ValueError, match="attention: 'cudnn' knows no soft cap"):
        decoder_fns(replace(arch, attention_softcap=50.0), dtype="bfloat16", remat=False, attention="cudnn")
