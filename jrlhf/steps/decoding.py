"""The loop of decoding steps over the slots of a sampler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import Key as Keys

from jrlhf.core import positions_from_mask
from jrlhf.steps.slots import Answers, Draw, Slots, by_shard, extend, flat, live_first, new_slots, no_answers, take
from jrlhf.types import DecodeFns, Params


def steps_between(shards: int) -> int:
    """Decoding steps between two looks at what has ended.

    Several devices must tell each other, which on a TPU slice of 64 chips takes a twentieth of a step.
    """
    return 4 if shards > 1 else 1


class Queue(NamedTuple):
    """The prompts of each shard and the keys of their ``A`` = ``E`` · ``K`` answers, in the order of the prompts."""

    prompts: Int[Array, "D E P"]
    mask: Bool[Array, "D E P"]
    keys: Keys[Array, "D A"]

    @property
    def samples(self) -> int:
        """Number of answers to a prompt."""
        return self.keys.shape[1] // self.prompts.shape[1]


class Sampler(NamedTuple):
    """All that a loop of a sampler reads, and its limit of tokens an answer."""

    decode_fns: DecodeFns
    params: Params
    queue: Queue
    draw: Draw
    limit: int

    @property
    def cache_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.queue.prompts.shape[-1] + self.limit


class SamplerState(NamedTuple):
    """The carry of a loop. Rows of the cache are flat: those of the first shard, then those of the next."""

    slots: Slots
    cache: Any
    step: Int[Array, ""]
    """Decoding steps made."""
    answers: Answers


def read_prompts(
    sampler: Sampler, prompts: Int[Array, "D M P"], mask: Bool[Array, "D M P"], *, length: int
) -> tuple[Float[Array, "B V"], Any]:
    """The logits after each prompt, and a cache of ``length`` tokens that holds the prompts; its rows are flat."""
    tokens, mask = flat((prompts, mask))
    cache = sampler.decode_fns.init_cache(len(tokens), length)
    return sampler.decode_fns.decode(sampler.params, tokens, positions_from_mask(mask), cache)


def begin(sampler: Sampler, number: Int[Array, "D R"], logits: Float[Array, "B V"], step: Any) -> Slots:
    """Slots for the answers of these numbers, each with its first token, drawn between two decoding steps."""
    queue = sampler.queue
    prompt_tokens = take(jnp.sum(queue.mask, axis=-1, dtype=jnp.int32), number // queue.samples)
    slots = new_slots(number, take(queue.keys, number), prompt_tokens, step, limit=sampler.limit)
    return extend(slots, logits, step - 1, sampler.draw)


def begin_together(sampler: Sampler) -> SamplerState:
    """All answers at their first token, each in a slot of its own."""
    queue, samples = sampler.queue, sampler.queue.samples
    shards, count = queue.keys.shape
    logits, cache = read_prompts(sampler, queue.prompts, queue.mask, length=sampler.cache_length)
    if samples > 1:
        logits, cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x, (logits, cache))
    number = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (shards, count))
    slots = begin(sampler, number, logits, jnp.int32(0))
    return SamplerState(slots, cache, jnp.int32(0), no_answers(shards, count, limit=sampler.limit))


def decode_step(sampler: Sampler, state: SamplerState) -> SamplerState:
    """Decode the last token of each answer that has not ended, and draw the next one."""
    slots = state.slots
    position = jnp.where(slots.ended, -1, slots.prompt_tokens + slots.length - 1)
    last, position = (x.reshape(-1, 1) for x in (slots.last, position))
    logits, cache = sampler.decode_fns.decode(sampler.params, last, position, state.cache)
    slots = extend(slots, logits, state.step, sampler.draw)
    return state._replace(slots=slots, cache=cache, step=state.step + 1)


def decode_while(
    sampler: Sampler, go_on: Callable[[Slots], Bool[Array, ""]], state: SamplerState, *, name: str
) -> SamplerState:
    """Decode while the slots say so; see ``steps_between``.

    ``name`` is that of the loop in the compiled program. Where all have ended, a step does nothing.
    """
    steps = steps_between(len(sampler.queue.keys))

    def some(state: SamplerState) -> SamplerState:
        if steps == 1:
            return decode_step(sampler, state)
        return lax.fori_loop(0, steps, lambda _, s: decode_step(sampler, s), state)

    with jax.named_scope(name):
        return lax.while_loop(lambda s: go_on(s.slots), some, state)


def live(slots: Slots) -> Int[Array, "D"]:
    """The number of answers of each shard that have not ended."""
    return jnp.sum(~slots.ended, axis=-1, dtype=jnp.int32)


def decode_until(sampler: Sampler, state: SamplerState, left: int, *, name: str) -> SamplerState:
    """Decode while a shard has more than ``left`` answers that have not ended."""
    return decode_while(sampler, lambda slots: jnp.max(live(slots)) > left, state, name=name)


def without_ended(state: SamplerState, left: int) -> SamplerState:
    """Keep ``left`` slots of each shard, those with live answers first."""
    rows, shards = live_first(state.slots.ended)[:, :left], len(state.slots.ended)
    cache = jax.tree.map(lambda x: take(x, rows) if x.ndim else x, by_shard(state.cache, shards))
    return state._replace(slots=take(state.slots, rows), cache=flat(cache))
