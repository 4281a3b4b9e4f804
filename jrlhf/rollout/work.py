"""The FLOPs, tokens and bytes of an iteration."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jrlhf.config import RolloutConfig
from jrlhf.rollout.actors import Actors
from jrlhf.train.performance import PHASES, rollout_work
from jrlhf.types import Generation, SFTBatch

Work = Callable[[Generation, Sequence[Generation], SFTBatch | None, jax.Array], dict[str, jax.Array]]
"""``(answers, those of further draws, text, updates) -> counts``."""


def iteration_work(section: RolloutConfig, actors: Actors, *, together: int) -> Work:
    """Return a function that counts the work of an iteration; updates count only if they were not skipped.

    One reading of a prompt serves ``together`` answers. Answers of further draws are sampled and scored by the reward
    models, but count in readings and updates only as far as they took the places of others, which are as long on
    average.
    """
    rewards = [model.arch for model in actors.reward_models]
    policy, value = actors.policy.arch, actors.value_arch
    work = rollout_work(section, policy, value, rewards, reference=actors.has_reference, together=together)
    # Neither policy nor reference nor value network reads what was only drawn.
    drawn = replace(section, old_logprobs="sampler")
    draw_work = rollout_work(drawn, policy, None, rewards, reference=False, together=together)

    def counts(
        generation: Generation, further: Sequence[Generation], text: SFTBatch | None, updates: jax.Array
    ) -> dict[str, jax.Array]:
        full = work(generation, text)
        fraction = updates / (section.epochs * section.minibatches)
        full["flops/update"] = full["flops/update"] * fraction
        full["tokens/update"] = full["tokens/scoring"] * (fraction * section.epochs)
        for answers in further:
            more = draw_work(answers, None)
            for name in ("flops/rollout", "flops/scoring", "bytes/rollout", "tokens/rollout"):
                full[name] = full[name] + more[name]
        return full | {"flops": sum((full[f"flops/{name}"] for name in PHASES), jnp.float32(0.0))}

    return counts
