"""Runs SmolLM2-135M-Instruct through jrlhf's commands: it answers a question, becomes a reward model of human
preferences, and trains for one PPO iteration. Prints a JSON line, and a Markdown table for benchmarks/results/.

    python benchmarks/smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --tokenizer tokenizer.json \\
        --pairs hh-harmless.jsonl.gz --out /tmp/smollm2 > smollm2.jsonl

Commands that have finished in --out do not run again. Needs the package gguf.
"""

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import cpu_name, run_once
from gguf_llama import convert
from scipy.stats import binomtest
from tokenizers import Tokenizer

from jrlhf.data.errors import BadRow
from jrlhf.data.formats import parse_ranking
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.reward import pair_metrics
from jrlhf.stages.reward_figures import Ranking, bag_of_words_accuracy
from jrlhf.system.lines import json_line, read_json_lines, write_text
from jrlhf.tools.quickstart import BAG_OF_WORDS_L2

QUESTION, ANSWER = "What is the capital of France?", "Paris"
HELDOUT, NORMALISED = 200, 32
"""Numbers of pairs: the last ones are held out, and the first of the others normalise the reward."""
RECIPE = """\
run: {out}/run
seed: 0

reward:
  model: {{path: {out}/model}}
  lora: {{rank: 8, alpha: 16, targets: _proj}} # every linear map of attention and MLP
  data: {{train: {out}/data/train.jsonl, max_length: {max_length}, on_bad_row: skip}}
  normalise: {out}/data/normalise.jsonl
  optim: {{lr: 3e-4, schedule: linear, warmup: 0.1}}
  epochs: 1
  pack_length: {pack_length} # two answers of max_length, each with its prompt
  batch_size: 6
  microbatch: 1
  checkpoint: {{every: 10}}
  log: {{every: 1}}

ppo:
  model: {{path: {out}/model}}
  lora: {{rank: 8, alpha: 16, targets: _proj}}
  prompts: {{train: {out}/data/train.jsonl, eval: {out}/data/heldout.jsonl, max_length: {prompt_length}}}
  sampling: {{max_new_tokens: 32}}
  optim: {{lr: 1e-4}}
  iterations: 1
  episodes: 8
  epochs: 2
  minibatches: 2
  microbatch: 2
  log: {{eval_rows: 8}}
"""
ROWS = {
    "answer": ("base", "answer"),
    "held-out accuracy": ("reward", "accuracy"),
    "95 % interval (Wilson)": ("reward", "interval"),
    "bag of words, same pairs": ("reward", "bag_of_words_accuracy"),
    "longer wins": ("reward", "longer_wins_accuracy"),
    "expected calibration error": ("reward", "ece"),
    "held-out loss, nats per pair (chance: 0.693)": ("reward", "loss"),
    "training loss, first and last quarter": ("reward", "train_loss"),
    "training pairs; held-out pairs": ("reward", "pairs"),
    "updates": ("reward", "steps"),
    "pairs per second, median": ("reward", "pairs_per_second"),
    "PPO: reward before, after": ("ppo", "score"),
    "PPO: KL after, nats per answer": ("ppo", "kl"),
    "PPO: sampler and trainer, max abs log-prob difference": ("ppo", "max_abs_logprob_diff"),
    "PPO: first minibatch, max abs log ratio": ("ppo", "first_minibatch_max_abs_log_ratio"),
    "seconds: answer": ("seconds", "generate"),
    "seconds: reward stage": ("seconds", "reward"),
    "seconds: scores of the held-out answers": ("seconds", "score"),
    "seconds: PPO stage": ("seconds", "ppo"),
    "seconds: PPO rollout": ("seconds", "rollout"),
    "seconds: PPO scoring": ("seconds", "scoring"),
    "seconds: PPO update": ("seconds", "update"),
}


def split(pairs: Path, out: Path, *, train_pairs: int) -> None:
    """Split the rows that a reward model can learn from: the last ones are held out, the first of the others train."""
    with gzip.open(pairs, "rt", encoding="utf-8") if pairs.suffix == ".gz" else pairs.open(encoding="utf-8") as file:
        usable = [line for line in file if line.strip() and is_ranking(line)]
    train = usable[:-HELDOUT][:train_pairs]
    (out / "data").mkdir(exist_ok=True)
    for name, lines in {"train": train, "normalise": train[:NORMALISED], "heldout": usable[-HELDOUT:]}.items():
        (out / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def is_ranking(line: str) -> bool:
    try:
        parse_ranking(json.loads(line))
    except BadRow:
        return False
    return True


def rankings(path: Path) -> list[Ranking]:
    return [(row.completions, row.ranks) for row in map(parse_ranking, read_json_lines(path))]


def ask(out: Path) -> float:
    """Return the seconds of a greedy answer, which must be right, else the weights are wrong."""
    question = {"prompt": [{"role": "user", "content": QUESTION}]}
    write_text(out / "data/question.jsonl", json_line(question))
    files = ["--prompts", str(out / "data/question.jsonl"), "--out", str(out / "answer.jsonl")]
    greedy = ["--sampling.temperature", "0", "--sampling.max-new-tokens", "24"]
    spent = run_once(out, "generate", "--model", str(out / "model"), *files, *greedy)
    if ANSWER not in (answer := read_json_lines(out / "answer.jsonl")[0]["completions"][0]):
        sys.exit(f"{QUESTION} {answer}")
    return spent.seconds


def reward_figures(out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Compute the figures from the scores of the held-out answers, which come in pairs with the better one first."""
    summary = json.loads((out / "run/reward/summary.json").read_text(encoding="utf-8"))
    log = [line for line in read_metrics(out / "run/reward/metrics.jsonl") if "loss" in line]
    rows = read_json_lines(out / "scores.jsonl")
    scores = np.asarray([row["score"] for row in rows]).reshape(-1, 2)
    lengths = np.asarray([len(tokenizer.encode(row["completion"]).ids) for row in rows]).reshape(-1, 2)
    # Undo the gain, which only normalises the scores to a standard deviation of 1.
    figures = pair_metrics((scores[:, 0] - scores[:, 1]) / summary["gain"], lengths[:, 0] - lengths[:, 1])
    train, heldout = (rankings(out / f"data/{name}.jsonl") for name in ("train", "heldout"))
    interval = binomtest(round(figures["accuracy"] * len(scores)), len(scores)).proportion_ci(method="wilson")
    quarter = max(len(log) // 4, 1)
    return figures | {
        "interval": [interval.low, interval.high],
        "bag_of_words_accuracy": bag_of_words_accuracy(train, heldout, l2=BAG_OF_WORDS_L2),
        "train_loss": [statistics.mean(line["loss"] for line in part) for part in (log[:quarter], log[-quarter:])],
        "pairs": [summary["rows"], len(scores)],
        "steps": summary["steps"],
        "pairs_per_second": statistics.median(line["pairs_per_second"] for line in log),
        "seconds": summary["seconds"],
    }


def ppo_figures(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "run/ppo/summary.json").read_text(encoding="utf-8"))
    (line,) = (line for line in read_metrics(out / "run/ppo/metrics.jsonl") if "loss" in line)
    return {
        "score": [summary[when]["eval/score_mean"] for when in ("before", "after")],
        "kl": summary["after"]["eval/kl"],
        "max_abs_logprob_diff": line["sampler/max_abs_logprob_diff"],
        "first_minibatch_max_abs_log_ratio": line["policy/first_minibatch_max_abs_log_ratio"],
        "seconds": {"ppo": summary["seconds"]}
        | {name: line[f"seconds/{name}"] for name in ("rollout", "scoring", "update")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="weights, in any quantisation that gguf reads")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's tokenizer.json")
    parser.add_argument("--pairs", type=Path, required=True, help="preferences, JSONL; gzip if it ends in .gz")
    parser.add_argument("--train-pairs", type=int, default=1600, help="maximum number of pairs to train on")
    parser.add_argument("--max-length", type=int, default=256, help="maximum tokens of a prompt with an answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for all output")
    args = parser.parse_args()
    out = args.out.resolve()
    if not (out / "model/config.json").is_file():
        convert(args.gguf, args.tokenizer, out / "model")
    split(args.pairs, out, train_pairs=args.train_pairs)
    recipe = out / "recipe.yaml"
    lengths = {"max_length": args.max_length, "pack_length": 2 * args.max_length, "prompt_length": args.max_length - 32}
    recipe.write_text(RECIPE.format(out=out, **lengths), encoding="utf-8")
    seconds = {"generate": ask(out)}
    run_once(out, "reward", "--config", str(recipe))
    files = ["--data", str(out / "data/heldout.jsonl"), "--out", str(out / "scores.jsonl")]
    length = ["--max-length", str(args.max_length)]
    seconds["score"] = run_once(out, "score", "--model", str(out / "run"), *files, *length).seconds
    run_once(out, "ppo", "--config", str(recipe))
    reward, ppo = reward_figures(out, Tokenizer.from_file(str(args.tokenizer))), ppo_figures(out)
    seconds |= {"reward": reward.pop("seconds")} | ppo.pop("seconds")
    answer = read_json_lines(out / "answer.jsonl")[0]["completions"][0]
    figures = {"base": {"answer": answer}, "reward": reward, "ppo": ppo, "seconds": seconds}
    print(json.dumps(figures | {"cpu": cpu_name(), "jax": jax.__version__}))
    print("| | |\n| --- | ---: |", file=sys.stderr)
    for name, (part, key) in ROWS.items():
        print(f"| {name} | {shown(figures[part][key])} |", file=sys.stderr)


def shown(value: str | float | Sequence[float]) -> str:
    match value:
        case str():
            return value
        case int() | float():
            return f"{value:.4g}"
        case _:
            return ", ".join(f"{part:.4g}" for part in value)


if __name__ == "__main__":
    main()
