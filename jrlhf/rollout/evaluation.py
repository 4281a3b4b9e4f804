"""The policy's answers to held-out prompts while PPO runs: written down, scored, and held against the reference."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jrlhf.config import CanaryConfig, Config
from jrlhf.core import kl_penalty
from jrlhf.data import PromptRows, load_tokenizer
from jrlhf.models import load_reward_model
from jrlhf.parallel import fetch, from_first, is_first
from jrlhf.rollout.actors import Actors, learnt_policy, own_tokenizer
from jrlhf.rollout.diversity import distinct_n, words
from jrlhf.rollout.iteration import episode_slices, reading_fn
from jrlhf.rollout.reward_models import Scorer, make_scorer, reward_of
from jrlhf.rollout.sampling import GenerateFn, generate_all, texts_of
from jrlhf.rollout.scores import make_rewards
from jrlhf.runs.exports import exported_form
from jrlhf.runs.folder import model_source
from jrlhf.system.lines import json_line, read_json_lines, write_text
from jrlhf.train.batches import device_multiple
from jrlhf.train.positions import Positions
from jrlhf.train.start import computed
from jrlhf.train.state import RunState
from jrlhf.types import Generation, Params

TEXTS = ("prompt", "completion")
PARTS = ("model", "rule/")


def make_evaluator(
    config: Config,
    actors: Actors,
    generate: GenerateFn,
    heldout: PromptRows | None,
    folder: Path,
    mesh: Mesh,
) -> Callable[[RunState, int], dict[str, float]]:
    """The same draws every time, scored, and written to ``evals/<iteration>.jsonl``."""
    if heldout is None:
        return lambda state, number: {}
    ppo, prompts, reference = config.ppo, heldout, actors.policy.params
    limit = ppo.log.eval_rows
    batch_size = device_multiple(min(ppo.episodes, len(prompts)), mesh)
    slices = episode_slices(ppo, batch_size, mesh, key="ppo.prompts.eval")
    score = make_rewards(config, actors, mesh, slices=slices)
    logprob_fn = reading_fn(actors, actors.policy.logprob_fn, slices=slices)
    judge = _judge_scorer(config, actors, prompts, mesh, slices=slices) if judged(ppo.canary) else None
    key = jax.random.key(config.seed)
    exported = exported_form(actors.policy, ppo.export_dtype)

    @jax.jit
    def measure(policy: Params, reference: Params, generation: Generation) -> dict[str, jax.Array]:
        tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
        at = {"temperature": ppo.sampling.temperature, "where": response}
        logprobs, entropy = logprob_fn(policy, tokens, mask, **at)
        ref_logprobs, _ = logprob_fn(reference, tokens, mask, **at)
        kl = kl_penalty(logprobs, ref_logprobs, estimator="k1")
        return {
            "kl": jnp.sum(jnp.where(response, kl, 0.0), axis=-1),
            "entropy": jnp.sum(jnp.where(response, entropy, 0.0), axis=-1),
            "length": jnp.sum(response, axis=-1, dtype=jnp.float32),
            "stopped": generation.stopped,
        }

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        policy = exported(learnt_policy(state.train))
        rows: dict[int, dict[str, Any]] = {}
        batches = generate_all(generate, policy, prompts, key=key, mesh=mesh, batch_size=batch_size, limit=limit)
        for indices, real, generation in batches:
            _, scores, parts = score(generation, prompts, indices)
            figures = fetch({"score": scores} | parts | measure(policy, reference, generation))
            if judge is not None:
                figures["judge"] = fetch(judge(generation, prompts, indices))
            for place, (prompt, answer) in enumerate(texts_of(actors.tokenizer, generation)):
                if real[place]:
                    numbers = {name: values[place].item() for name, values in figures.items()}
                    if any(math.isnan(numbers[name]) for name in parts):
                        numbers |= dict.fromkeys(("score", *parts))
                    rows[int(indices[place])] = {"prompt": prompt, "completion": answer} | numbers
        answers = [rows[index] for index in sorted(rows)]
        if all(row["score"] is None for row in answers):
            raise RuntimeError("ppo.prompts.eval: no answer to it could be scored")
        _write_rows(answers_file(folder, number), answers)
        first = from_first("read the first answers", lambda: read_rows(answers_file(folder, 0)))
        return evaluation_metrics(answers) | win_rates(answers, first)

    return evaluate


def answers_file(folder: Path, number: int) -> Path:
    """The held-out answers after so many iterations, in PPO's folder."""
    return folder / "evals" / f"{number:06d}.jsonl"


def judged(canary: CanaryConfig) -> bool:
    """Whether a second reward model reads the held-out answers."""
    return bool(canary.judge.path) and canary.action != "off"


def judging(config: Config, actors: Actors, mesh: Mesh) -> Actors:
    """The same actors with the canary's judge in place of the reward model."""
    wanted = config.ppo.canary.judge
    source = model_source(config, wanted.path, key="ppo.canary.judge.path", stage="reward")
    tokenizer = load_tokenizer(source)
    model = load_reward_model(source, mesh=mesh, **computed(wanted, mesh, key="ppo.canary.judge"))
    own = own_tokenizer(model, tokenizer, actors.policy, actors.tokenizer)
    return actors._replace(reward=model, reward_tokenizer=own)


def _judge_scorer(config: Config, actors: Actors, heldout: PromptRows, mesh: Mesh, *, slices: int) -> Scorer:
    """The judge's scores; ConfigError where it has too few positions for the held-out prompts and their answers."""
    judge = judging(config, actors, mesh)
    if judge.reward_tokenizer is None:
        positions = Positions(reward_of(judge).arch, "ppo.prompts.max_length", model="ppo.canary.judge")
        positions.answering(config.ppo.sampling, "ppo.sampling").check({"ppo.prompts.eval": heldout})
    return make_scorer(judge, mesh, slices=slices)


def win_rates(answers: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, float]:
    """The share of prompts whose answer scores higher than the first one, of before PPO; a tie is half a win.

    By the whole score, by the judge, and by each part of the score where it has several.
    """

    def rate(name: str) -> float:
        now, then = (np.asarray([row[name] for row in rows], np.float64) for rows in (answers, first))
        difference = (now - then)[np.isfinite(now - then)]
        return float(np.mean(0.5 * (1.0 + np.sign(difference)))) if difference.size else 0.5

    names = {"score": "eval/win_rate", "judge": "eval/judge_win_rate"}
    names |= {part: f"eval/win_rate/{part}" for part in answers[0] if part.startswith(PARTS)}
    return {figure: rate(name) for name, figure in names.items() if name in answers[0] and name in first[0]}


def evaluation_metrics(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Means over answers, of scores over those that have one; entropy is a token's, kl a sequence's, both in nats."""
    column = {name: np.asarray([row[name] for row in answers], np.float64) for name in answers[0] if name not in TEXTS}
    score = column["score"][np.isfinite(column["score"])]
    figures = {
        "eval/score_mean": float(score.mean()),
        "eval/score_std": float(score.std()),
        "eval/score_stderr": standard_error(score),
        "eval/kl": float(column["kl"].mean()),
        "eval/entropy": float(column["entropy"].sum() / max(column["length"].sum(), 1.0)),
        "eval/length": float(column["length"].mean()),
        "eval/eos_fraction": float(column["stopped"].mean()),
        "eval/distinct2": distinct_n([words(row["completion"]) for row in answers], n=2),
    }
    if "judge" in column:
        judge = column["judge"]
        figures |= {"eval/judge_mean": float(judge.mean()), "eval/judge_stderr": standard_error(judge)}
    parts = {name: values for name, values in column.items() if name.startswith(PARTS)}
    return figures | {f"eval/{name}": float(np.nanmean(values)) for name, values in parts.items()}


def standard_error(values: Float[np.ndarray, "N"]) -> float:
    """Of the mean; 0 where there is one value alone."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not is_first():
        return
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(map(json_line, rows)))
