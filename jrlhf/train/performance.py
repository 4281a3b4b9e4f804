"""How well a stage uses its devices: what its log says besides what it learns."""

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
"""As ``TokenMask``; a batch of rankings has one more axis."""
PHASES = ("rollout", "scoring", "update")


def training_flops(arch: ArchConfig, *, frozen: bool) -> Callable[[AnyMask, Any], jax.Array]:
    """Model FLOPs of a training step on a batch, by its mask and how many of its tokens get logits.

    ``frozen``: the weights are, and only adapters learn.
    """

    def flops(mask: AnyMask, logits: Float[Array, ""]) -> Float[Array, ""]:
        return training_passes(frozen) * _forward(arch, mask, logits)

    return jax.jit(flops)


def training_passes(frozen: bool) -> float:
    """What a training step takes, in forward passes: the gradients of frozen weights are not needed."""
    return 2.0 if frozen else 3.0


def _forward(arch: ArchConfig, mask: AnyMask, logits: Float[Array, ""]) -> Float[Array, ""]:
    return forward_flops(arch, positions_from_mask(mask.reshape(-1, mask.shape[-1])), logits=logits)


def rollout_work(
    section: RolloutConfig, policy: ArchConfig, value: ArchConfig | None, rewards: Sequence[ArchConfig]
) -> Callable[[Generation, SFTBatch | None], dict[str, jax.Array]]:
    """Model FLOPs of each phase of a PPO iteration, the bytes that decoding reads, and the tokens of both.

    Logits are counted at response tokens (of text: trained ones) alone, and reward models as if they read the policy's
    tokens. ``value``: None where it is a head on the policy.
    """
    # Log-probs of the reference, and of the policy if the sampler's own are not taken.
    readings = 1.0 if section.old_logprobs == "sampler" else 2.0
    updates = section.epochs * training_passes(section.lora.rank > 0)
    cached = {"itemsize": jnp.dtype(section.model.dtype).itemsize, "kv_cache": section.sampling.kv_cache}

    def work(generation: Generation, text: SFTBatch | None) -> dict[str, jax.Array]:
        positions, response = positions_from_mask(generation.mask), generation.response_mask
        answers = jnp.sum(response, dtype=jnp.float32)
        of_policy = forward_flops(policy, positions, logits=answers)
        of_value = jnp.float32(0.0) if value is None else forward_flops(value, positions, logits=0)
        of_rewards = sum((forward_flops(reward, positions, logits=0) for reward in rewards), jnp.float32(0.0))
        of_text = jnp.float32(0.0)
        if text is not None:
            of_text = _forward(policy, text.mask, jnp.sum(trained_tokens(text), dtype=jnp.float32))
        # The first answer token comes of the prompt; each later one of feeding the one before it.
        fed = jnp.where(response & jnp.roll(response, -1, axis=1), positions, -1)
        # Each part of a rollout reads the weights anew.
        steps = jnp.sum(jnp.max(jnp.sum(response, axis=-1).reshape(section.rollout_parts, -1), axis=-1) - 1)
        return {
            "flops/rollout": of_policy,
            "flops/scoring": readings * of_policy + of_value + of_rewards,
            "flops/update": updates * (of_policy + of_value + of_text),
            "bytes/rollout": decode_bytes(policy, fed, steps=steps, **cached),
            "tokens/rollout": answers,
            "tokens/scoring": jnp.sum(generation.mask, dtype=jnp.float32),
        }

    return jax.jit(work)


def rates(peaks: Peaks | None) -> tuple[Rate, ...]:
    """Of every stage: FLOP/s, and as a share of the peak where that is known."""
    achieved = Rate("flops", "perf/model_flops_per_second")
    return (achieved,) if peaks is None else (achieved, Rate("flops", "perf/mfu", unit=peaks.flops))


def phase_rates(peaks: Peaks | None) -> tuple[Rate, ...]:
    """Of PPO: tokens a second of each phase, and shares of the peaks where they are known."""

    def of(name: str, count: str, shown: str, unit: float = 1.0) -> Rate:
        return Rate(f"{count}/{name}", f"perf/{name}_{shown}", unit=unit, during=f"seconds/{name}")

    found = [of(name, "tokens", "tokens_per_second") for name in PHASES]
    if peaks is not None:
        found += [of(name, "flops", "mfu", peaks.flops) for name in PHASES]
        found += [of("rollout", "bytes", "bandwidth_share", peaks.bytes)]
    return tuple(found)


@contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[Callable[[Any], Any]]:
    """Wall time of a phase; what is passed to ``wait`` is awaited, so that no phase pays for another."""
    start = time.perf_counter()
    yield jax.block_until_ready
    seconds[name] = np.float32(time.perf_counter() - start)
