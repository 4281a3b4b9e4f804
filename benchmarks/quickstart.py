"""Runs the full quick start over several seeds. Prints a JSON line per seed, and a table for benchmarks/results/.

    python benchmarks/quickstart.py --seeds 0 1 2 --out /tmp/quickstart > quickstart.jsonl

A seed with a finished folder does not run again.
"""

import argparse
import json
import sys
from pathlib import Path

from common import cpu_name

from jrlhf.cli import main as jrlhf

ROWS = {
    "SFT: held-out nll, base": ("sft", "base_nll"),
    "SFT: held-out nll": ("sft", "heldout_nll"),
    "reward: held-out accuracy": ("reward", "heldout_accuracy"),
    "reward: bag-of-words accuracy": ("reward", "bag_of_words_accuracy"),
    "reward: longer-wins accuracy": ("reward", "longer_wins_accuracy"),
    "reward: expected calibration error": ("reward", "ece"),
    "PPO: reward before": ("ppo", "reward_before"),
    "PPO: reward": ("ppo", "reward_after"),
    "PPO: gold before": ("ppo", "gold_before"),
    "PPO: gold": ("ppo", "gold_after"),
    "PPO: standard error of the gain in gold": ("ppo", "gold_stderr"),
    "PPO: KL to the SFT policy, nats a sequence": ("ppo", "kl"),
    "PPO: distinct-2 before": ("ppo", "distinct2_before"),
    "PPO: distinct-2": ("ppo", "distinct2_after"),
    "PPO: sampler and trainer, max abs log-prob difference": ("ppo", "max_abs_logprob_diff"),
    "PPO: first minibatch, max abs log ratio": ("ppo", "first_minibatch_max_abs_log_ratio"),
    "seconds: SFT": ("seconds", "sft"),
    "seconds: reward": ("seconds", "reward"),
    "seconds: PPO": ("seconds", "ppo"),
    "seconds: everything": ("seconds", "total"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="full", choices=("full", "smoke"))
    parser.add_argument("--out", type=Path, required=True, help="folder for one folder per seed")
    args = parser.parse_args()
    summaries = []
    for seed in args.seeds:
        out = args.out / f"seed{seed}"
        code = jrlhf(["quickstart", "--out", str(out), "--seed", str(seed), "--preset", args.preset])
        if code:
            sys.exit(code)
        summaries.append(json.loads((out / "summary.json").read_text(encoding="utf-8")))
    for summary in summaries:
        print(json.dumps(summary | {"cpu": cpu_name()}))
    print("| |", " | ".join(f"seed {seed}" for seed in args.seeds), "|", file=sys.stderr)
    print("| --- |" + " ---: |" * len(args.seeds), file=sys.stderr)
    for name, (part, key) in ROWS.items():
        print(f"| {name} |", " | ".join(f"{s[part][key]:.4g}" for s in summaries), "|", file=sys.stderr)


if __name__ == "__main__":
    main()
