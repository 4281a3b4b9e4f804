"""Compares what algorithms make of one SFT model in equal CPU time of training, on the quick start's model and data.

    python benchmarks/algorithms.py --seeds 0 1 2 --budget 60 --out DIR --picture algorithms.png

A seed's SFT and reward model are trained once and shared by its methods. Each method trains, in a process of its own,
until it has spent its CPU time; with several --learning-rates, shorter runs first choose each method's by the reward.
Results stand in --out/results.jsonl, a line for each method and seed, and what is there does not run again. The table
goes to stdout.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from algorithm_methods import BEST_OF, HELDOUT, METHODS, base_flags, child_environment
from algorithm_page import draw, table
from common import run_once

from jrlhf import assets
from jrlhf.system.lines import json_line, read_json_lines, write_text

TUNING = 0.4
"""Budget of a run that tries a learning rate, as a fraction of the whole one."""


class Results:
    """The lines of results.jsonl, each with the work that it is the result of."""

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out / "results.jsonl"
        self.lines: list[dict[str, Any]] = read_json_lines(self._path) if self._path.is_file() else []

    def get(self, **work: Any) -> dict[str, Any]:
        """Return the result of a piece of work, from an earlier call or from a process of its own."""
        for line in self.lines:
            if line["work"] == work:
                return line
        print(json.dumps(work), file=sys.stderr, flush=True)
        command = [sys.executable, Path(__file__).parent / "algorithm_run.py", json.dumps(work), self._out]
        done = subprocess.run(command, env=child_environment(self._out), check=True, stdout=subprocess.PIPE, text=True)
        line = {"work": work} | json.loads(done.stdout.splitlines()[-1])
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_line(line))
        return line


def best_rate(results: Results, name: str, budget: float, *, factors: list[float], seed: int) -> float:
    """Return the factor on the quick start's learning rate at which a short run ends with the highest reward."""
    if len(factors) == 1:
        return factors[0]

    def reward(lr: float) -> float:
        work = {"method": name, "seed": seed, "lr": lr, "budget": TUNING * budget}
        return results.get(**work, purpose="learning rate")["points"][-1]["reward"]

    return max(factors, key=reward)


def train_base(out: Path, seed: int) -> None:
    """Train the SFT model and the reward model that all methods of a seed start from."""
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run_once(folder, "pipeline", *base_flags(folder, seed))


def run_all(args: argparse.Namespace, out: Path) -> Results:
    results, first = Results(out), args.seeds[0]
    for seed in args.seeds:
        train_base(out, seed)
        results.get(method=BEST_OF, seed=seed)
    tried = {"factors": args.learning_rates, "seed": first}
    rates = {name: best_rate(results, name, args.budget, **tried) for name in args.methods}
    for seed in args.seeds:
        for name in args.methods:
            results.get(method=name, seed=seed, lr=rates[name], budget=args.budget, purpose="run")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS, help="in the order of their runs")
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds of training of each method")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[1.0],
        help="factors on the quick start's learning rates; of several, each method gets its best one in short runs",
    )
    parser.add_argument("--prompts", type=int, default=256, help="number of held-out prompts that all methods answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, runs and results")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of gold over root KL (needs matplotlib)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prompts = read_json_lines(Path(assets.resolve("asset:prompts_heldout")))[: args.prompts]
    write_text(out / HELDOUT, "".join(map(json_line, prompts)))
    results = run_all(args, out)
    runs = [line for line in results.lines if line["work"].get("purpose", "run") == "run"]
    print(table(runs))
    if args.picture is not None:
        draw(args.picture, runs)


if __name__ == "__main__":
    main()
