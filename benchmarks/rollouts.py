"""Compares rollouts with answers of ragged lengths: jrlhf's slots, vLLM, Hugging Face, Tunix and an earlier jrlhf.

    python benchmarks/rollouts.py --python vllm=VLLM/bin/python trl=TRL/bin/python tunix=TUNIX/bin/python \\
        --before CHECKOUT --out benchmarks/results/rollouts.md

The sides run in turn, as in compare.py. Lengths of answers are log-normal (sigma 0.7, a quarter of the limit in the
middle) and the same on all sides. The page also says how jrlhf's time and memory grow with the prompts.
"""

import sys
from contextlib import ExitStack
from itertools import product
from typing import Any

from compare import argument_parser, arguments, masked, measure, missing
from peers import page, rollout_page
from peers.cases import RAGGED_PPO, ROLLOUTS, Case, ragged_answers, spec
from peers.results import Result, SideResult
from peers.sides import Side, command, variables

GROWTH = (64, 128, 256, 512, 1024)


def main() -> None:
    parser = argument_parser(__doc__, works=[*ROLLOUTS, *RAGGED_PPO])
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH, help="numbers of prompts, in 64 slots")
    args = arguments(parser)
    run = page.Run(args.machine, masked(sys.argv, args.before), args.rounds, missing(args))
    results: list[Result] = []
    for case in map(Case._make, product(args.work, args.shape, args.dtype)):
        results.append(measure(case, args, []))
        print(rollout_page.case_table([results[-1]]), flush=True)
        rollout_page.write(args.out, run, results, {})
    grown = growth(args) if args.growth else {}
    rollout_page.write(args.out, run, results, grown)
    page.draw(args.out.with_suffix(".png"), results)


def growth(args: Any) -> dict[int, SideResult]:
    """jrlhf's rollouts of so many prompts, in turn."""
    told = spec(Case("rollout-64", args.shape[0], args.dtype[0]))
    found: dict[int, SideResult] = {}
    settings = variables("jrlhf", told["work"], args.env["jrlhf"])
    with ExitStack() as stack:
        sides: dict[int, Side] = {}
        for prompts in args.growth:
            more = told | ragged_answers(prompts, 1, told["prompt"], told["new"])
            side = Side(command("jrlhf", args.python["jrlhf"], more), settings)
            sides[prompts] = stack.enter_context(side)
            found[prompts] = SideResult(side.facts, "", [])
        for _ in range(args.rounds):
            for prompts, side in sides.items():
                found[prompts].lines.append(side.go(1))
    return found


if __name__ == "__main__":
    main()
