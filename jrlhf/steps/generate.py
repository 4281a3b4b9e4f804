"""Sampling: a loop of decoding steps over slots; where an answer has ended, the next prompt begins."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from jaxtyping import Key as Keys

from jrlhf.steps.decoding import Queue, Sampler, SamplerState, begin_together, decode_until, without_ended
from jrlhf.steps.refill import decode_refilling
from jrlhf.steps.slots import Answers, by_shard, collect, flat, make_draw
from jrlhf.types import DecodeFns, Generation, Params

MIN_SLOTS = 4
"""Slots of a shard below which leaving out those that have ended saves nothing."""


def make_generate(
    decode_fns: DecodeFns,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    slots: int = 0,
    shards: int = 1,
    drop_ended: bool = False,
) -> Callable[[Params, Int[Array, "B P"], Bool[Array, "B P"], Keys[Array, "B K"]], Generation]:
    """A pure sampler of ``max_new_tokens`` at most; an answer ends with the first of ``stop_tokens``, which it keeps.

    It returns ``(params, prompts, mask, keys) -> Generation``. Prompts are left-padded; how wide the padding is does
    not change what is drawn. Each key draws one answer, so that each prompt gets ``K``, from one reading of it; they
    are neighbours in the result. A token depends on the prompt, its answer's key and its index in the answer alone;
    ``jrlhf.core.answer_keys`` makes such keys. Past its end an answer holds ``pad_token``, masked: by position, so
    ``pad_token`` may be a stop token itself.

    ``slots``: number of answers that a shard decodes at once; the next prompt begins where an answer has ended, and the
    cache has that many rows. It needs ``decode_fns.insert``. 0: all answers at once. ``shards``: number of devices that
    the rows are spread over; each has a queue of its own, so that no row moves between devices. ``drop_ended``: once no
    prompt waits, and half of the slots have ended, and again at three quarters, only the others are decoded further.
    None of these changes what is drawn. With any of them, or ``K > 1``, every leaf of the cache but scalars must have
    the rows on axis 0.
    """
    if slots and decode_fns.insert is None:
        raise ValueError("slots: these decode functions have no insert, so they decode all answers at once: slots=0")
    draw = make_draw(temperature=temperature, top_k=top_k, top_p=top_p, stop_tokens=stop_tokens)

    def generate(
        params: Params, prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], keys: Keys[Array, "B K"]
    ) -> Generation:
        if len(prompts) % shards:
            raise ValueError(f"shards: {len(prompts)} prompts do not divide over {shards}")
        queue = Queue(by_shard(prompts, shards), by_shard(mask, shards), keys.reshape(shards, -1))
        sampler = Sampler(decode_fns, decode_fns.prepare(params), queue, draw, max_new_tokens)
        state = decode_queue(sampler, slots, drop_ended=drop_ended)
        return as_generation(queue, collect(state.answers, state.slots), pad_token)

    return generate


def decode_queue(sampler: Sampler, slots: int, *, drop_ended: bool) -> SamplerState:
    """Answer all prompts, in ``slots`` slots a shard or, with 0 or if they are as many as the answers, all at once."""
    count = sampler.queue.keys.shape[1]
    refills = 0 < slots < count
    rows = slots if refills else count
    halves = [left for left in (rows // 2, rows // 4) if drop_ended and left >= MIN_SLOTS]
    first, *following = [*halves, 0]
    if refills:
        state = decode_refilling(sampler, slots, left=first)
    else:
        state = decode_until(sampler, begin_together(sampler), first, name="decode")
    for left, until in zip(halves, following, strict=True):
        answers = collect(state.answers, state.slots)
        state = decode_until(sampler, without_ended(state._replace(answers=answers), left), until, name="tail")
    return state


def as_generation(queue: Queue, answers: Answers, pad_token: int) -> Generation:
    """The answers behind their prompts, all shards in one."""
    prompts, mask = (jnp.repeat(flat(x), queue.samples, axis=0) for x in (queue.prompts, queue.mask))
    answers = flat(answers)
    real = jnp.arange(answers.tokens.shape[-1], dtype=jnp.int32)[None] < answers.length[:, None]
    before = jnp.zeros(prompts.shape, jnp.bool_)
    return Generation(
        tokens=jnp.concatenate([prompts, jnp.where(real, answers.tokens, jnp.int32(pad_token))], axis=-1),
        mask=jnp.concatenate([mask, real], axis=-1),
        response_mask=jnp.concatenate([before, real], axis=-1),
        logprobs=jnp.concatenate([before.astype(jnp.float32), jnp.where(real, answers.logprobs, 0.0)], axis=-1),
        stopped=answers.stopped,
        steps_before=answers.steps_before,
    )
