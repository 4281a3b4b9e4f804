"""One token from logits, and its log-prob under the very distribution it was drawn from."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from jaxtyping import Key as Keys

from jrlhf.types import Key


def truncate_logits(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside the ``top_k`` likeliest tokens, then outside the smallest set whose mass reaches ``top_p``.

    ``top_k=0`` and ``top_p=1.0`` are off. The mass is that of the distribution renormalised after top-k; ties go to the
    lower token id, so exactly k tokens stay. Probabilities ``[.5, .3, .2]`` with ``top_p=0.6`` keep the first two.
    """
    if top_k <= 0 and top_p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        ranked = jnp.where(jnp.arange(vocabulary)[None] < top_k, ranked, -jnp.inf)
    if top_p < 1.0:
        probs = jax.nn.softmax(ranked, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        # The likeliest token stays whatever p is: rounding must not leave an empty set.
        keep = (mass_before < top_p).at[:, 0].set(True)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(
    logits: Float[Array, "B V"], key: Key, *, temperature: float, top_k: int, top_p: float
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw a token a row from softmax(logits / temperature), truncated and renormalised; return it with its log-prob.

    ``temperature=0`` is greedy: the likeliest token, with log-prob 0 as the distribution is a point mass.
    top-p: Holtzman et al. 2020, section 3.1.
    """
    draws = jax.random.uniform(key, (2, len(logits)), jnp.float32)
    return sample_at(logits, draws, temperature=temperature, top_k=top_k, top_p=top_p)


def answer_keys(key: Key, prompts: Int[Array, "B"], *, samples: int) -> Keys[Array, "B K"]:
    """A key for each of ``samples`` answers to each prompt: key → prompt's number → number of the answer.

    ``prompts`` are numbers of your own choice, one a prompt. A prompt that keeps its number keeps its answers, whatever
    stands beside it; two prompts with one number would share their random draws.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)

    def of_prompt(prompt: Int[Array, ""]) -> Keys[Array, "K"]:
        own = jax.random.fold_in(key, prompt)
        return jax.vmap(lambda sample: jax.random.fold_in(own, sample))(jnp.arange(samples, dtype=jnp.int32))

    return jax.vmap(of_prompt)(prompts)


def uniforms(keys: Keys[Array, "B"], tokens: Int[Array, "B"]) -> Float[Array, "2 B"]:
    """The random numbers of a token a row, uniform on [0, 1): those of an answer's key and the token's index in it."""

    def of_token(key: Keys[Array, ""], token: Int[Array, ""]) -> Float[Array, "2"]:
        # Two numbers a row in place of one a logit, and two so that even a token of little mass is hit in proportion.
        return jax.random.uniform(jax.random.fold_in(key, token), (2,), jnp.float32)

    return jax.vmap(of_token)(keys, tokens).T


def sample_at(
    logits: Float[Array, "B V"], draws: Float[Array, "2 B"], *, temperature: float, top_k: int, top_p: float
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """``sample`` with given random numbers, such as ``uniforms``.

    By inversion of the cumulative mass: the first number chooses a group of tokens, the second a token within it.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)
    truncated = truncate_logits(logits / temperature, top_k=top_k, top_p=top_p)
    highest = jnp.max(truncated, axis=-1, keepdims=True)
    mass = _in_groups(jnp.exp(truncated - highest))
    group_mass = jnp.sum(mass, axis=-1)
    group = _invert(group_mass, draws[0])
    place = _invert(jnp.take_along_axis(mass, group[:, None, None], axis=1)[:, 0], draws[1])
    tokens = group * jnp.int32(mass.shape[-1]) + place
    token_logits = jnp.take_along_axis(truncated - highest, tokens[:, None], axis=-1)[:, 0]
    return tokens, token_logits - jnp.log(jnp.sum(group_mass, axis=-1))


def _in_groups(mass: Float[Array, "B V"]) -> Float[Array, "B groups size"]:
    """The vocabulary padded with zeros and split into groups, about as many as each has tokens."""
    vocabulary = mass.shape[-1]
    size = 1 << max(0, math.ceil(math.log2(vocabulary) / 2))
    return jnp.pad(mass, ((0, 0), (0, -vocabulary % size))).reshape(mass.shape[0], -1, size)


def _invert(mass: Float[Array, "B N"], draws: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index up to which more than the fraction ``draws`` (in [0, 1)) of the row's mass lies.

    Masses ``[1, 0, 3]`` at 0.25 give 2. An index without mass is never it, however sums are rounded.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    positive = mass > 0.0
    beyond = positive & (cumulative > draws[:, None] * cumulative[:, -1:])
    return jnp.argmax(positive.astype(jnp.int32) + beyond.astype(jnp.int32), axis=-1).astype(jnp.int32)
