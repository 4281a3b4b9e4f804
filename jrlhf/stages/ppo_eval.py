"""The policy's answers to held-out prompts while PPO runs: written down, scored, and held against the reference."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import Config
from jrlhf.core import kl_penalty
from jrlhf.data import PromptRows
from jrlhf.parallel import fetch, is_first
from jrlhf.stages.actors import Actors, learnt_policy
from jrlhf.stages.batches import device_multiple
from jrlhf.stages.evaluation import distinct_n, words
from jrlhf.stages.ppo_iteration import episode_slices, reading_fns
from jrlhf.stages.rewards import make_rewards
from jrlhf.stages.run import json_line
from jrlhf.stages.sampling import GenerateFn, generate_all, texts_of
from jrlhf.stages.state import RunState
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
    score, (logprob_fn, _) = make_rewards(config, actors, mesh, slices=slices), reading_fns(actors, slices=slices)
    key = jax.random.key(config.seed)

    @jax.jit
    def measure(policy: Params, reference: Params, generation: Generation) -> dict[str, jax.Array]:
        tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
        at = {"temperature": ppo.sampling.temperature, "wanted": response}
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
        policy = learnt_policy(state.train)
        rows: dict[int, dict[str, Any]] = {}
        batches = generate_all(generate, policy, prompts, key=key, mesh=mesh, batch_size=batch_size, limit=limit)
        for indices, real, generation in batches:
            _, scores, parts = score(generation, prompts, indices)
            figures = fetch({"score": scores} | parts | measure(policy, reference, generation))
            for place, (prompt, answer) in enumerate(texts_of(actors.tokenizer, generation)):
                if real[place]:
                    numbers = {name: values[place].item() for name, values in figures.items()}
                    if any(math.isnan(numbers[name]) for name in parts):
                        numbers |= dict.fromkeys(("score", *parts))
                    rows[int(indices[place])] = {"prompt": prompt, "completion": answer} | numbers
        answers = [rows[index] for index in sorted(rows)]
        if all(row["score"] is None for row in answers):
            raise RuntimeError("ppo.prompts.eval: no answer to it could be scored")
        _write_rows(folder / "evals" / f"{number:06d}.jsonl", answers)
        return evaluation_metrics(answers)

    return evaluate


def evaluation_metrics(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Means over answers, of scores over those that have one; entropy is a token's, kl a sequence's, both in nats."""
    column = {name: np.asarray([row[name] for row in answers], np.float64) for name in answers[0] if name not in TEXTS}
    return {
        "eval/score_mean": float(np.nanmean(column["score"])),
        "eval/score_std": float(np.nanstd(column["score"])),
        "eval/kl": float(column["kl"].mean()),
        "eval/entropy": float(column["entropy"].sum() / max(column["length"].sum(), 1.0)),
        "eval/length": float(column["length"].mean()),
        "eval/eos_fraction": float(column["stopped"].mean()),
        "eval/distinct2": distinct_n([words(row["completion"]) for row in answers], n=2),
    } | {f"eval/{name}": float(np.nanmean(values)) for name, values in column.items() if name.startswith(PARTS)}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not is_first():
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json_line(row) for row in rows), encoding="utf-8")
