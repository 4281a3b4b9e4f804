"""Evaluation during training: it samples answers to held-out prompts, scores them and measures their KL."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jrlhf.config import CanaryConfig, RolloutConfig
from jrlhf.core import kl_penalty
from jrlhf.data import PromptRows
from jrlhf.parallel import fetch, is_first
from jrlhf.parallel.hosts import from_first
from jrlhf.rollout.actors import Actors, learnt_policy, own_tokenizer
from jrlhf.rollout.best_of_n import make_best_of_n
from jrlhf.rollout.diversity import distinct_n, words
from jrlhf.rollout.iteration import episode_slices, reading_fn
from jrlhf.rollout.models import ModelReader
from jrlhf.rollout.reward_models import Scorer, make_scorer, reward_of
from jrlhf.rollout.sampling import GenerateFn, generate_all, texts_of
from jrlhf.rollout.scores import make_rewards
from jrlhf.runs.exports import exported_form
from jrlhf.system.errors import RunError
from jrlhf.system.lines import json_line, read_json_lines, write_text
from jrlhf.train.batches import device_multiple
from jrlhf.train.keys import stream_key
from jrlhf.train.positions import Positions
from jrlhf.train.site import Site
from jrlhf.train.state import RunState
from jrlhf.types import Generation, Params

TEXT_COLUMNS = ("prompt", "completion")
PART_PREFIXES = ("model", "rule/")


def make_evaluator(
    site: Site,
    section: RolloutConfig,
    actors: Actors,
    generate: GenerateFn,
    heldout: PromptRows | None,
    models: ModelReader,
) -> Callable[[RunState, int], dict[str, float]]:
    """Return a function that samples answers to held-out prompts, scores them and returns their metrics.

    It writes the answers to ``evals/<iteration>.jsonl``, with the KL of an answer as a sum over its tokens and its
    entropy as their mean, and uses the same random draws in every evaluation.
    """
    if heldout is None:
        return lambda state, number: {}
    mesh, folder, stage = site.mesh, site.folder, site.stage
    prompts, reference = heldout, actors.reference
    limit = section.log.eval_rows
    batch_size = device_multiple(min(section.episodes, len(prompts)), mesh)
    slices = episode_slices(section, batch_size, mesh, key=f"{stage}.prompts.eval")
    score = make_rewards(section.rewards, actors, mesh, slices=slices, stage=stage)
    logprob_fn = reading_fn(actors, actors.policy.logprob_fn, slices=slices)
    judge_score = None
    if has_judge(section.canary):
        judge_score = _judge_scorer(site, section, actors, prompts, models, slices=slices)
    key = stream_key(site.config.seed, stage, "eval")
    exported = exported_form(actors.policy, section.export_dtype)
    write_curve = make_best_of_n(site, section, generate, prompts, score, judge_score, batch_size=batch_size)

    @jax.jit
    def measure(policy: Params, reference: Params | None, generation: Generation) -> dict[str, jax.Array]:
        tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
        at = {"temperature": section.sampling.temperature, "where": response}
        logprobs, entropy = logprob_fn(policy, tokens, mask, **at)
        distance = {}
        if reference is not None:
            ref_logprobs, _ = logprob_fn(reference, tokens, mask, **at)
            kl = kl_penalty(logprobs, ref_logprobs, estimator="k1")
            distance["kl"] = jnp.sum(jnp.where(response, kl, 0.0), axis=-1)
        length = jnp.sum(response, axis=-1, dtype=jnp.float32)
        return distance | {
            "entropy": jnp.sum(jnp.where(response, entropy, 0.0), axis=-1) / jnp.maximum(length, 1.0),
            "length": length,
            "stopped": generation.stopped,
        }

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        policy = exported(learnt_policy(state.train))
        if number == 0:
            write_curve(policy)
        rows: dict[int, dict[str, Any]] = {}
        batches = generate_all(generate, policy, prompts, key=key, mesh=mesh, batch_size=batch_size, limit=limit)
        for indices, real, generation in batches:
            _, scores, parts = score(generation, prompts, indices)
            figures = fetch({"score": scores} | parts | measure(policy, reference, generation))
            if judge_score is not None:
                figures["judge"] = fetch(judge_score(generation, prompts, indices))
            for place, (prompt, answer) in enumerate(texts_of(actors.tokenizer, generation)):
                if real[place]:
                    numbers = {name: values[place].item() for name, values in figures.items()}
                    if any(math.isnan(numbers[name]) for name in parts):
                        numbers |= dict.fromkeys(("score", *parts))
                    rows[int(indices[place])] = {"prompt": prompt, "completion": answer} | numbers
        answers = [rows[index] for index in sorted(rows)]
        if all(row["score"] is None for row in answers):
            raise RunError(f"{stage}.prompts.eval: no answer to these prompts has a score")
        _write_rows(answers_file(folder, number), answers)
        first = from_first("read the first answers", lambda: read_rows(answers_file(folder, 0)))
        return evaluation_metrics(answers) | win_rates(answers, first)

    return evaluate


def answers_file(folder: Path, number: int) -> Path:
    """Return the path of the held-out answers after ``number`` iterations."""
    return folder / "evals" / f"{number:06d}.jsonl"


def has_judge(canary: CanaryConfig) -> bool:
    """Return whether a second reward model, the canary's judge, scores the held-out answers."""
    return bool(canary.judge.path) and canary.action != "off"


def with_judge(section: RolloutConfig, stage: str, actors: Actors, models: ModelReader) -> Actors:
    """Return the actors with the canary's judge in place of the reward model."""
    judge, key = section.canary.judge, f"{stage}.canary.judge"
    source = models.source(judge.path, key=f"{key}.path", stage=stage, kind="reward")
    tokenizer = models.tokenizer(source)
    model = models.reward(source, judge, key=key)
    own = own_tokenizer(model, tokenizer, actors.policy, actors.tokenizer)
    return actors._replace(reward=model, reward_tokenizer=own)


def _judge_scorer(
    site: Site, section: RolloutConfig, actors: Actors, heldout: PromptRows, models: ModelReader, *, slices: int
) -> Scorer:
    """Return the judge's scorer. Raise ConfigError if held-out prompts and answers exceed its positions."""
    stage = site.stage
    judge = with_judge(section, stage, actors, models)
    if judge.reward_tokenizer is None:
        positions = Positions(reward_of(judge).arch, f"{stage}.prompts.max_length", model=f"{stage}.canary.judge")
        positions.answering(section.sampling, f"{stage}.sampling").check({f"{stage}.prompts.eval": heldout})
    return make_scorer(judge, site.mesh, slices=slices, option=f"{stage}.canary.judge")


def win_rates(answers: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of prompts whose answer scores higher than the answer before training; a tie is half a win.

    The rates compare the total score, the judge's score, and each part of a score with several parts.
    """

    def rate(name: str) -> float:
        now, then = (np.asarray([row[name] for row in rows], np.float64) for rows in (answers, first))
        difference = (now - then)[np.isfinite(now - then)]
        return float(np.mean(0.5 * (1.0 + np.sign(difference)))) if difference.size else 0.5

    names = {"score": "eval/win_rate", "judge": "eval/judge_win_rate"}
    names |= {part: f"eval/win_rate/{part}" for part in answers[0] if part.startswith(PART_PREFIXES)}
    return {figure: rate(name) for name, figure in names.items() if name in answers[0] and name in first[0]}


def evaluation_metrics(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over answers, for scores over those with a score; entropy per token, KL per sequence, in nats.

    Without a reference there is no KL.
    """
    column = {
        name: np.asarray([row[name] for row in answers], np.float64) for name in answers[0] if name not in TEXT_COLUMNS
    }
    score = column["score"][np.isfinite(column["score"])]
    figures = {
        "eval/score_mean": float(score.mean()),
        "eval/score_std": float(score.std()),
        "eval/score_stderr": standard_error(score),
        "eval/entropy": float((column["entropy"] * column["length"]).sum() / max(column["length"].sum(), 1.0)),
        "eval/length": float(column["length"].mean()),
        "eval/eos_fraction": float(column["stopped"].mean()),
        "eval/distinct2": distinct_n([words(row["completion"]) for row in answers], n=2),
    }
    if "kl" in column:
        figures["eval/kl"] = float(column["kl"].mean())
    if "judge" in column:
        judge = column["judge"]
        figures |= {"eval/judge_mean": float(judge.mean()), "eval/judge_stderr": standard_error(judge)}
    parts = {name: values for name, values in column.items() if name.startswith(PART_PREFIXES)}
    return figures | {f"eval/{name}": float(np.nanmean(values)) for name, values in parts.items()}


def standard_error(values: Float[np.ndarray, "N"]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the held-out answers of an evaluation."""
    return read_json_lines(path)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not is_first():
        return
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(map(json_line, rows)))
