"""Compares jrlhf with its peers, each in its own environment: a table with ratios, a page and a picture.

    python benchmarks/compare.py --python trl=TRL/bin/python tunix=TUNIX/bin/python --out benchmarks/results/compare.md
    python benchmarks/compare.py --before CHECKOUT --out before.md    # what a change is worth

For each case, every side starts once, warms up, and then runs in turn while the others wait: A B C A B C. So a slower
spell of the machine affects all sides, and ratios compare times of the same round.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from common import SHAPES, cpu_name
from peers import page
from peers.cases import DTYPES, STEPS, WORKS, Case, spec, units
from peers.results import Peaks, Result, SideResult
from peers.sides import BENCHMARKS, MODULES, Side, SideEnded, command, shown, variables


def main() -> None:
    args = arguments(argument_parser(__doc__, works=list(STEPS)))
    run = page.Run(args.machine, masked(sys.argv, args.before), args.rounds, missing(args))
    results: list[Result] = []
    with ExitStack() as stack:
        peaks = list(open_peaks(args, stack))
        for case in map(Case._make, product(args.work, args.shape, args.dtype)):
            results.append(measure(case, args, peaks))
            print(page.case_table([results[-1]]), flush=True)
            # Write after each case, so that an interrupted run leaves its results.
            page.write(args.out, run, results)
    page.draw(args.out.with_suffix(".png"), results)


def argument_parser(description: str | None, *, works: list[str]) -> argparse.ArgumentParser:
    """The flags of every comparison of these works."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=works, choices=works)
    parser.add_argument("--shape", nargs="+", default=["S"], choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--python",
        type=of_side,
        nargs="+",
        default=[],
        metavar="SIDE=PATH",
        help=f"interpreters of {', '.join(MODULES)}",
    )
    parser.add_argument(
        "--env", type=of_side, nargs="+", default=[], metavar="SIDE=NAME=VALUE", help="variables for one side"
    )
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier commit of jrlhf, as one more side")
    parser.add_argument("--machine", default=cpu_name(), help="name of the machine on the page")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page to write; the picture goes beside it")
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; each side gets its interpreter and its variables."""
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib")
    args.python = {"jrlhf": sys.executable} | dict(args.python)
    if args.before:
        args.python = {"before": args.python["jrlhf"]} | args.python
    variables_of = [(side, *setting.partition("=")[::2]) for side, setting in args.env]
    args.env = {side: {name: value for owner, name, value in variables_of if owner == side} for side in MODULES}
    if args.before:
        args.env["before"] |= {"PYTHONPATH": str(args.before.absolute())}
    return args


def of_side(text: str) -> tuple[str, str]:
    """Parse ``SIDE=VALUE``."""
    side, _, value = text.partition("=")
    if side not in MODULES or not value:
        raise argparse.ArgumentTypeError(f"{text}: not SIDE=VALUE with a side of {', '.join(MODULES)}")
    return side, value


def masked(argv: list[str], before: Path | None) -> str:
    """Return the command without this machine's paths; an earlier checkout goes by its commit."""
    commit = before and subprocess.run(
        ["git", "-C", before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    argv = [word.replace(str(before), commit.stdout.strip()) for word in argv] if commit else argv
    items = [item.partition("=") for item in argv]
    words = [
        f"{side}=PYTHON" if side in MODULES and "=" not in value else side + sign + value for side, sign, value in items
    ]
    return shlex.join(["python", *words])


def missing(args: argparse.Namespace) -> list[str]:
    needed = {side for work in args.work for side in WORKS[work].sides}
    return [side for side in MODULES if side in needed - args.python.keys()]


def open_peaks(args: argparse.Namespace, stack: ExitStack) -> Iterator[Side]:
    """Open the processes that measure peaks of matrix products and copies, by XLA and by torch; the better one
    counts."""
    for side in ("jrlhf", "trl"):
        if side in args.python:
            peaks_spec = {"work": "peaks", "shape": "XS", "dtypes": args.dtype}
            yield stack.enter_context(
                Side(command(side, args.python[side], peaks_spec), variables(side, "", args.env[side]))
            )


def measure(case: Case, args: argparse.Namespace, peaks: list[Side]) -> Result:
    """Start every side of a case, then run the rounds."""
    outcomes: dict[str, SideResult] = {}
    failed: dict[str, str] = {}
    running: dict[str, Side] = {}
    limits: list[Peaks] = []
    with ExitStack() as stack:
        for name in ("before", *WORKS[case.work].sides):
            if name not in args.python:
                continue
            settings = variables(name, case.work, args.env[name])
            # Of an earlier commit its own side, but for rollouts, whose side knows the samplers of both.
            own = name == "before" and case.work in STEPS
            folder = args.before / "benchmarks" if own else BENCHMARKS
            try:
                running[name] = stack.enter_context(
                    Side(command(name, args.python[name], spec(case)), settings, folder)
                )
                outcomes[name] = SideResult(running[name].facts, shown(settings), [])
            except SideEnded as error:
                failed[name] = str(error)
        for _ in range(args.rounds):
            if peaks:
                limits.append(Peaks.best([side.go(1) for side in peaks], case.dtype))
            for name, side in list(running.items()):
                try:
                    outcomes[name].lines.append(side.go(WORKS[case.work].calls))
                except SideEnded as error:
                    failed[name] = str(error)
                    del running[name], outcomes[name]
    failed |= {name: wrong for name, side in outcomes.items() if (wrong := miscounted(case, side))}
    return Result(case, {name: side for name, side in outcomes.items() if name not in failed}, failed, limits)


def miscounted(case: Case, side: SideResult) -> str:
    """Return why a side did other work; empty if it did the same."""
    drawn = [line["tokens"] for line in side.lines if "tokens" in line]
    wrong = [tokens for tokens in drawn if tokens != units(case)]
    return f"{wrong[0]} tokens instead of {units(case)}" if wrong else ""


if __name__ == "__main__":
    main()
