"""A run small enough for tests: the shipped model, a few dozen sentences, a handful of steps, on all eight devices."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest

from jrlhf import assets
from jrlhf.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    KLConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.train import start
from tests.support.chat_model import write_chat_model, write_chats
from tests.support.once import once
from tests.support.short_model import SHORT_MODEL


def first_rows(name: str, count: int, folder: Path) -> str:
    """The first rows of a shipped file, as a file of their own."""
    lines = Path(assets.resolve(f"asset:{name}")).read_text(encoding="utf-8").splitlines()[:count]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def small_config(folder: Path, run: str, *, save_every: int = 1000) -> Config:
    """Two SFT epochs of two steps, four reward steps, three PPO iterations.

    To save a state takes as long as several steps do: tests that read one of before the last step ask for it.
    """
    data = folder / "data"
    data.mkdir(exist_ok=True)

    def rows(train: str, train_rows: int, heldout: str) -> DataConfig:
        files = first_rows(train, train_rows, data), first_rows(heldout, 16, data)
        return DataConfig(train=files[0], eval=files[1], max_length=32, buckets=1)

    log = LogConfig(every=1, eval_every=2, samples=2, progress=False)
    checkpoint = CheckpointConfig(every=save_every, keep=3, keep_best=1)
    common = {"log": log, "checkpoint": checkpoint}
    prompts = rows("prompts_train", 16, "prompts_heldout")
    return Config(
        run=str(folder / run),
        seed=3,
        sft=SFTConfig(
            model=ModelConfig(path=SHORT_MODEL),
            data=rows("sft_train", 32, "sft_heldout"),
            optim=OptimConfig(lr=3e-3),
            epochs=2.0,
            batch_size=16,
            sampling=SamplingConfig(max_new_tokens=8),
            candidate_prompts=prompts.eval,
            candidates=2,
            **common,
        ),
        reward=RewardConfig(
            data=rows("rankings_train", 16, "rankings_heldout"),
            optim=OptimConfig(lr=1e-3),
            batch_size=8,
            epochs=2.0,
            **common,
        ),
        ppo=PPOConfig(
            prompts=replace(prompts, max_length=12),
            sampling=SamplingConfig(max_new_tokens=8, temperature=0.7),
            optim=OptimConfig(lr=1e-3, eps=1e-5),
            kl=KLConfig(coef=0.1, target=1.0, horizon=100),
            iterations=3,
            episodes=16,
            epochs=2,
            minibatches=2,
            ema_decay=0.9,
            ptx_coef=0.1,
            ptx=rows("sft_train", 32, "sft_heldout"),
            missing_eos_penalty=0.5,
            **common,
        ),
    )


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run on the first device alone: with a small model, the steps of eight mostly wait for each other."""
    monkeypatch.setattr(start, "make_mesh", partial(start.make_mesh, devices=jax.devices()[:1]))


def _finished_run(folder: Path) -> tuple[Config, dict]:
    config = small_config(folder, "whole", save_every=1)
    return config, run_pipeline(config)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict]:
    """A whole run, once; each process of the tests has a copy, which its tests read, ask for again and copy."""
    config, summary = once("finished", _finished_run)
    return _copy_of(config, tmp_path_factory), summary


def _copy_of(config: Config, folders: pytest.TempPathFactory) -> Config:
    """The config of a run, of which this process has a copy of its own."""
    return replace(config, run=str(shutil.copytree(config.run, folders.mktemp("run") / "whole")))


def _chat_base() -> Path:
    return once("chat-base", lambda folder: write_chat_model(folder / "base"))


@pytest.fixture(scope="session")
def chat_base() -> Path:
    """The tiny chat model in bfloat16, whose pad token is its EOS."""
    return _chat_base()


def _chat_run(folder: Path) -> Config:
    config = chat_config(_chat_base(), folder, epochs=40.0)
    run_pipeline(config)
    return config


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """All three stages on four questions, which the model learns to answer and to stop after; PPO with adapters."""
    return _copy_of(once("chat-run", _chat_run), tmp_path_factory)


def chat_config(base: Path, folder: Path, *, epochs: float) -> Config:
    """A run in ``folder`` whose SFT stage sees each of four questions and answers four times an epoch."""
    files = write_chats(folder / "data")
    small = small_config(folder, "whole")
    # A line a step waits for the step: eight devices on two cores would fall behind more of them than they can hold.
    log = replace(small.sft.log, every=1, eval_every=1000, samples=0, tensorboard=False)
    sampling = SamplingConfig(max_new_tokens=16)

    def data(kind: str) -> DataConfig:
        return DataConfig(train=files[kind], max_length=96, buckets=1)

    common = {"log": log, "checkpoint": CheckpointConfig(every=1000, keep=1, keep_best=0)}
    return Config(
        run=str(folder / "run"),
        seed=1,
        sft=SFTConfig(
            model=ModelConfig(path=str(base)),
            data=data("sft"),
            optim=OptimConfig(lr=5e-3),
            epochs=epochs,
            batch_size=16,
            sampling=sampling,
            **common,
        ),
        reward=RewardConfig(
            data=data("rankings"),
            optim=OptimConfig(lr=1e-3),
            batch_size=8,
            epochs=2.0,
            normalise=files["rankings"],
            **common,
        ),
        ppo=PPOConfig(
            prompts=data("prompts"),
            sampling=sampling,
            lora=LoRAConfig(rank=2),
            optim=OptimConfig(lr=1e-3, eps=1e-5),
            iterations=1,
            episodes=8,
            epochs=1,
            **common,
        ),
    )


@pytest.fixture(scope="session")
def rounded_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """All three stages of a bfloat16 base that export in its dtype."""
    return _copy_of(once("rounded-run", _rounded_run), tmp_path_factory)


def _rounded_run(folder: Path) -> Config:
    config = small_config(folder, "run")
    log = replace(config.sft.log, eval_every=100, samples=0, tensorboard=False)
    config = replace(
        config,
        sft=replace(
            config.sft,
            model=ModelConfig(path=str(_chat_base())),
            export_dtype="source",
            lora=LoRAConfig(rank=2),
            epochs=1.0,
            candidate_prompts="",
            log=log,
        ),
        reward=replace(config.reward, export_dtype="source", epochs=1.0, log=log),
        ppo=replace(config.ppo, export_dtype="source", iterations=1, epochs=1, minibatches=1, ptx_coef=0.0, log=log),
    )
    run_pipeline(config)
    return config


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def deterministic(line: dict[str, float]) -> dict[str, float]:
    measured = ("time", "seconds/", "share/", "perf/", "compile/")
    return {k: v for k, v in line.items() if not k.startswith(measured) and not k.endswith("_per_second")}


def compare_runs(a: Path, b: Path) -> None:
    """The same metrics and the same weights, to the bit."""
    first, second = (list(map(deterministic, read_metrics(folder / "metrics.jsonl"))) for folder in (a, b))
    assert first == second
    assert (a / "hf/model.safetensors").read_bytes() == (b / "hf/model.safetensors").read_bytes()
