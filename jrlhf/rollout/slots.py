"""The number of answers that a device decodes at once, and the share of that work that drew tokens."""

import logging
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jrlhf.config import RolloutConfig, SamplingConfig
from jrlhf.models import int8_cache
from jrlhf.parallel.devices.peaks import known_chip
from jrlhf.parallel.platforms import platform_settings
from jrlhf.train.batches import groups_of
from jrlhf.train.performance import decoding_steps
from jrlhf.types import DecodeFns, Generation

log = logging.getLogger("jrlhf.sampling")

MAX_CACHE_FRACTION = 0.3
"""Maximum fraction of a device's memory for the KV cache, if jrlhf chooses the number of slots."""


def with_cache_of(config: SamplingConfig, decode_fns: DecodeFns) -> DecodeFns:
    """Return the decode functions with the kind of cache that a config names."""
    return int8_cache(decode_fns) if config.kv_cache == "int8" else decode_fns


def slots_of(config: SamplingConfig, decode_fns: DecodeFns, mesh: Mesh, *, rows: int, prompt: int) -> int:
    """Return how many of a device's ``rows`` answers to prompts of ``prompt`` tokens it decodes at once.

    It is ``config.slots``. 0 stands for as many as keep the platform busy (``PlatformSettings.slots``), or fewer if the
    KV cache would take more than 30 % of the memory of a device whose data sheet is known.
    """
    if config.slots:
        return min(rows, config.slots)
    slots = min(rows, platform_settings(mesh).slots)
    chip = known_chip(mesh.devices.flat[0].device_kind)
    if chip is not None:
        fns = with_cache_of(config, decode_fns)
        cache = jax.eval_shape(lambda: fns.init_cache(1, prompt + config.max_new_tokens))
        row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / mesh.shape["tensor"]
        slots = max(1, min(slots, int(MAX_CACHE_FRACTION * chip.memory * 1e9 / row)))
    return slots


def log_slots(section: RolloutConfig, decode_fns: DecodeFns, mesh: Mesh, *, stage: str, prompt: int) -> None:
    """Say in the log how many answers to prompts of ``prompt`` tokens a device decodes at once."""
    rows = section.episodes // section.rollout_parts // groups_of(mesh)
    slots = slots_of(section.sampling, decode_fns, mesh, rows=rows, prompt=prompt)
    log.info("%s.sampling.slots: a device decodes %d of its %d answers at once", stage, slots, rows)


def rollout_occupancy(
    section: RolloutConfig, decode_fns: DecodeFns, mesh: Mesh
) -> Callable[[Generation], Float[Array, ""]]:
    """Return a function that gives the ``occupancy`` of a rollout."""
    parts, config = section.rollout_parts, section.sampling
    jitted = jax.jit(partial(occupancy, parts=parts), static_argnames="slots")

    def of_rollout(generation: Generation) -> Float[Array, ""]:
        rows, length = generation.tokens.shape
        rows, prompt = rows // parts // groups_of(mesh), length - config.max_new_tokens
        slots = slots_of(config, decode_fns, mesh, rows=rows, prompt=prompt)
        return jitted(generation, slots=slots * groups_of(mesh))

    return of_rollout


def occupancy(generation: Generation, *, parts: int, slots: int) -> Float[Array, ""]:
    """Return the share of decoding steps times ``slots``, those of all devices, that drew a token of an answer.

    The first token of an answer is not counted, since reading the prompt draws it. What it lacks to 1 is mostly the end
    of each part: no prompt waits any more, and the longest answers go on alone.
    """
    drawn = jnp.sum(generation.response_mask, dtype=jnp.float32) - generation.tokens.shape[0]
    return drawn / jnp.maximum(1.0, slots * jnp.sum(decoding_steps(generation, parts)))
