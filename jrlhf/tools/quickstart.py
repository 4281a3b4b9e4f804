"""Runs all three stages on the shipped model and data, and scores them by an independent judge."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from rich.console import Console

from jrlhf import assets
from jrlhf.config import Config, Sources, load_config
from jrlhf.config.files import config_path
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

BAG_OF_WORDS_L2 = 3e-4
"""L2 penalty at which the baseline does best on 60,000 random pairs of the held-out sentences, in its favour."""


def run_quickstart(out: Path, seed: int, preset: Literal["full", "smoke"]) -> dict[str, Any]:
    """Run ``jrlhf pipeline`` on configs/quickstart/<preset>.yaml, then the judge; write summary.json and
    report.html."""
    show_all_characters()
    config = replace(load_config(config_path(f"quickstart/{preset}.yaml")), run=str(out), seed=seed)
    out = Path(config.run)
    summary = quickstart_summary(config, run_pipeline(config))
    write_json(out / "summary.json", summary)
    write_report(out, summary, STAGES)
    print_summary(Console(), summary, before_and_after(config), STAGES)
    return summary


def quickstart_summary(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of the quick start: each stage before and after, beside its baselines."""
    before, after = read_answers(config, 0), read_answers(config, config.ppo.iterations)
    gold = gold_scores(config)
    gold_before, gold_after = gold[0], gold[config.ppo.iterations]
    _, stderr = paired_difference(gold_before, gold_after)
    log = read_metrics(Path(config.run) / "ppo" / "metrics.jsonl")
    sft, reward, ppo = summary["sft"], summary["reward"], summary["ppo"]
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
        "ppo": {
            "reward_before": ppo["before"]["eval/score_mean"],
            "reward_after": ppo["after"]["eval/score_mean"],
            "gold_before": float(np.mean(gold_before)),
            "gold_after": float(np.mean(gold_after)),
            "gold_stderr": stderr,
            "kl": ppo["after"]["eval/kl"],
            "entropy_before": ppo["before"]["eval/entropy"],
            "entropy_after": ppo["after"]["eval/entropy"],
            "distinct2_before": distinct2(before),
            "distinct2_after": distinct2(after),
            "max_abs_logprob_diff": largest(log, "sampler/max_abs_logprob_diff"),
            "first_minibatch_max_abs_log_ratio": largest(log, "policy/first_minibatch_max_abs_log_ratio"),
        },
        "curves": {"ppo": {"eval/gold": [(step, float(np.mean(scores))) for step, scores in gold.items()]}},
        "seconds": summary["seconds"],
        "seed": summary["seed"],
        "hardware": summary["hardware"],
        "versions": summary["versions"],
    }


def gold_scores(config: Config) -> dict[int, Float[np.ndarray, "N"]]:
    """Return the lexicon's scores of the held-out answers of each PPO evaluation, by iteration."""
    lexicon = load_opinion_lexicon()
    steps = sorted(int(path.stem) for path in (Path(config.run) / "ppo" / "evals").glob("*.jsonl"))
    return {s: lexicon_scores([prompt_and_answer(row) for row in read_answers(config, s)], lexicon) for s in steps}


def prompt_and_answer(row: dict[str, Any]) -> str:
    return row["prompt"] + row["completion"]


def distinct2(rows: list[dict[str, Any]]) -> float:
    return distinct_n([words(row["completion"]) for row in rows], n=2)


def largest(log: Iterable[dict[str, Any]], name: str) -> float:
    return max(line[name] for line in log if name in line)


def read_answers(config: Config, iteration: int) -> list[dict[str, Any]]:
    """Read the held-out answers that PPO wrote after this iteration."""
    return read_json_lines(Path(config.run) / "ppo" / "evals" / f"{iteration:06d}.jsonl")


def read_rankings(sources: Sources) -> list[Ranking]:
    paths = [Path(assets.resolve(source)) for source in ([sources] if isinstance(sources, str) else sources)]
    return [(row["completions"], row["ranks"]) for path in paths for row in read_json_lines(path)]


def before_and_after(config: Config) -> list[dict[str, str]]:
    """Return the first three held-out prompts, each with the answers of the SFT model and of the policy."""
    pairs = zip(read_answers(config, 0)[:3], read_answers(config, config.ppo.iterations)[:3], strict=True)
    return [
        {"prompt": before["prompt"], "before": before["completion"], "after": after["completion"]}
        for before, after in pairs
    ]
