"""Trains SmolLM2-135M-Instruct by GRPO, with adapters and a rule, to write a sentence as JSON (benchmarks/people.py),
which it can seldom do at first. Prints a JSON line with the curve; ``--picture`` draws it.

    python benchmarks/smollm2_json.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --tokenizer tokenizer.json \\
        --out DIR --picture smollm2-json.png > smollm2-json.json

A run that was cut goes on. Needs the package gguf.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import jax
import people
from common import cpu_name, run_once
from gguf_llama import convert

from jrlhf.runs.metrics import read_metrics
from jrlhf.system.lines import json_line, read_json_lines, write_text

TRAIN, HELDOUT = 400, 96
"""Numbers of prompts."""
RECIPE = """\
run: {out}/run
seed: 0

grpo:
  model: {{path: {out}/model, dtype: {dtype}}}
  lora: {{rank: 16, alpha: 32, targets: _proj}} # every linear map of attention and MLP
  prompts: {{train: {out}/train.jsonl, eval: {out}/heldout.jsonl, max_length: 96, buckets: 1}}
  rewards: {{model_weight: 0, function: {{weight: 1, path: "people:reward"}}}}
  sampling: {{max_new_tokens: 48}}
  optim: {{lr: {lr}, warmup: 0.05}}
  kl: {{coef: 0}} # a rule cannot be fooled as a reward model can
  samples: 8
  episodes: 64
  iterations: {iterations}
  epochs: 2
  minibatches: 2
  microbatch: 16
  clip_high: 0.28
  aggregation: token
  checkpoint: {{every: 3}}
  log: {{eval_every: 3, tensorboard: false, progress: false}}
"""


def evaluations(folder: Path, heldout: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the figures of the held-out answers of each evaluation, by iteration."""
    return [
        {"iteration": int(path.stem)} | rates([row["completion"] for row in read_json_lines(path)], heldout)
        for path in sorted((folder / "evals").glob("*.jsonl"))
    ]


def rates(completions: list[str], facts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of answers that meet all demands of the rule, and the mean share of demands met."""
    met = [people.marks(completion, of) for completion, of in zip(completions, facts, strict=True)]
    return {"rate": statistics.mean(map(all, met)), "marks": statistics.mean(sum(each) / len(each) for each in met)}


def training(folder: Path) -> list[dict[str, float]]:
    """Return, for each iteration, the mean score of its answers, their length, and its seconds."""
    names = {"marks": "reward/score_mean", "length": "length/mean", "groups_without_difference": "groups/degenerate"}
    names |= {f"{part}_seconds": f"seconds/{part}" for part in ("rollout", "scoring", "update")}
    log = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    return [{name: round(line[metric], 3) for name, metric in names.items()} for line in log]


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Draw the held-out rate, and the marks of held-out and of training answers, over the iterations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = [point["iteration"] for point in figures["heldout"]]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    marks = [point["marks"] for point in figures["training"]]
    axes.plot(range(1, 1 + len(marks)), marks, color="#bbbbbb", label="share of demands met, training")
    axes.plot(steps, [p["marks"] for p in figures["heldout"]], "s--", color="#7570b3", label="the same, held out")
    axes.plot(steps, [p["rate"] for p in figures["heldout"]], "o-", color="#d95f02", label="all demands met, held out")
    axes.set(xlabel="iterations of 64 answers", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="weights, in any quantisation that gguf reads")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's tokenizer.json")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--out", type=Path, required=True, help="folder for all output")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of the curve (needs matplotlib)")
    args = parser.parse_args()
    out = args.out.resolve()
    if not (out / "model/config.json").is_file():
        convert(args.gguf, args.tokenizer, out / "model")
    write_text(out / "train.jsonl", "".join(map(json_line, people.rows(TRAIN, heldout=False, seed=0))))
    write_text(out / "heldout.jsonl", "".join(map(json_line, people.rows(HELDOUT, heldout=True, seed=1))))
    recipe = out / "recipe.yaml"
    settings = {"iterations": args.iterations, "lr": args.lr, "dtype": args.dtype}
    recipe.write_text(RECIPE.format(out=out, **settings), encoding="utf-8")
    # The rule is a module beside this file, and jrlhf looks for it in the current folder.
    spent = run_once(out, "grpo", "--config", str(recipe), cwd=Path(__file__).parent)
    folder = out / "run/grpo"
    figures = {
        "heldout": evaluations(folder, read_json_lines(out / "heldout.jsonl")),
        "training": training(folder),
    }
    about = {"cpu": cpu_name(), "python": platform.python_version(), "jax": jax.__version__}
    print(json.dumps(figures | spent._asdict() | settings | about))
    if args.picture is not None:
        draw(args.picture, figures)


if __name__ == "__main__":
    main()
