"""Tests that signals stop a run in every phase: it runs PPO by the real command and sends signals.

    python benchmarks/signals.py [--signals 20] [--phases rollout save]

It prints one JSON line per phase. Processes get SIGTERM and SIGINT in turn, at a random moment of the phase in a random
iteration. A signal counts as stopped if the process saves its state and ends with 143 or 130; in the last iteration
nothing is left to stop, so it must end with 0 (``in_last_iteration``). It counts as exact if the run, restarted by the
same command until it ends, has the weights and the log of an uninterrupted run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from reliability import command, same, small_run, tell

from jrlhf.config import Config, to_yaml

PHASES = ("compile", "rollout", "scoring", "update", "evaluation", "save")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=20, help="number of signals in each phase")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-with-signal", default="", help="(internal: arguments of a child process)")
    args = parser.parse_args()
    if args.run_with_signal:
        sys.exit(run_with_signal(**json.loads(args.run_with_signal)))
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = with_frequent_evaluation(small_run(Path(folder), "reference"))
        if code := command(reference, "pipeline").wait():
            raise SystemExit(f"the uninterrupted run ended with {code}")
        for phase in args.phases:
            tell("signals_survived", phase=phase, **survived(phase, reference, args.signals))


def with_frequent_evaluation(config: Config) -> Config:
    return replace(config, ppo=replace(config.ppo, log=replace(config.ppo.log, eval_every=2)))


def survived(phase: str, reference: Config, signals: int) -> dict[str, Any]:
    """Run PPO on the models of the uninterrupted run, and interrupt it until all signals are used."""
    sent = stopped = last = runs = equal = 0
    seconds = []
    while sent < signals:
        runs, in_this_run = runs + 1, 0
        interrupted = replace(reference, run=f"{reference.run}-{phase}-{runs}")
        folder = Path(interrupted.run) / "ppo"
        folder.parent.mkdir()
        for stage in ("sft", "reward"):
            shutil.copytree(Path(reference.run) / stage, folder.parent / stage)
        while not (folder / "summary.json").exists():
            if sent == signals:
                if code := command(interrupted, "ppo").wait():
                    raise SystemExit(f"going on after {phase} ended with {code}")
                break
            number = (signal.SIGTERM, signal.SIGINT)[sent % 2]
            outcome = stop_once(interrupted, phase, number)
            if outcome is None:  # the run ended before the phase came again
                break
            code, after = outcome
            sent, in_this_run = sent + 1, in_this_run + 1
            # In the last iteration nothing is left to stop, so the run ends normally.
            over = (folder / "summary.json").exists()
            last += over
            ended_well = code == (0 if over else CODES[number])
            stopped += ended_well
            if not ended_well:
                tell("ended_otherwise", phase=phase, code=code, log=log_of_it(interrupted).read_text()[-2000:])
            seconds.append(after)
        equal += in_this_run * same("ppo", reference, interrupted)
    times = sorted(seconds)
    return {
        "signals": sent,
        "stopped": stopped,
        "in_last_iteration": last,
        "exact": equal,
        "runs": runs,
        "ends_after_seconds": [round(times[len(times) // 2], 2), round(times[-1], 2)],
    }


def log_of_it(config: Config) -> Path:
    """Return the log of the process with the latest signal."""
    return Path(config.run).with_suffix(".log")


def stop_once(config: Config, phase: str, number: int) -> tuple[int, float] | None:
    """Start a run and send a signal in a phase; return the exit code and the seconds from the signal to the end."""
    request = {"config": str(Path(config.run).with_suffix(".yaml")), "phase": phase, "number": int(number)}
    request["call"], request["share"] = random.randint(1, 1 if phase == "compile" else 3), random.random()
    command_line = [sys.executable, __file__, "--run-with-signal", json.dumps(request)]
    Path(request["config"]).write_text(to_yaml(config), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if phase == "compile":
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with log_of_it(config).open("w") as output:
        process = subprocess.Popen(command_line, stdout=output, stderr=output, env=environment)
        code = process.wait(timeout=600)
    ended = time.time()
    sent = [line for line in log_of_it(config).read_text().splitlines() if line.startswith("signal at ")]
    if not sent:
        if code:
            raise SystemExit(f"{phase}: ended with {code} before any signal\n{log_of_it(config).read_text()}")
        return None
    return code, ended - float(sent[0].split()[-1])


def run_with_signal(config: str, phase: str, number: int, call: int, share: float) -> int:
    """Run ``jrlhf ppo`` with a signal at ``share`` of the way through a phase, in its ``call``-th occurrence."""
    from jrlhf.cli import main as jrlhf
    from jrlhf.rollout import iteration as ppo_iteration
    from jrlhf.runs.checkpoints import Checkpoints
    from jrlhf.stages import ppo

    entered, last, sent = 0, 0.0, False

    def send() -> None:
        nonlocal sent
        if sent:
            return
        sent = True
        print(f"signal at {time.time()}", flush=True)
        os.kill(os.getpid(), number)

    @contextmanager
    def within() -> Iterator[None]:
        nonlocal entered, last
        entered += 1
        due = None
        if entered == call:
            # A save continues in the background after its call returns.
            due = threading.Timer(share * (0.3 if phase == "save" else last or 0.05), send)
            due.start()
        start = time.perf_counter()
        yield
        last = time.perf_counter() - start
        if due is not None and phase != "save" and due.is_alive():
            # The phase was shorter than the last time: send the signal now, before it ends.
            due.cancel()
            due.join()
            send()

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any, **named: Any) -> Any:
            with within():
                return function(*arguments, **named)

        return inside

    timed = ppo_iteration.timed

    @contextmanager
    def marked_phase(seconds: dict[str, Any], name: str) -> Iterator[Any]:
        # The first occurrence of all is the one that compiles.
        compiles = phase == "compile" and entered == 0
        if name == f"seconds/{phase}" or (name != "seconds/input" and compiles and random.random() < 0.5):
            with within(), timed(seconds, name) as wait:
                yield wait
        else:
            with timed(seconds, name) as wait:
                yield wait

    ppo_iteration.timed = marked_phase  # pyright: ignore
    if phase == "compile":
        last = 2.0
        random.seed(share)
    if phase == "evaluation":
        make_evaluator = ppo.make_evaluator
        ppo.make_evaluator = lambda *arguments: marked(make_evaluator(*arguments))
    if phase == "save":
        Checkpoints.save = marked(Checkpoints.save)
    return jrlhf(["ppo", "--config", config])


if __name__ == "__main__":
    main()
