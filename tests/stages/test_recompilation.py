"""Sequences of many different lengths: every program of a stage is compiled once a bucket, and no more."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jrlhf.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.parallel.compilation import COMPILE_EVENT
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.train.attempt import Event
from tests.support.short_model import SHORT_MODEL

MODEL = ModelConfig(path=SHORT_MODEL)
BUCKETS = 2
LENGTHS = [pytest.param(24, id="24"), pytest.param(500, id="500", marks=pytest.mark.slow)]
LOG = LogConfig(every=1, eval_every=1000, samples=0, progress=False, tensorboard=False)
ONCE = CheckpointConfig(every=1000)


@pytest.fixture
def compiled() -> Iterator[Counter[str]]:
    """How often each function was compiled, by its name."""
    names: Counter[str] = Counter()

    def note(event: str, duration_secs: float, **about: str | int) -> None:
        del duration_secs
        if event == COMPILE_EVENT:
            names[str(about["fun_name"])] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(train=str(path), max_length=512, buckets=BUCKETS, cache="")


def words(count: int) -> str:
    """About as many tokens."""
    return " a" * count


def check(folder: Path, compiled: Counter[str], *names: str) -> None:
    assert {name: compiled[f"jit({name})"] for name in names} == dict.fromkeys(names, BUCKETS)
    programs = [line["compile/programs"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert 0 < programs[-1] <= sum(compiled.values())
    # Long before the end every bucket has been seen.
    assert programs[-1] == programs[-2]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sft(lengths: int, tmp_path: Path, compiled: Counter[str]) -> None:
    live = list[int]()

    def count(event: Event) -> None:
        if event.kind == "step":
            live.append(len(jax.live_arrays()))

    data = write(tmp_path / "texts.jsonl", [{"text": words(1 + n)} for n in range(lengths)])
    sft = SFTConfig(MODEL, data=data, batch_size=8, epochs=2.0, log=LOG, checkpoint=ONCE)
    run_sft(Config(run=str(tmp_path / "run"), sft=sft), on_event=count)
    check(tmp_path / "run/sft", compiled, "update", "flops")
    # Memory is flat: the second epoch holds no more arrays than the first.
    assert len(live) == 2 * -(-lengths // 8)
    assert max(live[len(live) // 2 :]) <= max(live[: len(live) // 2])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_reward_model_and_ppo(lengths: int, tmp_path: Path, compiled: Counter[str]) -> None:
    rows = [{"chosen": words(1 + n), "rejected": words(1 + n) + " no"} for n in range(lengths)]
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for text in ("Once", "One day")])
    reward = RewardConfig(
        MODEL,
        data=write(tmp_path / "pairs.jsonl", rows),
        batch_size=8,
        epochs=2.0,
        normalise=str(texts.train),
        log=LOG,
        checkpoint=ONCE,
    )
    config = Config(run=str(tmp_path / "run"), reward=reward)
    run_reward(config)
    check(tmp_path / "run/reward", compiled, "update", "flops")

    compiled.clear()
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": words(1 + n)} for n in range(lengths)])
    ppo = PPOConfig(
        MODEL,
        # Held-out prompts of the same lengths: their answers are drawn by the programs of the rollouts.
        prompts=replace(prompts, eval=prompts.train),
        sampling=SamplingConfig(max_new_tokens=4),
        iterations=2 * lengths // 8,
        episodes=8,
        epochs=1,
        log=LOG,
        checkpoint=ONCE,
    )
    run_ppo(Config(run=config.run, reward=reward, ppo=ppo))
    check(tmp_path / "run/ppo", compiled, "generate", "read", "targets", "update", "work")
