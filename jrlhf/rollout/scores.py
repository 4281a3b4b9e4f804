"""The score of an answer: the weighted sum of the reward model's score and the scores of the rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.rewards_check import rule_weights
from jrlhf.core import masked_mean
from jrlhf.data import PromptRows, Tokenizer
from jrlhf.parallel import batch_sharding, fetch, is_first, shard_batch
from jrlhf.parallel.hosts import from_first
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.reward_models import Scorer, make_scorer
from jrlhf.rollout.rules import Scores, make_rules, start_rules
from jrlhf.rollout.sampling import texts_of
from jrlhf.rules import Episode
from jrlhf.types import Generation


class ScoredAnswers(NamedTuple):
    """A batch of answers with their scores."""

    generation: Generation
    """The sampled answers; an answer without a score has an empty response mask, so that no loss includes it."""
    scores: jax.Array
    """Scores, 0 for an answer without one. If no answer has a score, all are NaN, and the step skips the update."""
    parts: dict[str, jax.Array]
    """Unweighted ``model`` and ``rule/<name>`` of each answer; empty if the reward model gives the only score.

    NaN marks an answer without a score."""


PendingScores = Callable[[], dict[str, Scores]]
"""Wait for the rules that score some of the answers, and return the scores by rule name."""


class Rewards(NamedTuple):
    """The scorer of answers; its functions take ``(sampled answers, all prompts, indices of the answered prompts)``."""

    begin: Callable[[Generation, PromptRows, Int[np.ndarray, "B"]], PendingScores]
    """Start the rules on answers, which may be a part of those of ``finish``."""
    finish: Callable[[Generation, PromptRows, Int[np.ndarray, "B"], Sequence[PendingScores]], ScoredAnswers]
    """Score all answers, given the pending scores of their parts in order."""

    def __call__(self, generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> ScoredAnswers:
        """Score answers with ``begin`` and ``finish``."""
        return self.finish(generation, prompts, rows, [self.begin(generation, prompts, rows)])


def make_rewards(rewards: RewardsConfig, actors: Actors, mesh: Mesh, *, slices: int, stage: str) -> Rewards:
    """Return the scorer of the stage's ``rewards``.

    The first process runs the rules while the devices run the reward model.
    """
    rules, weights = make_rules(rewards, stage=stage), weights_of(rewards)
    model_scorer = learned_scorer(rewards, actors, mesh, slices=slices, stage=stage) if rewards.uses_model else None
    add_up = jax.jit(lambda generation, parts: weigh(generation, parts, weights=weights))

    def begin(generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> PendingScores:
        if not rules:
            return dict
        episodes = episodes_of(actors.tokenizer, generation, [prompts.shown[int(row)] for row in rows])
        return start_rules(rules, episodes, timeout=rewards.timeout, stage=stage) if is_first() else dict

    def finish(
        generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"], pending: Sequence[PendingScores]
    ) -> ScoredAnswers:
        if model_scorer is not None and not rules and not rewards.models and rewards.model_weight == 1:
            return ScoredAnswers(generation, model_scorer(generation, prompts, rows), {})
        parts = {} if model_scorer is None else {"model": model_scorer(generation, prompts, rows)}
        if rules:
            results = from_first(f"score answers by {stage}.rewards", lambda: [wait() for wait in pending])
            by_rule = {f"rule/{rule.name}": [score for part in results for score in part[rule.name]] for rule in rules}
            parts |= shard_batch({name: np.asarray(values, np.float32) for name, values in by_rule.items()}, mesh)
        return add_up(generation, parts)

    return Rewards(begin, finish)


def weights_of(rewards: RewardsConfig) -> dict[str, float]:
    """Return the weight of each part of a score that has one: ``model`` and ``rule/<name>``."""
    rules = {f"rule/{name}": weight for name, weight in rule_weights(rewards).items()}
    return {name: weight for name, weight in (rules | {"model": rewards.model_weight}).items() if weight}


def learned_scorer(rewards: RewardsConfig, actors: Actors, mesh: Mesh, *, slices: int, stage: str) -> Scorer:
    """Return the scorer of the reward model, or of the whole ensemble if there are further models."""
    first = make_scorer(actors, mesh, slices=slices, option=f"{stage}.reward")
    if not actors.ensemble:
        return first
    others = (actors._replace(reward=member.model, reward_tokenizer=member.tokenizer) for member in actors.ensemble)
    scorers = [first, *(make_scorer(other, mesh, slices=slices, option=f"{stage}.rewards.models") for other in others)]
    coef = rewards.lower_bound_coef if rewards.combine == "lower_bound" else 0.0
    combine = jax.jit(lambda scores: ensemble_score(jnp.stack(scores), coef=coef), out_shardings=batch_sharding(mesh))
    return lambda generation, prompts, rows: combine([score(generation, prompts, rows) for score in scorers])


def ensemble_score(scores: Float[Array, "M B"], *, coef: float) -> Float[Array, "B"]:
    """Return mean - ``coef`` · population standard deviation over models (Coste et al. 2024, arXiv 2310.02743)."""
    scores = scores.astype(jnp.float32)
    return jnp.mean(scores, axis=0) - coef * jnp.std(scores, axis=0)


def episodes_of(tokenizer: Tokenizer, generation: Generation, prompt_rows: list[dict[str, Any]]) -> list[Episode]:
    """Return each answer as an episode for the rules; all processes must call this."""
    stopped, response = fetch((generation.stopped, generation.response_mask))
    answers = [answer for _, answer in texts_of(tokenizer, generation)]
    lengths = response.sum(axis=-1)
    rows = zip(prompt_rows, answers, lengths.tolist(), stopped.tolist(), strict=True)
    return [Episode(*row) for row in rows]


def weigh(
    generation: Generation, parts: dict[str, Float[Array, "B"]], *, weights: Mapping[str, float]
) -> ScoredAnswers:
    """Return Σ weight · part. An answer with a NaN part has no score, and its response mask becomes empty.

    If no answer has a score, the masks stay and all scores are NaN, so that the step skips the update and counts it.
    """
    has_score = jnp.stack([~jnp.isnan(part) for part in parts.values()]).all(axis=0)
    terms = [weights[name] * part.astype(jnp.float32) for name, part in sorted(parts.items())]
    scores = jnp.where(has_score, jnp.stack(terms).sum(axis=0), jnp.where(has_score.any(), 0.0, jnp.nan))
    response = generation.response_mask & (has_score | ~has_score.any())[:, None]
    return ScoredAnswers(generation._replace(response_mask=response), scores, parts)


def part_metrics(parts: dict[str, Float[Array, "B"]], has_score: Bool[Array, "B"]) -> dict[str, Float[Array, ""]]:
    """Return the means of parts over answers with a score, and ``reward/left_out``, the share without one."""
    means = {f"reward/{name}": masked_mean(part, has_score) for name, part in parts.items()}
    return means | ({"reward/left_out": jnp.mean(~has_score, dtype=jnp.float32)} if parts else {})
