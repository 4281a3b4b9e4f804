"""Runs three stages on the shipped model and data, and scores them by an independent judge."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from jrlhf import assets
from jrlhf.config import Config, Sources, load_config
from jrlhf.config.files import config_path
from jrlhf.config.tools import QuickstartConfig
from jrlhf.report import print_summary, write_report
from jrlhf.rollout.diversity import distinct_n, words
from jrlhf.runs.folder import write_json
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.reward_figures import Ranking, bag_of_words_accuracy
from jrlhf.stages.table import STAGES
from jrlhf.system.lines import read_json_lines
from jrlhf.system.terminal import show_all_characters
from jrlhf.tools.quickstart_judge import lexicon_scores, load_opinion_lexicon, paired_difference

SAMPLER_FIGURES = {
    "max_abs_logprob_diff": "sampler/max_abs_logprob_diff",
    "first_minibatch_max_abs_log_ratio": "policy/first_minibatch_max_abs_log_ratio",
}
"""Figures of the summary that are maxima of a metric over a run."""

BAG_OF_WORDS_L2 = 3e-4
"""L2 penalty at which the baseline does best on 60,000 random pairs of the held-out sentences, in its favour."""


def run_quickstart(args: QuickstartConfig) -> dict[str, Any]:
    """Run ``jrlhf pipeline`` on configs/quickstart/<preset>.yaml, then the judge; write summary.json and
    report.html."""
    show_all_characters()
    config = load_config(config_path(f"quickstart/{args.preset}.yaml"))
    config = replace(config, run=args.out, seed=args.seed, stages=("sft", "reward", args.algorithm))
    out = Path(config.run)
    summary = quickstart_summary(config, run_pipeline(config))
    write_json(out / "summary.json", summary)
    write_report(out, summary, STAGES)
    print_summary(Console(), summary, before_and_after(out / args.algorithm), STAGES)
    return summary


def quickstart_summary(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of the quick start: each stage before and after, beside its baselines."""
    [*_, last] = config.stages
    folder = Path(config.run) / last
    gold = gold_scores(folder)
    sft, reward = summary["sft"], summary["reward"]
    return {
        "sft": {"base_nll": sft["base_nll"], "heldout_nll": sft["heldout_nll"]},
        "reward": {
            "heldout_accuracy": reward["accuracy"],
            "bag_of_words_accuracy": bag_of_words_accuracy(
                read_rankings(config.reward.data.train), read_rankings(config.reward.data.eval), l2=BAG_OF_WORDS_L2
            ),
            "longer_wins_accuracy": reward["longer_wins_accuracy"],
            "ece": reward["ece"],
        },
        last: policy_figures(folder, gold),
        "curves": {last: {"eval/gold": [(step, float(np.mean(scores))) for step, scores in gold.items()]}},
        "seconds": summary["seconds"],
        "seed": summary["seed"],
        "hardware": summary["hardware"],
        "versions": summary["versions"],
    }


def policy_figures(folder: Path, gold: dict[int, Float[np.ndarray, "N"]]) -> dict[str, Any]:
    """Return the figures of the last stage, from its log, its held-out answers and their gold scores."""
    log = list(read_metrics(folder / "metrics.jsonl"))
    [first, *_, last] = [line for line in log if "eval/score_mean" in line]
    before, after = min(gold), max(gold)
    _, stderr = paired_difference(gold[before], gold[after])
    # DPO samples nothing while it trains.
    sampler = {
        name: max(line[metric] for line in log if metric in line)
        for name, metric in SAMPLER_FIGURES.items()
        if any(metric in line for line in log)
    }
    return {
        "reward_before": first["eval/score_mean"],
        "reward_after": last["eval/score_mean"],
        "gold_before": float(np.mean(gold[before])),
        "gold_after": float(np.mean(gold[after])),
        "gold_stderr": stderr,
        "kl": last["eval/kl"],
        "entropy_before": first["eval/entropy"],
        "entropy_after": last["eval/entropy"],
        "distinct2_before": distinct2(read_answers(folder, before)),
        "distinct2_after": distinct2(read_answers(folder, after)),
    } | sampler


def gold_scores(folder: Path) -> dict[int, Float[np.ndarray, "N"]]:
    """Return the lexicon's scores of the held-out answers of each evaluation of a stage, by step."""
    lexicon = load_opinion_lexicon()
    steps = evaluated_steps(folder)
    return {s: lexicon_scores([prompt_and_answer(row) for row in read_answers(folder, s)], lexicon) for s in steps}


def evaluated_steps(folder: Path) -> list[int]:
    """Return the steps after which a stage wrote held-out answers, in order."""
    return sorted(int(path.stem) for path in (folder / "evals").glob("*.jsonl"))


def prompt_and_answer(row: dict[str, Any]) -> str:
    return row["prompt"] + row["completion"]


def distinct2(rows: list[dict[str, Any]]) -> float:
    return distinct_n([words(row["completion"]) for row in rows], n=2)


def read_answers(folder: Path, step: int) -> list[dict[str, Any]]:
    """Read the held-out answers that a stage wrote after this step."""
    return read_json_lines(folder / "evals" / f"{step:06d}.jsonl")


def read_rankings(sources: Sources) -> list[Ranking]:
    paths = [Path(assets.resolve(source)) for source in ([sources] if isinstance(sources, str) else sources)]
    return [(row["completions"], row["ranks"]) for path in paths for row in read_json_lines(path)]


def before_and_after(folder: Path) -> list[dict[str, str]]:
    """Return the first three held-out prompts, each with the answers of the SFT model and of the policy."""
    steps = evaluated_steps(folder)
    pairs = zip(read_answers(folder, steps[0])[:3], read_answers(folder, steps[-1])[:3], strict=True)
    return [
        {"prompt": before["prompt"], "before": before["completion"], "after": after["completion"]}
        for before, after in pairs
    ]
