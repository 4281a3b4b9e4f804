"""Measures how much of a slow rule's time overlaps with sampling and reading of answers.

    python benchmarks/rule_overlap.py --shape S --seconds 2 --iterations 8 --parts 1

It runs `jrlhf ppo` without a reward model. A Python function scores, and sleeps in every second iteration, like a
request to a server: `--seconds` for all answers, in equal shares for the `--parts` of the rollout. The figure is the
fraction of the rule's seconds that does not lengthen rollout and scoring: 1 if all are hidden, 0 if none.
"""

import importlib
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from common import Timing, arch_of, arguments, report
from peers.cases import OPTIMIZER
from peers.jrlhf_steps import ppo_config

from jrlhf.config import Config, LogConfig
from jrlhf.config.rewards import FunctionRuleConfig, RewardsConfig
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import run_ppo

naps = cycle([0.0])


def sleeps(completions: list[str], **_: Any) -> list[float]:
    """Score answers with the seconds of sleep."""
    nap = next(naps)
    time.sleep(nap)
    return [nap] * len(completions)


def main() -> None:
    args = arguments(__doc__, seconds=2.0, iterations=8, parts=1, episodes=32, prompt=64, new=64)
    # The stage imports this module by name, as a second copy beside __main__.
    importlib.import_module("rule_overlap").naps = cycle([0.0] * args.parts + [args.seconds / args.parts] * args.parts)
    spec = {"dtype": args.dtype, "rows": args.episodes, "prompt": args.prompt, "new": args.new, "optimizer": OPTIMIZER}
    with TemporaryDirectory() as folder:
        base = ppo_config(spec | {"value_from": "policy", "epochs": 1}, arch_of(args), Path(folder))
        rule = FunctionRuleConfig(weight=1.0, path="rule_overlap:sleeps")
        ppo = replace(
            base.ppo,
            rewards=RewardsConfig(model_weight=0.0, function=rule),
            iterations=args.iterations,
            rollout_parts=args.parts,
            log=LogConfig(every=1, eval_every=10**6, progress=False),
        )
        run_ppo(Config(run=base.run, ppo=ppo))
        lines = [line for line in read_metrics(Path(base.run) / "ppo" / "metrics.jsonl") if "seconds/scoring" in line]
    # The first two iterations compile.
    timed = [
        (line["reward/rule/function"] > 0, line["seconds/rollout"] + line["seconds/scoring"]) for line in lines[2:]
    ]
    alone, beside = ([seconds for slept, seconds in timed if slept is which] for which in (False, True))
    hidden = median(alone) + args.seconds - median(beside)
    first = lines[0]["seconds/rollout"] + lines[0]["seconds/scoring"]
    each = Timing(first, median(beside), min(beside), max(beside))
    report("hidden time of a rule", hidden / args.seconds, "of its seconds", each, args, without=median(alone))


if __name__ == "__main__":
    main()
