"""Measures the reliability of runs: kills, bit flips, delay by saving, and time to resume.

It prints one JSON line per figure. It kills the real command `--kills` times in each stage, at random moments, and
restarts it until it ends. The run survives its kills if weights and log equal those of an uninterrupted run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jrlhf import assets
from jrlhf.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    to_yaml,
)
from jrlhf.runs.checkpoints import CheckpointError, Checkpoints
from jrlhf.runs.metrics import read_metrics

STAGES = ("sft", "reward", "ppo")
MEASURED = ("time", "seconds/", "share/", "perf/", "compile/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills in each stage")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-mib", type=int, default=0, help="only save a state of this many MiB, and measure its memory"
    )
    args = parser.parse_args()
    if args.save_mib:
        tell("save_memory", **save_memory(args.save_mib))
        return
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = small_run(Path(folder), "reference")
        start = time.perf_counter()
        if code := command(reference, "pipeline").wait():
            raise SystemExit(f"the uninterrupted run ended with {code}")
        tell("unbroken_run", seconds=round(time.perf_counter() - start, 1), stages=len(STAGES))
        interrupted = small_run(Path(folder), "interrupted")
        for stage in STAGES:
            tell("kills_survived", stage=stage, **survived(stage, reference, interrupted, kills=args.kills))
        tell("flips_found", **flips_found(Path(reference.run) / "sft" / "checkpoints", flips=args.flips))
        shares = [row["share/checkpoint"] for row in log_of(reference, "sft", every=True) if "share/checkpoint" in row]
        # A new process: the memory of the other figures would hide this one.
        subprocess.run([sys.executable, __file__, "--save-mib", "512"], check=True)
        tell("blocked_share", of="sft, a checkpoint every 5 steps", value=round(sum(shares) / max(len(shares), 1), 4))


def save_memory(mib: int) -> dict[str, Any]:
    """Measure the peak memory of a save relative to the state, and how long it blocks the caller (Linux)."""
    import jax

    rows = mib * 2**20 // (8 * 1024 * 4)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder), keep=1, keep_best=0, best_metric=None, best_mode="max") as checkpoints,
    ):
        checkpoints.save(0, {"w": jax.numpy.ones(8)}, metadata={}, metrics=None)
        checkpoints.wait()
        state = {f"w{i}": jax.random.normal(jax.random.key(i), (rows, 1024)) for i in range(8)}
        jax.block_until_ready(state)
        size, before = sum(leaf.nbytes for leaf in state.values()), resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        start = time.perf_counter()
        checkpoints.save(1, state, metadata={}, metrics=None)
        blocked = time.perf_counter() - start
        checkpoints.wait()
        total = time.perf_counter() - start
        over = (resident("VmHWM") - before) / size
    return {
        "state_mib": round(size / 2**20),
        "peak_over_state": round(1 + over, 2),
        "blocked_seconds": round(blocked, 3),
        "seconds": round(total, 2),
    }


def resident(name: str) -> int:
    """Return a memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def tell(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def small_run(folder: Path, name: str) -> Config:
    """Configure the shipped model on a few hundred rows; checkpoints every 5 steps, in PPO every iteration."""
    log = LogConfig(every=5, eval_every=10, eval_rows=16, samples=2, progress=False)

    def data(train: str, heldout: str) -> DataConfig:
        return DataConfig(train=f"asset:{train}", eval=f"asset:{heldout}", max_length=48, buckets=1)

    saves = CheckpointConfig(every=5, keep=2, keep_best=1)
    prompts = replace(data("prompts_train", "prompts_heldout"), max_length=16)
    return Config(
        run=str(folder / name),
        sft=SFTConfig(
            model=ModelConfig(path="asset:stories260k"),
            data=DataConfig(
                train=first_rows("sft_train", 960, folder), eval="asset:sft_heldout", max_length=48, buckets=1
            ),
            batch_size=16,
            log=log,
            checkpoint=saves,
        ),
        reward=RewardConfig(
            data=replace(data("rankings_train", "rankings_heldout"), train=first_rows("rankings_train", 480, folder)),
            batch_size=8,
            log=log,
            checkpoint=saves,
        ),
        ppo=PPOConfig(
            prompts=prompts, iterations=12, episodes=16, log=replace(log, every=1), checkpoint=replace(saves, every=1)
        ),
    )


def first_rows(name: str, count: int, folder: Path) -> str:
    lines = Path(assets.resolve(f"asset:{name}")).read_text(encoding="utf-8").splitlines()[:count]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def command(config: Config, stage: str) -> subprocess.Popen[bytes]:
    path = Path(config.run).with_suffix(".yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "jrlhf", stage, "--config", str(path)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def survived(stage: str, reference: Config, interrupted: Config, *, kills: int) -> dict[str, Any]:
    """Kill and restart a stage, then compare; if a run ends before all kills are used, another run begins."""
    spent, equal, runs, back = 0, 0, 0, []
    while spent < kills:
        in_this_run, folder = 0, Path(interrupted.run) / stage
        while not (folder / "summary.json").exists():
            known = len(log_of(interrupted, stage))
            start = time.perf_counter()
            process = command(interrupted, stage)
            # The range covers the start, the last steps and the export.
            limit = start + random.uniform(2.0, 14.0) if spent + in_this_run < kills else start + 600
            while process.poll() is None and time.perf_counter() < limit:
                time.sleep(0.02)
                if known and len(log_of(interrupted, stage)) > known:
                    back.append(time.perf_counter() - start)
                    known = 10**9
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                in_this_run += 1
            elif process.returncode:
                raise SystemExit(f"{stage} ended by itself, with {process.returncode}")
            process.wait()
        spent, runs = spent + in_this_run, runs + 1
        equal += in_this_run * same(stage, reference, interrupted)
        if spent < kills:
            folder.rename(folder.with_name(f"{stage}-{runs}"))
    times = sorted(back)
    return {
        "kills": spent,
        "survived": equal,
        "runs": runs,
        "back_at_a_new_line_seconds": round(times[len(times) // 2], 1) if times else None,
    }


def same(stage: str, a: Config, b: Config) -> bool:
    """Whether two runs have the same weights, byte for byte, and the same log except for measurements."""
    weights = [(Path(config.run) / stage / "hf" / "model.safetensors").read_bytes() for config in (a, b)]
    return weights[0] == weights[1] and log_of(a, stage) == log_of(b, stage)


def log_of(config: Config, stage: str, *, every: bool = False) -> list[dict[str, float]]:
    rows = read_metrics(Path(config.run) / stage / "metrics.jsonl")
    if every:
        return rows
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED) and "_per_second" not in k} for row in rows]


def flips_found(folder: Path, *, flips: int) -> dict[str, int]:
    """Count how many of ``flips`` single-bit changes in files of a checkpoint are detected, one at a time."""
    count = 0
    with Checkpoints(folder, keep=9, keep_best=0, best_metric=None, best_mode="min") as saved:
        step = saved.steps()[-1]
        files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
        for _ in range(flips):
            file = random.choice(files)
            content = file.read_bytes()
            at, bit = random.randrange(len(content)), 1 << random.randrange(8)
            file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            try:
                saved.check(step)
            except CheckpointError as error:
                count += file.name in str(error)
            file.write_bytes(content)
        saved.check(step)
    return {"flips": flips, "found": count, "files": len(files)}


if __name__ == "__main__":
    main()
