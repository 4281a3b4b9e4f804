"""Refilling the slots of a sampler: where an answer has ended, the next prompt of its shard begins."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.steps.decoding import Sampler, SamplerState, begin, decode_while, live, read_prompts
from jrlhf.steps.slots import Slots, by_shard, collect, flat, live_first, new_slots, no_answers, put, take


def refill_size(slots: int) -> int:
    """The slots of a shard that one refill fills at most; it waits until half as many are free."""
    return max(1, slots // 8)


class Waiting(NamedTuple):
    """Prompts of each shard that are read already, from its prompt ``first`` on, and wait for free slots."""

    first: Int[Array, "D"]
    logits: Float[Array, "D M V"]
    cache: Any
    """Its rows are flat."""


class Refill(NamedTuple):
    """The carry of the loop over refills."""

    state: SamplerState
    waiting: Waiting
    next: Int[Array, "D"]
    """The next answer of each shard that has no slot yet."""


def decode_refilling(sampler: Sampler, slots: int, *, left: int) -> SamplerState:
    """Answer the whole queue in ``slots`` slots a shard, until ``left`` of them at most have not ended."""
    _, count = sampler.queue.keys.shape
    most = refill_size(slots)

    def go_on(slots: Slots, following: Int[Array, "D"]) -> Bool[Array, ""]:
        """Whether to decode before the next refill, or before the end."""
        wanted = jnp.minimum(most, count - following)
        fillable = jnp.sum(jnp.minimum(jnp.sum(slots.ended, axis=-1, dtype=jnp.int32), wanted), dtype=jnp.int32)
        enough = fillable >= jnp.maximum(1, jnp.sum(wanted, dtype=jnp.int32) // 2)
        waits = jnp.any(wanted > 0)
        return jnp.where(waits, ~enough, jnp.max(live(slots)) > left)

    def fill_and_decode(refill: Refill) -> Refill:
        refill = fill(sampler, refill, most)
        state = decode_while(sampler, lambda slots: go_on(slots, refill.next), refill.state, name="decode")
        return refill._replace(state=state)

    with jax.named_scope("refill"):
        whole = lax.while_loop(lambda r: jnp.any(r.next < count), fill_and_decode, nothing_begun(sampler, slots, most))
    return whole.state


def nothing_begun(sampler: Sampler, slots: int, most: int) -> Refill:
    """Free slots, an empty cache, and no prompt read."""
    shards, count = sampler.queue.keys.shape
    fns, queue = sampler.decode_fns, sampler.queue
    none = jnp.full((shards, slots), count, jnp.int32)
    free = new_slots(none, queue.keys[:, :slots], jnp.zeros_like(none), jnp.int32(0), limit=sampler.limit)
    cache = fns.init_cache(shards * slots, sampler.cache_length)
    answers = no_answers(shards, count, limit=sampler.limit)
    state = SamplerState(free._replace(ended=jnp.ones_like(free.ended)), cache, jnp.int32(0), answers)
    prompts = prompts_read(sampler, most)
    shapes = jax.eval_shape(lambda: read_waiting(sampler, jnp.zeros((shards,), jnp.int32), prompts))
    waiting = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    first, following = jnp.full((shards,), -prompts, jnp.int32), jnp.zeros((shards,), jnp.int32)
    return Refill(state, waiting._replace(first=first), following)


def prompts_read(sampler: Sampler, most: int) -> int:
    """Prompts of a shard that are read at once: enough for ``most`` answers."""
    return min(-(-most // sampler.queue.samples), sampler.queue.prompts.shape[1])


def read_waiting(sampler: Sampler, first: Int[Array, "D"], prompts: int) -> Waiting:
    """Read that many prompts of each shard."""
    queue = sampler.queue
    rows = jnp.minimum(first[:, None] + jnp.arange(prompts, dtype=jnp.int32)[None], queue.prompts.shape[1] - 1)
    tokens, mask = take((queue.prompts, queue.mask), rows)
    logits, cache = read_prompts(sampler, tokens, mask, length=tokens.shape[-1])
    return Waiting(first, by_shard(logits, len(first)), cache)


def fill(sampler: Sampler, refill: Refill, most: int) -> Refill:
    """Begin up to ``most`` answers of each shard in its free slots, and read prompts for them where none wait."""
    state, following = refill.state, refill.next
    waiting = with_prompts(sampler, refill.waiting, following)
    slots, samples = state.slots, sampler.queue.samples
    _, count = sampler.queue.keys.shape
    end = jnp.minimum((waiting.first + waiting.logits.shape[1]) * samples, count)
    free = jnp.sum(slots.ended, axis=-1, dtype=jnp.int32)
    filled = jnp.minimum(jnp.minimum(free, most), end - following)
    places = jnp.arange(most, dtype=jnp.int32)[None]
    rows = live_first(~slots.ended)[:, :most]
    number = jnp.minimum(following[:, None] + places, count - 1)
    source = jnp.clip(number // samples - waiting.first[:, None], 0, waiting.logits.shape[1] - 1)
    new = begin(sampler, number, flat(take(waiting.logits, source)), state.step)
    answers = collect(state.answers, take(slots, rows))
    # Past the last slot: left out.
    rows = jnp.where(places < filled[:, None], rows, slots.ended.shape[1])
    cache = insert(sampler, state.cache, rows, waiting.cache, source)
    state = state._replace(slots=put(slots, rows, new), cache=cache, answers=answers)
    return Refill(state, waiting, following + filled)


def with_prompts(sampler: Sampler, waiting: Waiting, following: Int[Array, "D"]) -> Waiting:
    """Read the next prompts of the shards of which none waits any more."""
    samples, (_, count) = sampler.queue.samples, sampler.queue.keys.shape
    used_up = (following >= (waiting.first + waiting.logits.shape[1]) * samples) & (following < count)

    def read() -> Waiting:
        found = read_waiting(sampler, jnp.where(used_up, following // samples, waiting.first), waiting.logits.shape[1])

        def choose(new: Array, old: Array) -> Array:
            rows = jnp.repeat(used_up, len(new) // len(used_up)) if new.ndim else jnp.any(used_up)
            return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)) if new.ndim else rows, new, old)

        return jax.tree.map(choose, found, waiting)

    return lax.cond(jnp.any(used_up), read, lambda: waiting)


def insert(sampler: Sampler, cache: Any, rows: Int[Array, "D R"], waiting: Any, source: Int[Array, "D R"]) -> Any:
    """Put the caches of waiting prompts into rows of each shard."""
    shards = len(rows)
    # Scalars of a cache are those of all rows.
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, cache)
    prefilled = jax.tree.map(lambda x: take(x, source) if x.ndim else x, by_shard(waiting, shards))
    of_shard: Any = sampler.decode_fns.insert
    into = jax.vmap(of_shard, in_axes=(axes, 0, axes), out_axes=axes)
    return flat(into(by_shard(cache, shards), rows, prefilled))
