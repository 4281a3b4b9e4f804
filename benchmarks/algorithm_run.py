"""One piece of work of benchmarks/algorithms.py, in a process of its own. Prints a JSON line.

python benchmarks/algorithm_run.py '{"method": "PPO", "seed": 0, ...}' OUT
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from algorithm_methods import BEST_OF, HELDOUT, METHODS, READING, SIZES, method_config

from jrlhf.config import Config, ModelConfig
from jrlhf.config.tools import SampleConfig
from jrlhf.models import load_pretrained
from jrlhf.rollout.actors import load_actors
from jrlhf.rollout.best_of_n import best_mean, best_of_n_kl
from jrlhf.rollout.diversity import distinct_n, words
from jrlhf.rollout.evaluation import make_evaluator
from jrlhf.rollout.inputs import RolloutInputs
from jrlhf.rollout.models import weight_reader
from jrlhf.rollout.sampling import jit_generate
from jrlhf.runs.folder import last_export
from jrlhf.stages.run import run_stage
from jrlhf.stages.table import stage_named
from jrlhf.system.lines import read_json_lines
from jrlhf.tools.best_of_n import scored_answers
from jrlhf.tools.quickstart import distinct2, prompt_and_answer
from jrlhf.tools.quickstart_judge import lexicon_scores, load_opinion_lexicon
from jrlhf.tools.sampler import load_sampler
from jrlhf.train.attempt import Event
from jrlhf.train.site import Site
from jrlhf.train.start import mesh_of
from jrlhf.train.state import RunState
from jrlhf.types import TrainState

Evaluation = Callable[[RunState, int], dict[str, float]]
"""A function from a state and a step to the figures of the policy's held-out answers."""

SEARCH = "best-of-n"
"""Folder of the search among the SFT model's answers, which comes before the runs of a seed."""
POINTS = 3
"""Evaluations of a run."""


class Spent(Exception):
    """The CPU time of a run is spent."""


class Watch:
    """Measures the steps of a run from its events, evaluates the policy after a third, two thirds and all of the budget
    of CPU seconds, and then ends the run by raising ``Spent``.

    ``reading`` is what was read before the first step, in steps.
    """

    def __init__(
        self,
        budget: float,
        make: Callable[[], Evaluation],
        *,
        reading: float,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._budget, self._reading, self._make, self._now = budget, reading, make, clock
        self._evaluate: Evaluation | None = None
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._clock, self._programs = 0.0, 0.0
        self.steps: list[dict[str, float]] = []
        """CPU seconds over all threads, tokens of answers, and programs that were compiled, of each step."""
        self.points: list[dict[str, float]] = []
        self.peak_mb = 0
        """Growth of the process's highest memory until the first evaluation."""

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            jax.block_until_ready(event.state)
            tokens = event.figures["length/tokens" if "length/tokens" in event.figures else "tokens"]
            self.steps.append({"cpu_seconds": self._now() - self._clock, "tokens": float(tokens)})
        elif event.kind == "line":
            programs = event.figures["compile/programs"]
            self.steps[-1]["programs"] = programs - self._programs
            self._programs = programs
            if self.cpu_seconds() >= self._budget * (1 + len(self.points)) / POINTS:
                self.points.append({"step": event.step} | self._figures_of(event))
            if len(self.points) == POINTS:
                raise Spent
        self._clock = self._now()

    def _figures_of(self, event: Event) -> dict[str, float]:
        if self._evaluate is None:
            self.peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before) // 1024
            self._evaluate = self._make()
        return self._evaluate(event.state, event.step)

    def measured(self) -> list[dict[str, float]]:
        """Return the steps in which nothing was compiled; what an evaluation compiles counts as the next step's."""
        return [step for step in self.steps if not step["programs"]]

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of training: of all steps, those that compiled as long as the mean of the others, and
        of what was read before."""
        steps = self.measured()
        mean = sum(step["cpu_seconds"] for step in steps) / len(steps) if steps else 0.0
        return mean * (len(self.steps) + self._reading)

    def summary(self) -> dict[str, Any]:
        steps = self.measured()
        return {
            "cpu_seconds": self.cpu_seconds(),
            "steps": len(self.steps),
            "measured_steps": len(steps),
            "tokens_per_cpu_second": sum(s["tokens"] for s in steps) / sum(s["cpu_seconds"] for s in steps),
            "peak_mb": self.peak_mb,
            "points": self.points,
        }


def make_evaluation(config: Config, heldout: Path, folder: Path) -> Evaluation:
    """Return the evaluation that stages share, with the judge's gold: the same draws and reference for all methods."""
    dpo, base, mesh = config.dpo, folder.parent.parent, mesh_of(config)
    section = replace(
        dpo.answering,
        model=ModelConfig(str(base / "sft")),
        reward=ModelConfig(str(base / "reward")),
        prompts=replace(dpo.prompts, eval=str(heldout)),
        episodes=64,
        microbatch=16,
    )
    actors = load_actors(section, "dpo", weight_reader(config, mesh), value_from=None)
    generate = jit_generate(actors.policy.decode_fns, section.sampling, actors.tokenizer, mesh, option="dpo.sampling")
    site = Site(config, "dpo", folder, mesh, actors.tokenizer)
    rows = RolloutInputs(config, section, "dpo").heldout
    stage_figures = make_evaluator(site, section, actors, generate, rows, weight_reader(config, mesh))
    lexicon = load_opinion_lexicon()

    def evaluate(state: RunState, step: int) -> dict[str, float]:
        figures = stage_figures(state, step)
        rows = read_json_lines(folder / "evals" / f"{step:06d}.jsonl")
        names = {"reward": "score_mean", "kl": "kl", "entropy": "entropy", "length": "length"}
        gold = lexicon_scores([prompt_and_answer(row) for row in rows], lexicon)
        return {name: figures[f"eval/{of}"] for name, of in names.items()} | {
            "gold": float(gold.mean()),
            "distinct2": distinct2(rows),
        }

    return evaluate


def train(work: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train by a method until its budget is spent; return what it took, and its held-out figures on the way.

    A run that was cut begins anew, since steps that are not seen cannot be measured.
    """
    name, method = work["method"], METHODS[work["method"]]
    run = f"{name}-{work['purpose']}-{work['lr']:g}".lower().replace(" ", "-").replace(",", "").replace(".", "")
    config = method_config(out, name, work["seed"], run, lr=work["lr"])
    shutil.rmtree(config.run, ignore_errors=True)
    # The answers of the SFT model, with which an evaluation compares.
    folder = Path(config.run) / "evaluation"
    shutil.copytree(folder.parent.parent / SEARCH / "evaluation", folder)
    evaluation = partial(make_evaluation, config, out / HELDOUT, folder)
    watch = Watch(work["budget"], evaluation, reading=READING * method.reference_batches)
    with suppress(Spent):
        run_stage(stage_named(method.stage), config, on_event=watch)
    return watch.summary()


def search(seed: int, out: Path) -> dict[str, Any]:
    """Return the figures of the SFT model, and of the best of several of its answers by the reward model."""
    config = method_config(out, "DPO", seed, SEARCH, lr=1.0)
    folder = Path(config.run) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    policy = load_pretrained(last_export(config.dpo.model.path, "language"), dtype="float32").params
    state = RunState(TrainState(policy, (), jnp.int32(0)), jax.random.key(0), jnp.int32(0), jnp.float32(0.0))
    start = make_evaluation(config, out / HELDOUT, folder)(state, 0)
    clock = time.process_time()
    best = best_of(config, folder.parent.parent, out / HELDOUT, seed)
    return {"sft": start, "best": best, "search_cpu_seconds": time.process_time() - clock}


def best_of(config: Config, base: Path, prompts: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return the figures of the best of each number of answers, as means over all choices of that many of those drawn;
    distinct-2 is that of the best of the first ones."""
    args = SampleConfig(
        model=config.dpo.model.path,
        prompts=str(prompts),
        samples=max(SIZES),
        seed=seed,
        sampling=config.dpo.sampling,
        batch_size=256,
        max_length=config.dpo.prompts.max_length,
        score=str(base / "reward"),
    )
    sampler, lexicon, rows = load_sampler(args), load_opinion_lexicon(), read_json_lines(prompts)
    by_prompt = scored_answers(args, args.rewards, sampler)
    scores = np.array([[answer.score for answer in answers] for answers in by_prompt])
    gold = np.array(
        [
            lexicon_scores([row["prompt"] + answer.text for answer in answers], lexicon)
            for row, answers in zip(rows, by_prompt, strict=True)
        ]
    )

    def figures(n: int) -> dict[str, float]:
        chosen = [max(answers[:n], key=lambda answer: answer.score).text for answers in by_prompt]
        return {
            "reward": float(np.mean([best_mean(of, n) for of in scores])),
            "gold": float(np.mean([best_mean(of, n, judged) for of, judged in zip(scores, gold, strict=True)])),
            "kl": best_of_n_kl(n),
            "distinct2": distinct_n([words(text) for text in chosen], n=2),
            "length": float(np.mean([len(ids) for ids in sampler.tokenizer(chosen)["input_ids"]])),
        }

    return {str(n): figures(n) for n in SIZES}


def main() -> None:
    work, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    # What the libraries print must not stand among the results.
    results, sys.stdout = sys.stdout, sys.stderr
    found = search(work["seed"], out) if work["method"] == BEST_OF else train(work, out)
    print(json.dumps(found), file=results)


if __name__ == "__main__":
    main()
