"""Measures seconds from a command to its first step, with an empty and with a full cache of compiled programs.

    python benchmarks/startup.py --shape S

Each start is a new process, `jrlhf sft` on random weights and random words. `jrlhf --help` is timed too.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import Timing, arch_of, arguments, report, save_random_model
from peers.tokenizer import save_tokenizer, words

JRLHF = [sys.executable, "-m", "jrlhf"]


def main() -> None:
    args = arguments(__doc__, batch=8, length=256)
    with TemporaryDirectory() as name:
        folder, arch = Path(name), arch_of(args)
        save_random_model(folder / "model", arch)
        save_tokenizer(folder / "model", arch.vocab_size)
        rows = np.random.default_rng(0).integers(2, arch.vocab_size, (4 * args.batch, args.length - 1))
        text = "".join(json.dumps({"text": words(row)}) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        helps = [seconds_of([*JRLHF, "--help"]) for _ in range(args.repeats)]
        report("jrlhf --help", statistics.median(helps), "seconds", summary(helps), args)
        starts: dict[str, list[float]] = {"first": [], "second": []}
        for repeat in range(args.repeats):
            # A new cache for each pair of starts: the first start fills it for the second.
            for which, times in starts.items():
                run = folder / f"{which}{repeat}"
                times.append(to_first_step(sft_command(folder, run, args), run, folder / f"cache{repeat}"))
        for which, times in starts.items():
            report(f"{which} start to first step", statistics.median(times), "seconds", summary(times), args)


def summary(times: list[float]) -> Timing:
    return Timing(times[0], statistics.median(times), min(times), max(times))


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def sft_command(folder: Path, run: Path, args) -> list[str]:
    values = {
        "run": run,
        "sft.model.path": folder / "model",
        "sft.model.dtype": args.dtype,
        "sft.data.train": folder / "rows.jsonl",
        "sft.data.max_length": args.length,
        "sft.batch_size": args.batch,
        "sft.epochs": 1.0,
        "sft.log.every": 1,
        "sft.log.progress": "false",
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*JRLHF, "sft", *flags]


def to_first_step(command: list[str], run: Path, cache: Path, *, limit: float = 300.0) -> float:
    """Return the seconds until the log has a line with a loss, then end the process."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    log, start = run / "sft" / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen(command, env=environment | {"JRLHF_CACHE": str(cache)}) as process:
        try:
            while not (log.exists() and '"loss"' in log.read_text(encoding="utf-8")):
                if process.poll() not in (None, 0) or time.perf_counter() - start > limit:
                    raise SystemExit(f"no first step: {' '.join(command)} ended with {process.poll()}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()


if __name__ == "__main__":
    main()
