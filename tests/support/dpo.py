"""Small runs of the DPO stage."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DPOConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
)
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.dpo import run_dpo
from jrlhf.stages.dpo_reference import REFERENCE_FILE
from jrlhf.train.attempt import Event
from jrlhf.train.signals import Interrupted
from tests.support.runs import compare_runs
from tests.support.short_model import SHORT_MODEL

MODEL = ModelConfig(path=SHORT_MODEL)
LIKED, ENDS = "happy", (" and sad.", " and happy.", " and blue.")
"""People like the happy end, and find the others alike: a ranking of three with a tie, or of two."""


def write_rankings(path: Path, names: tuple[str, ...]) -> str:
    """Rows of three answers with a tie, of two answers, and of two with a margin."""
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"prompt": f"Once upon a time there was a {name}. It was big"}
        if i % 3 == 0:
            row |= {"completions": [*ENDS], "ranks": [1, 0, 1]}
        else:
            row |= {"chosen": ENDS[1], "rejected": ENDS[2 * (i % 2)]} | ({"margin": 0.5} if i % 3 == 2 else {})
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


NAMES = ("cat", "dog", "boy", "girl", "bird", "bear", "car", "tree", "ball", "fish", "frog", "house", "man", "cow",
         "pig", "king")  # fmt: skip


def config_of(folder: Path, run: str, **changes: Any) -> Config:
    """Four steps of eight rankings, a line after each, an evaluation after every second."""
    folder.mkdir(parents=True, exist_ok=True)
    data = DataConfig(
        train=write_rankings(folder / "train.jsonl", NAMES),
        eval=write_rankings(folder / "heldout.jsonl", ("horse", "rat", "duck")),
        max_length=64,
        buckets=1,
    )
    dpo = DPOConfig(
        model=MODEL,
        data=data,
        optim=OptimConfig(lr=1e-3, warmup=0.0),
        sampling=SamplingConfig(max_new_tokens=4),
        batch_size=8,
        epochs=2.0,
        log=LogConfig(every=1, eval_every=2, samples=2, progress=False, tensorboard=False),
        checkpoint=CheckpointConfig(every=1000, keep=3, keep_best=1),
    )
    return Config(run=str(folder / run), seed=3, dpo=replace(dpo, **changes))


def compare_interrupted(unbroken: Config, run: Path, *, has_reference: bool) -> None:
    """SIGINT in the second step: the same call goes on to the metrics and weights of the finished run ``unbroken``.

    The reference is read once.
    """
    config, folder = replace(unbroken, run=str(run)), run / "dpo"

    def interrupt(event: Event) -> None:
        if (event.kind, event.step) == ("step", 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step"):
        run_dpo(config, on_event=interrupt)
    assert not (folder / "summary.json").exists()
    reference = folder / REFERENCE_FILE
    assert reference.exists() == has_reference
    before = reference.stat().st_mtime_ns if has_reference else 0
    run_dpo(config)
    compare_runs(Path(unbroken.run) / "dpo", folder)
    if has_reference:
        assert reference.stat().st_mtime_ns == before


def lines_of(config: Config, name: str) -> list[dict[str, float]]:
    return [line for line in read_metrics(Path(config.run) / "dpo" / "metrics.jsonl") if name in line]
