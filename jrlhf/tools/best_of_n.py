"""Best of n: the answers to a prompt that a reward model and rules score highest and lowest."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jrlhf import assets
from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.tools import SampleConfig
from jrlhf.data import DataError, load_tokenizer
from jrlhf.models import load_reward_model
from jrlhf.parallel import fetch
from jrlhf.rollout.actors import Actors, own_tokenizer
from jrlhf.rollout.best_of_n import best_of_n_curve
from jrlhf.rollout.rules import columns_read
from jrlhf.rollout.sampling import draws
from jrlhf.rollout.scores import make_rewards
from jrlhf.runs.folder import last_export
from jrlhf.system.lines import json_line
from jrlhf.tools.sampler import Sampler, load_sampler
from jrlhf.train.positions import Positions

NO_ROW = {
    "best": "no answer to it has a score and is not blank",
    "best-worst": "no two answers to it have different scores and are not blank",
}
"""Reason why a prompt is left out, by what is kept."""


class ScoredAnswer(NamedTuple):
    """An answer and its score; NaN for one that has none."""

    text: str
    score: float


def best_of_n(args: SampleConfig) -> list[str]:
    """Return a line for each prompt that has a best answer, and write notes to stderr. Raise DataError for none."""
    rewards = args.rewards if args.score else replace(args.rewards, model_weight=0.0)
    sampler = load_sampler(args, columns_read(rewards, stage="sample"))
    by_prompt = scored_answers(args, rewards, sampler)
    rows = [
        chosen_row(row, answers, with_worst=args.keep == "best-worst")
        for row, answers in zip(sampler.prompts.shown, by_prompt, strict=True)
    ]
    lines = [json_line(row) for row in rows if row is not None]
    if not lines:
        raise DataError(
            f"{args.prompts}: every prompt is left out: {NO_ROW[args.keep]}; raise sampling.temperature or samples"
        )
    for note in notes(args, by_prompt, left_out=len(rows) - len(lines)):
        print(f"jrlhf: {note}", file=sys.stderr)
    return lines


def scored_answers(args: SampleConfig, rewards: RewardsConfig, sampler: Sampler) -> list[list[ScoredAnswer]]:
    """Return the answers to each prompt with their scores."""
    by_prompt: list[list[ScoredAnswer]] = [[] for _ in range(len(sampler.prompts))]
    score = make_rewards(rewards, load_scorer(args, sampler), sampler.mesh, slices=1, stage="sample")
    settings = sampler.settings
    for draw in draws(sampler.generate, sampler.model.params, sampler.prompts, sampler.tokenizer, **settings):
        _, scores, parts = score(draw.generation, sampler.prompts, draw.rows)
        scores, *parts = fetch((scores, *parts.values()))
        # An answer that a rule could not score has NaN in that part, and 0 as its score.
        scores = np.where(np.any([np.isnan(part) for part in (scores, *parts)], axis=0), np.nan, scores)
        for row, real, text, number in zip(draw.rows, draw.real, draw.texts, scores, strict=True):
            if real:
                by_prompt[row].append(ScoredAnswer(text, float(number)))
    return by_prompt


def load_scorer(args: SampleConfig, sampler: Sampler) -> Actors:
    """Return the policy and the reward model of ``args.score``, if there is one."""
    actors = Actors(sampler.model, None, None, sampler.tokenizer, None)
    if not args.score:
        return actors
    source = last_export(assets.resolve(args.score), "reward")
    tokenizer = load_tokenizer(source)
    model = load_reward_model(source, dtype=args.dtype, mesh=sampler.mesh, weights="auto", option="score")
    own = own_tokenizer(model, tokenizer, sampler.model, sampler.tokenizer)
    if own is None:
        positions = Positions(model.arch, "max_length", model="the reward model")
        positions.answering(args.sampling, "sampling").check({args.prompts: sampler.prompts})
    return actors._replace(reward=model, reward_tokenizer=own)


def chosen_row(row: dict[str, Any], answers: Sequence[ScoredAnswer], *, with_worst: bool) -> dict[str, Any] | None:
    """Return the best answer as a row for SFT, or best and worst as a preference; of equal scores the first counts.

    None where there is none: blank answers and those without a score do not count, and a preference needs two scores.
    """
    able = [answer for answer in answers if answer.text.strip() and not np.isnan(answer.score)]
    if not able:
        return None
    best, worst = (choose(able, key=lambda answer: answer.score) for choose in (max, min))
    about = {name: row[name] for name in ("prompt", "tools") if name in row}
    if not with_worst:
        return about | {"completion": best.text}
    return None if best.score == worst.score else about | {"chosen": best.text, "rejected": worst.text}


def notes(args: SampleConfig, by_prompt: Sequence[Sequence[ScoredAnswer]], *, left_out: int) -> list[str]:
    """Return what was left out, and the mean score of the best of 1, 2, 4, ... and n answers."""
    lines = [f"{left_out} of {len(by_prompt)} prompts left out: {NO_ROW[args.keep]}"] if left_out else []
    scores = np.array([[answer.score for answer in answers] for answers in by_prompt])
    return lines + [
        f"best of {point['n']}: mean score {point['score']:.3f}, KL at most {point['kl']:.2f} nats"
        for point in best_of_n_curve(scores, None)
    ]
