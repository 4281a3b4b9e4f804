"""Compiles jrlhf's programs for devices that are not there, and estimates their time from what the compiler says.

    python benchmarks/aot.py --list
    python benchmarks/aot.py --cases 'sft-1b-v5p' 'ppo-1b-v5p/rollout' --top 20
    python benchmarks/aot.py --peers maxtext --python maxtext/bin/python

The programs are those of ``jrlhf plan`` with the TPU's own compiler, or XLA's for CUDA, in the place of the CPU's. Each
is compiled in a process of its own, from shapes alone. It prints one JSON line per program: estimated milliseconds in
all, of work and of communication beside which no work is done; GB of a device's memory (arguments, temporaries and
new results); GB that a device sends; the fraction of the data sheet's FLOP/s (MFU). All of these are estimates by a
compiler and a data sheet, not measurements (see jrlhf/parallel/devices/estimate.py for the method): trust ratios.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from aot_cases import CASES, Case, planned_stage
from peers.aot_cases import PEER_CASES
from peers.compiled import say

from jrlhf.parallel.devices.compilers import PACKAGES, described_topology
from jrlhf.parallel.devices.estimate import Estimate, estimate
from jrlhf.parallel.devices.topology import parse_topology
from jrlhf.plan.programs import compile_program
from jrlhf.system.environment import TPU_COMPILER

FOLDER = Path(__file__).parent
SECONDS = 1800
"""Time after which a compilation is given up."""


class Job(NamedTuple):
    """A program to compile in a process of its own."""

    case: str
    program: str
    topology: str
    command: list[str]
    """``HLO``, the file for the optimised program, follows as the last argument."""


def main(flags: Sequence[str] | None = None) -> None:
    args = arguments(flags)
    if args.compile:
        compile_one(Case(**json.loads(args.compile)), args.program, args.hlo)
        return
    jobs = peer_jobs(args.peers, args.python) if args.peers else own_jobs()
    wanted = [job for job in jobs if any(matches(job, pattern) for pattern in args.cases)]
    if not wanted:
        sys.exit(f"no case matches {' '.join(args.cases)}; --list shows them")
    if args.list:
        for job in wanted:
            print(f"{job.case}/{job.program}", job.topology)
    else:
        show(wanted, args)


def arguments(flags: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the programs and compile none")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB", help="cases, or programs as CASE/PROGRAM")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="compilations at a time, of 1 to 4 GB each")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="show the N places that take the most time")
    parser.add_argument("--save-hlo", type=Path, metavar="DIR", help="keep the optimised programs, compressed")
    parser.add_argument("--peers", choices=("maxtext", "tunix"), help="compile another library's programs instead")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="interpreter that has the peer")
    for name in ("--compile", "--program", "--hlo"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)  # of a child process
    return parser.parse_args(flags)


def matches(job: Job, pattern: str) -> bool:
    return fnmatch(job.case, pattern) or fnmatch(f"{job.case}/{job.program}", pattern)


def own_jobs() -> list[Job]:
    """Return the programs of all cases."""
    return [
        Job(case.name, program, case.topology, [sys.executable, __file__, *child_flags(case, program)])
        for case in CASES
        for program in case.programs
    ]


def child_flags(case: Case, program: str) -> list[str]:
    return ["--compile", json.dumps(asdict(case)), "--program", program, "--hlo"]


def peer_jobs(peer: str, python: str) -> list[Job]:
    """Return the programs of a peer's cases."""
    command = [python, "-m", f"peers.{peer}_aot"]
    return [
        Job(case.name, case.program, case.topology, [*command, json.dumps(case.settings)]) for case in PEER_CASES[peer]
    ]


def show(jobs: list[Job], args: argparse.Namespace) -> None:
    """Compile the programs and print their lines as they come, and the places that take the most time to stderr."""
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(run, job, args) for job in jobs]):
            line, cost = done.result()
            print(json.dumps(line), flush=True)
            for seconds, kind, place in cost.places[: args.top] if cost else ():
                print(f"{1e3 * seconds:10.2f} ms {seconds / cost.seconds:6.1%}  {kind:25} {place}", file=sys.stderr)


def run(job: Job, args: argparse.Namespace) -> tuple[dict[str, Any], Estimate | None]:
    """Compile a program in a child process; return its line, and its estimate if it compiled."""
    name = {"case": job.case, "program": job.program}
    settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | TPU_COMPILER | settings
    with TemporaryDirectory() as folder:
        hlo = Path(folder) / "program.hlo"
        command: dict[str, Any] = {"args": [*job.command, str(hlo)], "env": environment, "cwd": FOLDER}
        try:
            child = subprocess.run(**command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return name | {"error": f"given up after {SECONDS} s"}, None
        if child.returncode:
            return name | {"error": error_of(child.stderr)}, None
        figures = json.loads(child.stdout.splitlines()[-1])
        text = hlo.read_text(encoding="utf-8")
    if args.save_hlo:
        args.save_hlo.mkdir(parents=True, exist_ok=True)
        with gzip.open(args.save_hlo / f"{job.case}-{job.program}.hlo.gz", "wt", encoding="utf-8") as out:
            out.write(text)
    cost = estimate(text, parse_topology(job.topology), trips=figures["trips"], loops=figures["loops"])
    return name | line_of(cost, figures, job.topology), cost


def error_of(text: str) -> str:
    """Return the first line of the last error in what a child says, else its last line."""
    errors = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", text, re.MULTILINE)
    return (errors or text.splitlines() or ["no message"])[-1][:1000]


def line_of(cost: Estimate, figures: dict[str, Any], topology: str) -> dict[str, Any]:
    """Return the figures of a program's line; ``figures`` are those of its child process."""
    chip = parse_topology(topology).chip
    assert chip is not None
    ideal = figures["flops"] / figures["devices"] / (chip.tflops * 1e12)
    return {
        "estimated_ms": round(1e3 * cost.seconds, 2),
        "work_ms": round(1e3 * cost.work, 2),
        "sync_ms": round(1e3 * cost.exposed, 2),
        "hbm_gb": round(figures["bytes"] / 1e9, 2),
        "sent_gb": round(sum(cost.sent.values()) / 1e9, 2),
        "mfu": round(ideal / cost.seconds, 3) if ideal else None,
        "compile_s": figures["compile_s"],
        "compiler": figures["compiler"],
    }


def compile_one(case: Case, program: str, hlo: str) -> None:
    """Compile one program, write its optimised HLO, and print its figures: the work of a child process."""
    topology = described_topology(parse_topology(case.topology))
    with TemporaryDirectory() as folder:
        [planned] = [p for p in planned_stage(case, topology, Path(folder)).programs if p.name == program]
    start = time.perf_counter()
    compiled = compile_program(planned, topology)
    say(
        compiled,
        hlo,
        devices=topology.size,
        seconds=time.perf_counter() - start,
        package=PACKAGES[topology.platform()],
        flops=planned.flops,
        trips=planned.trips,
        loops=planned.loops,
    )


if __name__ == "__main__":
    main()
