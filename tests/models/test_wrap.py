"""Modules of three libraries, and one without a cache, as the protocols."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jrlhf.core import answer_keys, uncached_decode_fns
from jrlhf.models import decoder_fns, from_equinox, from_linen, from_nnx, init_params
from jrlhf.steps import make_generate

TOKENS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
MASK = jnp.array([[True, True, True], [False, True, True]])


def masked_mean_of_prefix(x, mask):
    """A causal model's least: each position sees the mean of the real tokens up to itself."""
    real = jnp.where(mask[..., None], x, 0.0)
    count = jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.float32), 1.0)
    return jnp.cumsum(real, axis=-2) / count[..., None]


def expected(embedding, kernel):
    return masked_mean_of_prefix(embedding[TOKENS], MASK) @ kernel


def test_linen():
    class Tiny(nn.Module):
        @nn.compact
        def __call__(self, tokens, mask):
            x = nn.Embed(8, 4, name="embed")(tokens)
            return nn.Dense(8, use_bias=False, name="head")(masked_mean_of_prefix(x, mask))

    module = Tiny()
    params = module.init(jax.random.key(0), TOKENS, MASK)["params"]
    found = jax.jit(from_linen(module))(params, TOKENS, MASK)
    np.testing.assert_allclose(found, expected(params["embed"]["embedding"], params["head"]["kernel"]), atol=1e-6)


def test_nnx_without_dropout_and_without_touching_the_module():
    class Tiny(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(8, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(4, 8, use_bias=False, rngs=rngs)

        def __call__(self, tokens, mask):
            return self.head(self.drop(masked_mean_of_prefix(self.embed(tokens), mask)))

    module = Tiny(nnx.Rngs(0))
    params, fn = from_nnx(module)
    want = expected(module.embed.embedding[...], module.head.kernel[...])
    np.testing.assert_allclose(jax.jit(fn)(params, TOKENS, MASK), want, atol=1e-6)
    assert module.drop.deterministic is False
    grads = jax.grad(lambda p: jnp.sum(fn(p, TOKENS, MASK)))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert len(jax.tree.leaves(params)) == 2
    doubled = jax.tree.map(lambda x: x * 2.0, params)
    np.testing.assert_allclose(fn(doubled, TOKENS, MASK), want * 4.0, atol=1e-5)


def test_equinox_one_sequence_at_a_time():
    eqx = pytest.importorskip("equinox")

    class Tiny(eqx.Module):
        embed: jax.Array
        head: jax.Array
        drop: eqx.nn.Dropout
        size: int = eqx.field(static=True)

        def __call__(self, tokens, mask):
            return self.drop(masked_mean_of_prefix(self.embed[tokens], mask)) @ self.head

    keys = jax.random.split(jax.random.key(0))
    embed, head = jax.random.normal(keys[0], (8, 4)), jax.random.normal(keys[1], (4, 8))
    params, fn = from_equinox(Tiny(embed, head, eqx.nn.Dropout(0.5), 8))
    np.testing.assert_allclose(jax.jit(fn)(params, TOKENS, MASK), expected(embed, head), atol=1e-5)
    assert len(jax.tree.leaves(params)) == 2


def test_uncached_decoding_samples_what_the_cache_samples(arch, spread):
    params = spread(init_params(arch, jax.random.key(0)))
    fns = decoder_fns(arch, dtype="float32", remat=False)

    def sample(decode_fns):
        generate = make_generate(
            decode_fns, max_new_tokens=5, temperature=1.0, top_k=0, top_p=1.0, stop_tokens=(3,), pad_token=0
        )
        return jax.jit(generate)(
            params, TOKENS, MASK, answer_keys(jax.random.key(4), jnp.arange(len(TOKENS)), samples=1)
        )

    cached, uncached = sample(fns.decode_fns), sample(uncached_decode_fns(fns.apply_fn))
    np.testing.assert_array_equal(cached.tokens, uncached.tokens)
    np.testing.assert_allclose(cached.logprobs, uncached.logprobs, atol=1e-5)


def test_importing_models_imports_neither_transformers_nor_equinox():
    code = "import sys, jrlhf.models; print([m for m in ('transformers', 'torch', 'equinox') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
