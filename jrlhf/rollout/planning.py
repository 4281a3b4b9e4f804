"""The programs of a rollout as shapes for ``jrlhf plan``: the same functions as in an iteration."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import RolloutConfig, SamplingConfig
from jrlhf.models import ArchConfig, Pretrained
from jrlhf.models.flops import decode_bytes, forward_flops
from jrlhf.parallel import batch_sharding
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.reward_models import jit_score, padded_width, reward_of
from jrlhf.rollout.sampling import jit_sampler, prompt_readings
from jrlhf.rollout.slots import slots_of
from jrlhf.steps.decoding import steps_between
from jrlhf.steps.refill import refill_size
from jrlhf.train.batches import device_multiple
from jrlhf.train.performance import rollout_work
from jrlhf.train.programs import Program, Target
from jrlhf.types import Generation, Params, SFTBatch


def sampling_program(
    name: str,
    model: Pretrained,
    params: Params,
    sampling: SamplingConfig,
    *,
    rows: int,
    prompt: int,
    target: Target,
    held: Any,
    samples: int = 1,
    readings: int = 1,
) -> Program:
    """Return the sampler on prompts of the full length, ``prompt`` tokens, with the stop tokens of config.json.

    ``rows`` prompts, each of which is read ``readings`` times, get ``samples`` answers. All are as long as can be: with
    fewer slots than answers the slots are filled, and decode to the end, that many times over.
    """
    ends = model.config.get("eos_token_id") or 0
    stops = tuple(ends) if isinstance(ends, list) else (int(ends),)
    pad = int(model.config.get("pad_token_id") or 0)
    at = {"stop_tokens": stops, "pad_token": pad, "samples": samples, "readings": readings}
    sampler = jit_sampler(model.decode_fns, sampling, target.mesh, **at)
    read = rows * readings
    prompts = target.rows((read, prompt), jnp.int32), target.rows((read, prompt), jnp.bool_)
    args = (params, *prompts, target.rows((read,), jnp.int32), target.whole(lambda: jax.random.key(0)))
    cache = prompt + sampling.max_new_tokens, model.arch.head_dim
    count = rows * samples // target.groups
    slots = slots_of(sampling, model.decode_fns, target.mesh, rows=count, prompt=prompt)
    steps = max(1, sampling.max_new_tokens - 1) * -(-count // slots)
    loops = sampler_trips(count, slots, steps=steps, shards=target.groups)
    return Program(name, sampler, args, (held, args), trips=steps, loops=loops, cache=cache)


def rollout_program(
    section: RolloutConfig,
    policy: Pretrained,
    params: Params,
    *,
    episodes: int,
    target: Target,
    held: Any,
    samples: int = 1,
) -> Program:
    """Return the sampler on one part of the prompts; its trips and bytes are those of all parts.

    ``samples``: the answers to each prompt.
    """
    part = device_multiple(-(-episodes // section.rollout_parts), target.mesh)
    rows = -(-part // samples)
    readings = prompt_readings(samples, rows=rows * samples, devices=target.groups)
    prompt, at = section.prompts.max_length, {"target": target, "held": held, "samples": samples, "readings": readings}
    program = sampling_program("rollout", policy, params, section.sampling, rows=rows, prompt=prompt, **at)
    parts = section.rollout_parts
    read = parts * decode_read(section, policy.arch, part, target, steps=program.trips)
    # The outer of two nested loops.
    outer = "refill" if "refill" in program.loops else "decode"
    loops = dict(program.loops) | {outer: parts * program.loops[outer]}
    return program._replace(read=read, trips=parts * program.trips, loops=loops)


def generation_shapes(target: Target, rows: int, length: int) -> Generation:
    """Return the shapes of a rollout's answers."""
    shape = rows, length
    tokens, mask, response = (target.rows(shape, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.bool_))
    ends = target.rows((rows,), jnp.bool_), target.rows((rows,), jnp.int32)
    return Generation(tokens, mask, response, target.rows(shape, jnp.float32), *ends)


def check_planned_lengths(section: RolloutConfig, actors: Actors, *, stage: str) -> None:
    """Raise ConfigError if the longest prompt with its answer exceeds a model's positions."""
    for positions in actors.positions(section, stage):
        positions.check_length(section.prompts.max_length, key=positions.length_key)


def score_program(actors: Actors, target: Target, generation: Generation, *, slices: int, held: Any) -> Program:
    """Return the reward model on the answers; a model with its own tokenizer reads about as many tokens."""
    reward = reward_of(actors)
    if actors.reward_tokenizer is None:
        score, texts = jit_score(actors, target.mesh, slices=slices), (generation.tokens, generation.mask)
    else:
        score = jit_for(target.mesh, reward.score, out_shardings=batch_sharding(target.mesh))
        rows, length = generation.tokens.shape
        shape = rows, padded_width(length, reward.arch.max_positions)
        texts = target.rows(shape, jnp.int32), target.rows(shape, jnp.bool_)
    return Program("scores", score, (reward.params, *texts), alive=(held, generation, texts), trips=slices)


def row_work(section: RolloutConfig, actors: Actors, *, text_length: int = 0, together: int = 1) -> dict[str, float]:
    """Return model FLOPs per program of an episode of full length, with ``text_length`` tokens of text beside it.

    One reading of a prompt serves ``together`` answers.
    """
    policy = actors.policy.arch
    rewards = [model.arch for model in actors.reward_models]
    prompt, new = section.prompts.max_length, section.sampling.max_new_tokens
    real, answer = jnp.ones((1, prompt + new), jnp.bool_), jnp.arange(prompt + new)[None] >= prompt
    marks = jnp.ones((1, max(text_length, 1)), jnp.bool_)
    text = SFTBatch(marks.astype(jnp.int32), marks, marks) if text_length else None
    generation = Generation(real.astype(jnp.int32), real, answer, real.astype(jnp.float32), real[:, 0])
    # One episode is one part. ``decode_read`` counts the bytes, so they are not used here.
    at = {"reference": actors.has_reference, "together": together}
    work = rollout_work(replace(section, rollout_parts=1), policy, actors.value_arch, rewards, **at)(generation, text)
    scores = sum(float(forward_flops(reward, np.arange(prompt + new), logits=0)) for reward in rewards)
    return {
        "rollout": float(work["flops/rollout"]),
        "scores": scores,
        "readings": float(work["flops/scoring"]) - scores,
        "update": float(work["flops/update"]),
    }


def decode_read(section: RolloutConfig, arch: ArchConfig, episodes: int, target: Target, *, steps: int) -> float:
    """Return the bytes that a device reads for a rollout: its ``tensor`` share of the weights and of the rows' cache.

    A device reads the weights at each of ``steps`` decoding steps, and the caches of its own rows only.
    """
    tensor = target.mesh.shape["tensor"]
    first, fed = section.prompts.max_length, section.sampling.max_new_tokens - 1
    size = partial(
        decode_bytes, arch, itemsize=jnp.dtype(section.model.dtype).itemsize, kv_cache=section.sampling.kv_cache
    )
    weights = size(np.full(1, -1), steps=steps)
    cached = size(np.arange(first, first + fed), steps=0)
    return (float(weights) + float(cached) * episodes / target.groups) / tensor


def sampler_trips(rows: int, slots: int, *, steps: int, shards: int) -> dict[str, float]:
    """Return the trips of the sampler's loops over ``steps`` decoding steps, by name.

    Where slots are refilled, the loop over decoding steps is inside that over refills. All answers of a plan end
    together, so that nothing is left to the loop over the last of them.
    """
    looks = float(-(-steps // steps_between(shards)))
    if slots == rows:
        return {"decode": looks, "tail": 0.0}
    refills = float(-(-rows // refill_size(slots)))
    return {"refill": refills, "decode": looks / refills, "tail": 0.0}
