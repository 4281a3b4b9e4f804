"""Best of n: the answers to a prompt that a reward model and rules score highest and lowest.

Stiennon et al. 2020, arXiv 2009.01325, section 4.3. The best of n answers is at most log n - (n - 1)/n nats of KL away
from the policy that they are drawn from (Beirami et al. 2024, arXiv 2401.01879).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jrlhf import assets
from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.tools import SampleConfig
from jrlhf.data import DataError, load_tokenizer
from jrlhf.models import load_reward_model
from jrlhf.parallel import fetch
from jrlhf.rollout.actors import Actors, own_tokenizer
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
    sampler = load_sampler(args, columns_read(rewards))
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
    scores = [np.array([answer.score for answer in answers]) for answers in by_prompt]
    scores = [numbers[~np.isnan(numbers)] for numbers in scores]
    for n in sizes(args.samples):
        means = [best_mean(numbers, n) for numbers in scores if len(numbers) >= n]
        if means:
            lines.append(f"best of {n}: mean score {np.mean(means):.3f}, KL at most {best_of_n_kl(n):.2f} nats")
    return lines


def sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``samples``, and ``samples`` itself."""
    return [*(2**k for k in range(samples.bit_length()) if 2**k < samples), samples]


def best_mean(scores: Float[np.ndarray, "N"], n: int) -> float:
    """Return the mean of the highest score over all choices of ``n`` of the scores.

    With scores in ascending order the i-th, from 1, is the highest of (i - 1 choose n - 1) of the (N choose n) choices;
    an unbiased estimate of best of n (Nakano et al. 2021, arXiv 2112.09332, appendix I).
    """
    total, mean = len(scores), 0.0
    # The highest score's weight is n / N; each lower one follows from the one above it.
    weight = n / total
    for place, score in zip(range(total, n - 1, -1), np.sort(scores)[::-1], strict=False):
        mean += weight * float(score)
        weight *= (place - n) / (place - 1) if place > 1 else 0.0
    return mean


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1)/n, in nats: an upper bound of KL(best of n answers ‖ policy)."""
    return float(np.log(n) - (n - 1) / n)
