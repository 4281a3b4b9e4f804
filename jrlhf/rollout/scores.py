"""The score of an answer: what the reward model says and what the rules say, weighed and added up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jrlhf.config import Config
from jrlhf.config.rewards import RewardsConfig
from jrlhf.core import masked_mean
from jrlhf.data import PromptRows, Tokenizer
from jrlhf.parallel import batch_sharding, fetch, from_first, is_first, shard_batch
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.reward_models import Scorer, make_scorer
from jrlhf.rollout.rules import Scores, make_rules, start_rules
from jrlhf.rollout.sampling import texts_of
from jrlhf.rules import Episode
from jrlhf.types import Generation


class Scored(NamedTuple):
    """A batch of answers and what they are worth."""

    generation: Generation
    """As it was sampled, but that an answer without a score has no response: nothing of it is in any loss."""
    scores: jax.Array
    """0 for an answer without one; NaN for all where none has one, so that the update is skipped and counted."""
    parts: dict[str, jax.Array]
    """Each answer's ``model`` and ``rule/<name>``, unweighted; empty where the reward model's is all there is. NaN: the
    answer was left out."""


Heard = Callable[[], dict[str, Scores]]
"""Waits for the rules that score some of the answers."""


class Rewards(NamedTuple):
    """How answers are scored: ``(what was sampled, all prompts, which of them were answered)`` go into both."""

    begin: Callable[[Generation, PromptRows, Int[np.ndarray, "B"]], Heard]
    """Rules begin to score as soon as the answers are there; the answers may be a part of those of ``finish``."""
    finish: Callable[[Generation, PromptRows, Int[np.ndarray, "B"], Sequence[Heard]], Scored]
    """Of all answers, whose parts the rules have begun with, one after the other."""

    def __call__(self, generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> Scored:
        """Both at once."""
        return self.finish(generation, prompts, rows, [self.begin(generation, prompts, rows)])


def make_rewards(config: Config, actors: Actors, mesh: Mesh, *, slices: int) -> Rewards:
    """As ``ppo.rewards`` says. Rules are run by the first process, while the devices are at the reward model."""
    rewards, rules = config.ppo.rewards, make_rules(config.ppo.rewards)
    learned = learned_scorer(rewards, actors, mesh, slices=slices) if rewards.uses_model else None
    weights = {f"rule/{rule.name}": rule.weight for rule in rules} | {"model": rewards.model_weight}
    add_up = jax.jit(lambda generation, parts: weigh(generation, parts, weights=weights))

    def begin(generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> Heard:
        if not rules:
            return dict
        episodes = episodes_of(actors.tokenizer, generation, [prompts.shown[int(row)] for row in rows])
        return start_rules(rules, episodes, timeout=rewards.timeout) if is_first() else dict

    def finish(
        generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"], heard: Sequence[Heard]
    ) -> Scored:
        if learned is not None and not rules and not rewards.models and rewards.model_weight == 1:
            return Scored(generation, learned(generation, prompts, rows), {})
        parts = {} if learned is None else {"model": learned(generation, prompts, rows)}
        if rules:
            told = from_first("score answers by ppo.rewards", lambda: [wait() for wait in heard])
            by_rule = {f"rule/{rule.name}": [score for part in told for score in part[rule.name]] for rule in rules}
            parts |= shard_batch({name: np.asarray(values, np.float32) for name, values in by_rule.items()}, mesh)
        return add_up(generation, parts)

    return Rewards(begin, finish)


def learned_scorer(rewards: RewardsConfig, actors: Actors, mesh: Mesh, *, slices: int) -> Scorer:
    """The reward model's scores, or those that it and the further ones come to together."""
    first = make_scorer(actors, mesh, slices=slices)
    if not actors.others:
        return first
    others = (actors._replace(reward=judge.model, reward_tokenizer=judge.tokenizer) for judge in actors.others)
    scorers = [first, *(make_scorer(other, mesh, slices=slices) for other in others)]
    coef = rewards.lower_bound_coef if rewards.combine == "lower_bound" else 0.0
    agree = jax.jit(lambda scores: agreed(jnp.stack(scores), coef=coef), out_shardings=batch_sharding(mesh))
    return lambda generation, prompts, rows: agree([score(generation, prompts, rows) for score in scorers])


def agreed(scores: Float[Array, "M B"], *, coef: float) -> Float[Array, "B"]:
    """The mean over models less ``coef`` population standard deviations (Coste et al. 2024, arXiv 2310.02743)."""
    scores = scores.astype(jnp.float32)
    return jnp.mean(scores, axis=0) - coef * jnp.std(scores, axis=0)


def episodes_of(tokenizer: Tokenizer, generation: Generation, given: list[dict[str, Any]]) -> list[Episode]:
    """Each answer as the rules see it; all processes must ask."""
    stopped, response = fetch((generation.stopped, generation.response_mask))
    answers = [answer for _, answer in texts_of(tokenizer, generation)]
    lengths = response.sum(axis=-1)
    rows = zip(given, answers, lengths.tolist(), stopped.tolist(), strict=True)
    return [Episode(*row) for row in rows]


def weigh(generation: Generation, parts: dict[str, Float[Array, "B"]], *, weights: Mapping[str, float]) -> Scored:
    """Σ weight · part. An answer with a part that is NaN has no score, and loses its response.

    Where that is all of them they keep it, and their scores are NaN: then there is no update, and that is counted.
    """
    kept = jnp.stack([~jnp.isnan(part) for part in parts.values()]).all(axis=0)
    terms = [weights[name] * part.astype(jnp.float32) for name, part in sorted(parts.items())]
    scores = jnp.where(kept, jnp.stack(terms).sum(axis=0), jnp.where(kept.any(), 0.0, jnp.nan))
    response = generation.response_mask & (kept | ~kept.any())[:, None]
    return Scored(generation._replace(response_mask=response), scores, parts)


def part_metrics(parts: dict[str, Float[Array, "B"]], kept: Bool[Array, "B"]) -> dict[str, Float[Array, ""]]:
    """Means over the answers that are kept, ``reward/model`` and ``reward/rule/<name>``, and the share left out."""
    means = {f"reward/{name}": masked_mean(part, kept) for name, part in parts.items()}
    return means | ({"reward/left_out": jnp.mean(~kept, dtype=jnp.float32)} if parts else {})
