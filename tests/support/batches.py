"""Small batches of uneven rows, and comparisons of trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.steps import PPOSettings
from jrlhf.types import PackedRankingBatch, RankingBatch, Rollout, SFTBatch, TrainState
from tests.support.tiny_models import VOCABULARY

KEY = jax.random.key(0)

# Compiling is most of what these tests do: nothing here runs long enough to be worth optimising.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def new_state(params, tx, ema=None):
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), ema)


def sft_batch(lengths=(2, 9, 3, 5), prompt=1, width=10, seed=0):
    """Right-padded rows of the given lengths; the first ``prompt`` tokens of each are not trained on."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (len(lengths), width)).astype(np.int32)
    at = np.arange(width)[None]
    mask = at < np.array(lengths)[:, None]
    return SFTBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(mask & (at >= prompt)))


def ranking_batch(rows=4, seed=0, width=6):
    """Four completions a prompt, of different lengths (some fill the width), with ties, gaps and margins."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, (rows, 4))
    lengths[0, 0] = width
    valid = np.ones((rows, 4), bool)
    valid[1, 3] = valid[-1, 2] = False
    return RankingBatch(
        tokens=jnp.asarray(rng.integers(0, VOCABULARY, (rows, 4, width)), jnp.int32),
        mask=jnp.asarray((np.arange(width) < lengths[:, :, None]) & valid[:, :, None]),
        ranks=jnp.asarray(rng.integers(0, 3, (rows, 4)), jnp.int32),
        valid=jnp.asarray(valid),
        margin=jnp.asarray(rng.random(rows), jnp.float32),
    )


def preference_batch(rows=4, seed=0, width=6):
    """``ranking_batch`` whose first token is a prompt, with a reference for each completion."""
    batch = ranking_batch(rows, seed, width)
    reference = np.random.default_rng(seed + 100).normal(size=batch.ranks.shape) - 5.0
    return batch._replace(
        loss_mask=batch.mask & (jnp.arange(width) >= 1)[None, None, :],
        ref_logprobs=jnp.asarray(reference, jnp.float32),
    )


def bigram(params, tokens, mask):
    """A model that looks at one token alone, so that rows may be packed as they like."""
    del mask
    return params["embedding"][tokens] @ params["head"]


def bigram_params():
    rng = np.random.default_rng(5)
    shapes = {"embedding": (VOCABULARY, 4), "head": (4, VOCABULARY)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def packed_batch(batch, layout, width):
    """The rankings of a batch in rows of ``width``: row r holds the rankings ``layout[r]``."""
    most, completions = max(map(len, layout)), batch.ranks.shape[1]
    shape = len(layout), most, completions
    found = PackedRankingBatch(
        np.zeros((len(layout), width), np.int32), np.zeros((len(layout), width), np.int32), np.zeros(shape, np.int32),
        np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[:2], np.float32),
        np.zeros((len(layout), width), bool), np.full(shape, np.nan, np.float32),
    )  # fmt: skip
    for row, members in enumerate(layout):
        start, number = 0, 1
        for place, b in enumerate(members):
            found.margin[row, place] = batch.margin[b]
            for place_of_answer, k in enumerate(np.flatnonzero(np.asarray(batch.valid[b]))):
                real = np.asarray(batch.mask[b, k])
                here, answer = slice(start, start + real.sum()), (row, place, place_of_answer)
                found.tokens[row, here], found.segments[row, here] = np.asarray(batch.tokens[b, k])[real], number
                found.loss_mask[row, here] = np.asarray(batch.loss_mask[b, k])[real]
                found.ends[answer], found.ranks[answer], found.valid[answer] = here.stop - 1, batch.ranks[b, k], True
                if batch.ref_logprobs is not None:
                    found.ref_logprobs[answer] = batch.ref_logprobs[b, k]
                start, number = here.stop, number + 1
    found = found._replace(ref_logprobs=None) if batch.ref_logprobs is None else found
    return jax.tree.map(jnp.asarray, found)


def rollout_batch(apply_fn, params, *, rows=4, prompt=3, response=6, temperature=0.7, seed=0, noise=0.5):
    """A rollout with responses of very different lengths, whose old log-probs lie ``noise`` beside the policy's."""
    rng = np.random.default_rng(seed)
    width = prompt + response
    tokens = rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    at = np.arange(width)[None]
    starts = rng.integers(0, prompt, (rows, 1))
    lengths = np.linspace(1, response, rows).astype(int)[:, None]
    mask = (at >= starts) & (at < prompt + lengths)
    real = lambda scale: (rng.normal(size=(rows, width)) * scale).astype(np.float32)  # noqa: E731
    logits = np.asarray(jit(apply_fn)(params, tokens, mask)) / temperature
    logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    logprobs = real(noise)
    logprobs[:, 1:] += np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[:, :, 0]
    values = real(0.5)
    rollout = Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=mask & (at >= prompt),
        logprobs=logprobs,
        ref_logprobs=logprobs + real(0.1),
        sampler_logprobs=logprobs,
        entropy=np.ones((rows, width), np.float32),
        values=values,
        rewards=real(1.0),
        advantages=real(1.0),
        returns=values + real(1.0),
        scores=rng.normal(size=rows).astype(np.float32),
        stopped=np.ones(rows, bool),
    )
    return jax.tree.map(jnp.asarray, rollout)


def ppo_settings(**changes):
    """One epoch, one minibatch, all that is optional off."""
    return PPOSettings(epochs=1, minibatches=1, temperature=0.7, clip=0.2, value_clip=0.2, value_coef=0.1)._replace(
        **changes
    )


def descend(params, gradient, lr=1.0):
    """One step of gradient descent, in NumPy."""
    return jax.tree.map(lambda p, g: np.asarray(p) - lr * np.asarray(g), params, gradient)


def assert_close(a, b, atol=1e-6, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


def assert_same(a, b):
    """Bitwise."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def moved(a, b):
    """Does any leaf differ?"""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)


def take(batch, index):
    """``x[index]`` of every leaf."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), batch)


def pad_columns(batch, left, right, fill=0):
    """More padding on either side of every array that has a time axis (the last one, as wide as the mask)."""
    width = batch.mask.shape[-1]

    def pad(x):
        if x.ndim < 2 or x.shape[-1] != width:
            return x
        value = fill if x.dtype == jnp.int32 else 0
        return jnp.asarray(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], constant_values=value))

    return jax.tree.map(pad, batch)


def token_batch(rows=3, length=10):
    """Tokens of a small vocabulary, with a mask that is padded on the right and one that is padded on the left."""
    tokens = jax.random.randint(jax.random.key(7), (rows, length), 1, 61, jnp.int32)
    lengths = jnp.array([length, 4, 7][:rows])[:, None]
    columns = jnp.arange(length)[None, :]
    return tokens, columns < lengths, columns >= length - lengths
