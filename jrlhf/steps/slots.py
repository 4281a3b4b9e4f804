"""The slots of a sampler: the answers that its rows are busy with, and where those go that have ended.

Shape suffixes: D shards of the rows, S slots of a shard, A answers of a shard, N tokens of an answer at most.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import Key as Keys

from jrlhf.core import sample_at, uniforms


class Slots(NamedTuple):
    """The state of each slot of each shard: its answer, and the tokens drawn so far.

    All slots write their tokens to the same column of a ring, whatever they are busy with. An answer begins at a column
    of its own, and N columns are enough for it.
    """

    answer: Int[Array, "D S"]
    """Number of the answer in its shard; A in a slot that has none yet."""
    keys: Keys[Array, "D S"]
    prompt_tokens: Int[Array, "D S"]
    steps_before: Int[Array, "D S"]
    """Decoding steps made before the answer's first token was drawn."""
    length: Int[Array, "D S"]
    """Tokens drawn so far."""
    last: Int[Array, "D S"]
    """The last of them."""
    ended: Bool[Array, "D S"]
    stopped: Bool[Array, "D S"]
    """Whether a stop token ended it."""
    tokens: Int[Array, "D S N"]
    logprobs: Float[Array, "D S N"]


class Answers(NamedTuple):
    """The answers of each shard, in the order of their numbers. Past an answer's length its tokens mean nothing."""

    steps_before: Int[Array, "D A"]
    length: Int[Array, "D A"]
    stopped: Bool[Array, "D A"]
    tokens: Int[Array, "D A N"]
    logprobs: Float[Array, "D A N"]


Draw = Callable[[Float[Array, "B V"], Keys[Array, "B"], Int[Array, "B"]], tuple[Array, Array, Array]]
"""``(logits, keys, index of each token in its answer) -> tokens, log-probs, and whether they are stop tokens``."""


def make_draw(*, temperature: float, top_k: int, top_p: float, stop_tokens: tuple[int, ...]) -> Draw:
    """Return the function that draws a token a row."""

    def draw(logits: Float[Array, "B V"], keys: Keys[Array, "B"], index: Int[Array, "B"]) -> tuple[Array, Array, Array]:
        tokens, logprobs = sample_at(logits, uniforms(keys, index), temperature=temperature, top_k=top_k, top_p=top_p)
        stops = jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros_like(tokens, bool)
        return tokens, logprobs, stops

    return draw


def new_slots(
    answer: Int[Array, "D S"], keys: Keys[Array, "D S"], prompt_tokens: Int[Array, "D S"], step: Any, *, limit: int
) -> Slots:
    """Slots whose answers of at most ``limit`` tokens have none yet, before decoding step ``step``."""
    none, never = jnp.zeros_like(answer), jnp.zeros(answer.shape, jnp.bool_)
    ring = (*answer.shape, limit)
    return Slots(
        answer, keys, prompt_tokens, none + step, none, none, never, never,
        jnp.zeros(ring, jnp.int32), jnp.zeros(ring, jnp.float32),
    )  # fmt: skip


def no_answers(shards: int, count: int, *, limit: int) -> Answers:
    """Room for ``count`` answers of each shard."""
    shape = shards, count
    none, ring = jnp.zeros(shape, jnp.int32), (*shape, limit)
    return Answers(none, none, jnp.zeros(shape, jnp.bool_), jnp.zeros(ring, jnp.int32), jnp.zeros(ring, jnp.float32))


def extend(slots: Slots, logits: Float[Array, "B V"], column: Any, draw: Draw) -> Slots:
    """Draw the next token of every answer that has not ended, and write it to ``column`` of the ring, modulo N."""
    shape, limit = slots.length.shape, slots.tokens.shape[-1]
    column, live = column % limit, ~slots.ended
    drawn = draw(logits, slots.keys.reshape(-1), slots.length.reshape(-1))
    token, logprob, stops = (x.reshape(shape) for x in drawn)

    def write(ring: Array, new: Array) -> Array:
        # An answer that has ended keeps what it has: the ring comes round to its columns again.
        old = lax.dynamic_slice_in_dim(ring, column, 1, axis=-1)
        return lax.dynamic_update_slice_in_dim(ring, jnp.where(live[..., None], new[..., None], old), column, axis=-1)

    length = slots.length + live.astype(jnp.int32)
    stopped = live & stops
    return slots._replace(
        length=length,
        last=jnp.where(live, token, slots.last),
        ended=~live | stopped | (length == limit),
        stopped=slots.stopped | stopped,
        tokens=write(slots.tokens, token),
        logprobs=write(slots.logprobs, logprob),
    )


def collect(answers: Answers, slots: Slots) -> Answers:
    """Write down the answers of all slots, as far as they go."""

    def of_shard(answers: Answers, slots: Slots) -> Answers:
        limit = slots.tokens.shape[-1]
        # The prompt's own last step drew the first token.
        columns = (slots.steps_before[:, None] - 1 + jnp.arange(limit, dtype=jnp.int32)[None]) % limit
        drawn = tuple(jnp.take_along_axis(x, columns, axis=-1) for x in (slots.tokens, slots.logprobs))
        # The compiler of TPUs breaks off where it merges this gather into the scatter.
        tokens, logprobs = lax.optimization_barrier(drawn)
        found = Answers(slots.steps_before, slots.length, slots.stopped, tokens, logprobs)
        return jax.tree.map(lambda old, new: old.at[slots.answer].set(new, mode="drop"), answers, found)

    return jax.vmap(of_shard)(answers, slots)


def take(tree: Any, rows: Int[Array, "D R"]) -> Any:
    """Rows of each shard: of leaves ``[D, S, ...]``, those at ``rows``."""
    return jax.tree.map(lambda x: jax.vmap(lambda own, at: own[at])(x, rows), tree)


def put(tree: Any, rows: Int[Array, "D R"], new: Any) -> Any:
    """Replace ``rows`` of each shard; row numbers past the last are left out."""
    return jax.tree.map(lambda x, y: jax.vmap(lambda own, at, z: own.at[at].set(z, mode="drop"))(x, rows, y), tree, new)


def by_shard(tree: Any, shards: int) -> Any:
    """Flat rows as rows of ``shards`` shards; scalars stay as they are."""
    return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]) if x.ndim else x, tree)


def flat(tree: Any) -> Any:
    """The opposite of ``by_shard``."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, tree)


def live_first(ended: Bool[Array, "D S"]) -> Int[Array, "D S"]:
    """The slots of each shard, those with a live answer first, else in order."""
    return jnp.argsort(ended, axis=-1, stable=True).astype(jnp.int32)
