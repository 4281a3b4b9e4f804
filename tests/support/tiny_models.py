"""Three users' models: a Flax Linen module, an NNX module and plain functions. None of them imports jrlhf.

Each is a language model over ``VOCABULARY`` tokens and, with one output, a scalar head. What a position sees is its own
token and the mean of the real tokens up to it, so left and right padding must come to the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

VOCABULARY, WIDTH = 7, 8


class TinyModel(NamedTuple):
    """``apply_fn`` gives logits and ``score_fn`` a scalar at every position, each with parameters of its own."""

    name: str
    params: Any
    apply_fn: Callable
    value_params: Any
    score_fn: Callable


def mean_of_prefix(x, mask):
    """The mean of the real positions up to each, itself included; 0 before the first."""
    real = mask[:, :, None]
    count = jnp.cumsum(real, axis=1, dtype=jnp.float32)
    return jnp.cumsum(jnp.where(real, x, 0.0), axis=1) / jnp.maximum(count, 1.0)


class LinenModel(linen.Module):
    """Causal attention and an MLP."""

    outputs: int

    @linen.compact
    def __call__(self, tokens, mask):
        length = tokens.shape[1]
        x = linen.Embed(VOCABULARY, WIDTH)(tokens)
        query, key, value = (linen.Dense(WIDTH, name=name)(x) for name in ("query", "key", "value"))
        allowed = jnp.tril(jnp.ones((length, length), bool))[None] & mask[:, None, :]
        weights = jax.nn.softmax(jnp.where(allowed, query @ key.swapaxes(1, 2), -1e9), axis=-1)
        x = x + weights @ value
        return linen.Dense(self.outputs)(jax.nn.gelu(linen.Dense(2 * WIDTH)(x)))


class NNXModel(nnx.Module):
    """An MLP over the token and the mean of its prefix."""

    def __init__(self, outputs, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(2 * WIDTH, 2 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(2 * WIDTH, outputs, rngs=rngs)

    def __call__(self, tokens, mask):
        x = self.embed(tokens)
        x = jnp.concatenate([x, mean_of_prefix(x, mask)], axis=-1)
        return self.out(nnx.gelu(self.hidden(x)))


def plain_init(seed, outputs):
    rng = np.random.default_rng(seed)
    normal = lambda rows, columns, scale: jnp.asarray(rng.normal(size=(rows, columns)) * scale, jnp.float32)  # noqa: E731
    return {
        "embed": normal(VOCABULARY, WIDTH, 1.0),
        "hidden": normal(2 * WIDTH, 2 * WIDTH, 0.25),
        "out": normal(2 * WIDTH, outputs, 0.25),
    }


def plain_head(params, x, mean):
    return jax.nn.gelu(jnp.concatenate([x, mean], axis=-1) @ params["hidden"]) @ params["out"]


def plain_apply(params, tokens, mask):
    x = params["embed"][tokens]
    return plain_head(params, x, mean_of_prefix(x, mask))


def _scalar(apply_fn):
    return lambda params, tokens, mask: apply_fn(params, tokens, mask)[:, :, 0]


def plain_model():
    policy, value = plain_init(0, VOCABULARY), plain_init(1, 1)
    return TinyModel("plain", policy, plain_apply, value, _scalar(plain_apply))


def linen_model():
    sample = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    policy, value = LinenModel(VOCABULARY), LinenModel(1)
    return TinyModel(
        "linen",
        jax.jit(policy.init)(jax.random.key(0), *sample),
        policy.apply,
        jax.jit(value.init)(jax.random.key(1), *sample),
        _scalar(value.apply),
    )


def nnx_model():
    def functional(outputs, seed):
        graph, params = nnx.split(NNXModel(outputs, nnx.Rngs(seed)), nnx.Param)
        return params, lambda params, tokens, mask: nnx.merge(graph, params)(tokens, mask)

    (policy, apply_fn), (value, value_fn) = functional(VOCABULARY, 0), functional(1, 1)
    return TinyModel("nnx", policy, apply_fn, value, _scalar(value_fn))


MODELS = {"linen": linen_model, "nnx": nnx_model, "plain": plain_model}


def recomputing_decode(apply_fn):
    """(init_cache, decode) of any model: the cache is the tokens themselves, and every call reads them all again."""

    def init_cache(batch, length):
        return jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), bool), jnp.int32(0)

    def decode(params, tokens, positions, cache):
        seen, mask, end = cache
        seen = jax.lax.dynamic_update_slice(seen, tokens, (jnp.int32(0), end))
        mask = jax.lax.dynamic_update_slice(mask, positions >= 0, (jnp.int32(0), end))
        end = end + tokens.shape[1]
        logits = apply_fn(params, seen, mask)
        return jax.lax.dynamic_index_in_dim(logits, end - 1, axis=1, keepdims=False), (seen, mask, end)

    return init_cache, decode


def plain_init_cache(batch, length):
    """The plain model needs no more of the past than its sum and its count."""
    del length
    return jnp.zeros((batch, WIDTH)), jnp.zeros((batch,))


def plain_decode(params, tokens, positions, cache):
    total, count = cache
    real = positions >= 0
    x = params["embed"][tokens]
    total = total + jnp.sum(jnp.where(real[:, :, None], x, 0.0), axis=1)
    count = count + jnp.sum(real, axis=1, dtype=jnp.float32)
    return plain_head(params, x[:, -1], total / jnp.maximum(count, 1.0)[:, None]), (total, count)


def plain_insert(cache, rows, prefilled):
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), cache, prefilled)
