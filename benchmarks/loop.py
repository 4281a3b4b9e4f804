"""Measures the overhead of a stage's loop over its bare steps: input, logs, TensorBoard, checkpoints.

    python benchmarks/loop.py --shape S --steps 60 --every 20

It runs `jrlhf sft` in this process, and waits for and times every call of the jitted step. The overhead is the time
outside the calls, from the end of the first call (which compiles) to the end of the last.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
from common import Timing, arch_of, arguments, report, save_random_model
from peers.tokenizer import save_tokenizer, words

import jrlhf.stages.sft as sft_stage
from jrlhf.config import CheckpointConfig, Config, DataConfig, LogConfig, ModelConfig, SFTConfig


class Calls:
    """Records the start and the end of every call of a step."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def timed(self, step: Any) -> Any:
        def call(*inputs: Any) -> Any:
            start = time.perf_counter()
            output = jax.block_until_ready(step(*inputs))
            self.spans.append((start, time.perf_counter()))
            return output

        return call


def main() -> None:
    args = arguments(__doc__, batch=8, length=256, steps=60, every=20)
    calls = Calls()
    build = sft_stage.build_training

    def build_timed(*inputs: Any, **settings: Any) -> Any:
        training = build(*inputs, **settings)
        return training._replace(update=calls.timed(training.update))

    with TemporaryDirectory() as name, patch.object(sft_stage, "build_training", build_timed):
        folder, arch = Path(name), arch_of(args)
        save_random_model(folder / "model", arch)
        save_tokenizer(folder / "model", arch.vocab_size)
        rows = np.random.default_rng(0).integers(2, arch.vocab_size, (args.steps * args.batch, args.length - 1))
        text = "".join(json.dumps({"text": words(row)}) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        config = SFTConfig(
            model=ModelConfig(path=str(folder / "model"), dtype=args.dtype),
            data=DataConfig(train=str(folder / "rows.jsonl"), max_length=args.length, cache=str(folder / "cache")),
            checkpoint=CheckpointConfig(every=args.every),
            log=LogConfig(progress=False),
            batch_size=args.batch,
        )
        sft_stage.run_sft(Config(run=str(folder / "run"), sft=config))
        lines = (folder / "run" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [end - start for start, end in calls.spans[1:]]
    total = calls.spans[-1][1] - calls.spans[0][1]
    each = Timing(calls.spans[0][1] - calls.spans[0][0], float(np.median(steps)), min(steps), max(steps))
    shares = {name: [x for line in lines if (x := json.loads(line).get(f"share/{name}")) is not None] for name in PARTS}
    parts = {f"share_{name}": float(np.mean(values)) if values else 0.0 for name, values in shares.items()}
    report("loop over bare steps", (total - sum(steps)) / sum(steps), "of the bare steps' time", each, args, **parts)


PARTS = ("input", "checkpoint")

if __name__ == "__main__":
    main()
