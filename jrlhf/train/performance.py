"""Performance metrics of a stage: FLOP/s, bandwidth, tokens per second and time per phase."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jrlhf.config import RolloutConfig
from jrlhf.core import positions_from_mask
from jrlhf.models import ArchConfig
from jrlhf.models.flops import decode_bytes, forward_flops
from jrlhf.parallel.devices.peaks import Peaks
from jrlhf.steps import trained_tokens
from jrlhf.train.window import Rate
from jrlhf.types import Generation, SFTBatch

AnyMask = Bool[Array, "*rows T"] | Int[Array, "*rows T"]
"""A ``TokenMask``; that of a batch of rankings has one more axis."""
PHASES = ("rollout", "scoring", "update")


def training_flops(arch: ArchConfig, *, frozen: bool) -> Callable[[AnyMask, Any], jax.Array]:
    """Return a function ``(mask, number of tokens with logits) -> model FLOPs`` of a training step.

    ``frozen`` says that only adapters are trained.
    """

    def flops(mask: AnyMask, logits: Float[Array, ""]) -> Float[Array, ""]:
        return training_passes(frozen) * _forward(arch, mask, logits)

    return jax.jit(flops)


def training_passes(frozen: bool) -> float:
    """Return the cost of a training step in forward passes; frozen weights need no gradients."""
    return 2.0 if frozen else 3.0


def _forward(arch: ArchConfig, mask: AnyMask, logits: Float[Array, ""]) -> Float[Array, ""]:
    return forward_flops(arch, positions_from_mask(mask.reshape(-1, mask.shape[-1])), logits=logits)


def rollout_work(
    section: RolloutConfig,
    policy: ArchConfig,
    value: ArchConfig | None,
    rewards: Sequence[ArchConfig],
    *,
    reference: bool = True,
    together: int = 1,
) -> Callable[[Generation, SFTBatch | None], dict[str, jax.Array]]:
    """Return a function that counts model FLOPs and tokens of each phase of an iteration, and bytes of decoding.

    It counts logits only at response tokens, or at the trained tokens of text, and takes the tokens of reward models to
    be the policy's. ``value`` is None without a value network, or if it is a head on the policy. One reading of a
    prompt serves ``together`` answers.
    """
    # The reference reads the answers, and so does the policy unless the sampler's log-probs serve.
    readings = float(section.old_logprobs == "policy") + float(reference)
    updates = section.epochs * training_passes(section.lora.rank > 0)
    cached = {"itemsize": jnp.dtype(section.model.dtype).itemsize, "kv_cache": section.sampling.kv_cache}

    def work(generation: Generation, text: SFTBatch | None) -> dict[str, jax.Array]:
        positions, response = positions_from_mask(generation.mask), generation.response_mask
        answers = jnp.sum(response, dtype=jnp.float32)
        of_policy = forward_flops(policy, positions, logits=answers)
        of_prompts = forward_flops(policy, jnp.where(response, -1, positions), logits=0) if together > 1 else 0.0
        of_value = jnp.float32(0.0) if value is None else forward_flops(value, positions, logits=0)
        of_rewards = sum((forward_flops(reward, positions, logits=0) for reward in rewards), jnp.float32(0.0))
        of_text = jnp.float32(0.0)
        if text is not None:
            of_text = _forward(policy, text.mask, jnp.sum(trained_tokens(text), dtype=jnp.float32))
        # The prompt yields the first answer token; each later one needs a decoding step on the token before it.
        fed = jnp.where(response & jnp.roll(response, -1, axis=1), positions, -1)
        steps = jnp.sum(decoding_steps(generation, section.rollout_parts))
        return {
            "flops/rollout": of_policy - (1.0 - 1.0 / together) * of_prompts,
            "flops/scoring": readings * of_policy + of_value + of_rewards,
            "flops/update": updates * (of_policy + of_value + of_text),
            "bytes/rollout": decode_bytes(policy, fed, steps=steps, **cached),
            "tokens/rollout": answers,
            "tokens/scoring": jnp.sum(generation.mask, dtype=jnp.float32),
        }

    return jax.jit(work)


def decoding_steps(generation: Generation, parts: int) -> Float[Array, "parts"]:
    """Return the number of decoding steps of each part of a rollout, without those at which all answers had ended."""
    lengths = jnp.sum(generation.response_mask, axis=-1, dtype=jnp.int32)
    before = jnp.zeros_like(lengths) if generation.steps_before is None else generation.steps_before
    return (jnp.max((before + lengths).reshape(parts, -1), axis=-1) - 1).astype(jnp.float32)


def rates(peaks: Peaks | None) -> tuple[Rate, ...]:
    """Return the rates of every stage: FLOP/s and, if the peak is known, their share of it."""
    achieved = Rate("flops", "perf/model_flops_per_second")
    return (achieved,) if peaks is None else (achieved, Rate("flops", "perf/mfu", unit=peaks.flops))


def phase_rates(peaks: Peaks | None) -> tuple[Rate, ...]:
    """Return the rates of PPO's phases: tokens per second and, if the peaks are known, the shares of them."""

    def of(name: str, count: str, shown: str, unit: float = 1.0) -> Rate:
        return Rate(f"{count}/{name}", f"perf/{name}_{shown}", unit=unit, during=f"seconds/{name}")

    phases = [of(name, "tokens", "tokens_per_second") for name in PHASES]
    if peaks is not None:
        phases += [of(name, "flops", "mfu", peaks.flops) for name in PHASES]
        phases += [of("rollout", "bytes", "bandwidth_share", peaks.bytes)]
    return tuple(phases)


@contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[Callable[[Any], Any]]:
    """Add the wall time of the block to a phase. ``wait``, the yielded function, waits for arrays that belong to it."""
    start = time.perf_counter()
    yield jax.block_until_ready
    seconds[name] = np.float32(seconds.get(name, 0.0) + time.perf_counter() - start)
