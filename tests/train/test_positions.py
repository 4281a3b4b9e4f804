"""A GPT-2 with 64 positions, and rows beyond them at every door: an error that names the setting, before any step."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import (
    CanaryConfig,
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    ModelConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.tools import GenerateConfig, SampleConfig, ScoreConfig, VerifyConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.plan import run_plan
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.tools.inference import run_generate, run_sample, run_score
from jrlhf.tools.verify import run_verify
from tests.support.folders import gpt2_folder
from tests.support.runs import read_jsonl

LONG = "Once upon a time there was a little girl. " * 4
SAMPLING = SamplingConfig(max_new_tokens=8)
LOG = LogConfig(progress=False, tensorboard=False, samples=0)


class Files:
    """Folders and files of the test: ``f.short_prompts`` and so on are paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy, self.reward = gpt2_folder(folder / "policy"), gpt2_folder(folder / "rm", reward=True)
        self.narrow = gpt2_folder(folder / "narrow", reward=True, positions=32)
        rows: dict[str, dict[str, Any]] = {
            "text": {"prompt": "Once", "completion": " upon a time"},
            "long_text": {"prompt": "Once", "completion": LONG},
            "long_headed": {"prompt": LONG[:60], "completion": " x"},
            "pairs": {"prompt": "Once", "chosen": " upon", "rejected": " bad"},
            "long_pairs": {"prompt": LONG, "chosen": " upon", "rejected": " bad"},
            "prompts": {"prompt": "Once"},
            "middle_prompts": {"prompt": LONG[:30]},
            "long_prompts": {"prompt": LONG[:60]},
        }
        for name, row in rows.items():
            (folder / name).with_suffix(".jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")

    def __getattr__(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("positions"))


def sft(files: Files, train: str = "", evaluation: str = "", **changes: Any) -> Callable[[str], Any]:
    data = DataConfig(train=train or files.text, eval=evaluation)
    safety = SafetyConfig(prompts=changes.pop("safety", ""))
    defaults = {"model": ModelConfig(path=files.policy), "data": data, "sampling": SAMPLING, "batch_size": 8}
    stage = SFTConfig(**{**defaults, "log": LOG, **changes})
    return lambda run: run_sft(Config(run=run, sft=stage, safety=safety))


def reward(files: Files, train: str = "", evaluation: str = "", normalise: str = "") -> Callable[[str], Any]:
    data = DataConfig(train=train or files.pairs, eval=evaluation)
    stage = RewardConfig(model=ModelConfig(path=files.policy), data=data, batch_size=8, log=LOG, normalise=normalise)
    return lambda run: run_reward(Config(run=run, reward=stage))


def ppo_config(files: Files, train: str = "", evaluation: str = "", **changes: Any) -> PPOConfig:
    return PPOConfig(
        **{
            "model": ModelConfig(path=files.policy),
            "reward": ModelConfig(path=files.reward),
            "prompts": DataConfig(train=train or files.prompts, eval=evaluation),
            "sampling": SAMPLING,
            "episodes": 8,
            "log": LOG,
            **changes,
        }
    )


def ppo(files: Files, *data: str, safety: str = "", **changes: Any) -> Callable[[str], Any]:
    stage = ppo_config(files, *data, **changes)
    return lambda run: run_ppo(Config(run=run, ppo=stage, safety=SafetyConfig(prompts=safety)))


def canary(files: Files) -> CanaryConfig:
    return CanaryConfig(action="warn", judge=ModelConfig(path=files.narrow))


DOORS: dict[str, tuple[Callable[[Files], Callable[[str], Any]], str]] = {
    "sft train": (
        lambda f: sft(f, f.long_text),
        r"sft\.data\.train: sequences of 173 tokens, but the model has 64 positions; set sft\.data\.max_length to 64",
    ),
    "sft heldout": (lambda f: sft(f, "", f.long_text), r"sft\.data\.eval: sequences of 173 tokens, .* 64 positions"),
    "sft candidates": (
        lambda f: sft(f, candidate_prompts=f.long_prompts),
        r"sft\.candidate_prompts: sequences of 60 tokens and answers of 8, but the model has 64 positions; set "
        r"sft\.data\.max_length to 56 or sft\.sampling\.max_new_tokens to 4, or less",
    ),
    "sft samples": (
        lambda f: sft(f, "", f.long_headed, log=replace(LOG, samples=2)),
        r"sft\.log\.samples \(of sft\.data\.eval\): sequences of 60 tokens and answers of 8, but",
    ),
    "sft safety": (lambda f: sft(f, safety=f.long_prompts), r"safety\.prompts: sequences of 60 .* 64 positions"),
    "reward train": (
        lambda f: reward(f, f.long_pairs),
        r"reward\.data\.train: sequences of 174 tokens, but the model has 64 positions; set reward\.data\.max_length",
    ),
    "reward heldout": (lambda f: reward(f, "", f.long_pairs), r"reward\.data\.eval: sequences of 174 tokens, "),
    "reward texts": (
        lambda f: reward(f, normalise=f.long_text),
        r"reward\.normalise: sequences of 173 tokens, but the model has 64 positions; set reward\.data\.max_length",
    ),
    "ppo train": (
        lambda f: ppo(f, f.long_prompts),
        r"ppo\.prompts\.train: sequences of 60 tokens and answers of 8, but ppo\.model has 64 positions; set "
        r"ppo\.prompts\.max_length to 56 or ppo\.sampling\.max_new_tokens to 4, or less",
    ),
    "ppo heldout": (lambda f: ppo(f, "", f.long_prompts), r"ppo\.prompts\.eval: sequences of 60 .* ppo\.model has 64"),
    "ppo ptx": (
        lambda f: ppo(f, ptx_coef=0.1, ptx=DataConfig(train=f.long_text)),
        r"ppo\.ptx\.train: sequences of 173 tokens, but the model has 64 positions; set ppo\.ptx\.max_length to 64",
    ),
    "ppo safety": (lambda f: ppo(f, safety=f.long_prompts), r"safety\.prompts: sequences of 60 .* ppo\.model has 64"),
    "ppo reward": (
        lambda f: ppo(f, f.middle_prompts, reward=ModelConfig(path=f.narrow), value_from="policy"),
        r"ppo\.prompts\.train: sequences of 30 tokens and answers of 8, but ppo\.reward has 32 positions",
    ),
    "ppo value": (
        lambda f: ppo(f, f.middle_prompts, reward=ModelConfig(path=f.narrow)),
        r"ppo\.prompts\.train: sequences of 30 tokens and answers of 8, but the value network has 32 positions",
    ),
    "ppo ensemble": (
        lambda f: ppo(f, f.middle_prompts, rewards=RewardsConfig(models=(f.narrow,))),
        r"ppo\.prompts\.train: sequences of 30 .* but ppo\.rewards\.models: .*narrow has 32 positions",
    ),
    "ppo judge": (
        lambda f: ppo(f, "", f.middle_prompts, canary=canary(f)),
        r"ppo\.prompts\.eval: sequences of 30 tokens and answers of 8, but ppo\.canary\.judge has 32 positions",
    ),
    "generate": (
        lambda f: lambda out: run_generate(GenerateConfig(f.policy, f.long_prompts, out=out, sampling=SAMPLING)),
        r"long_prompts\.jsonl: sequences of 60 tokens and answers of 8, but the model has 64 positions; set max_length "
        r"to 56 or sampling\.max_new_tokens to 4, or less",
    ),
    "sample": (
        lambda f: lambda out: run_sample(SampleConfig(f.policy, f.prompts, out=out)),
        r"prompts\.jsonl: sequences of 4 tokens and answers of 128, .*; set sampling\.max_new_tokens to 60, or less",
    ),
    "score": (
        lambda f: lambda out: run_score(ScoreConfig(f.reward, f.long_text, out=out)),
        r"long_text\.jsonl: sequences of 173 tokens, but the reward model has 64 positions; set max_length to 64, or l",
    ),
    "verify": (
        lambda f: lambda out: run_verify(VerifyConfig(f.policy, f.long_prompts, max_new_tokens=8)),
        r"long_prompts\.jsonl: sequences of 60 tokens and answers of 8, but the model has 64 positions; set max_length",
    ),
    "plan sft": (
        lambda f: lambda out: run_plan(PlanConfig(sft=SFTConfig(ModelConfig(f.policy), data=DataConfig(f.text)))),
        r"sft\.data\.max_length: sequences of 1024 tokens, but the model has 64 positions",
    ),
    "plan ppo": (
        lambda f: lambda out: run_plan(PlanConfig(ppo=planned(f, reward=ModelConfig(path=f.narrow)))),
        r"ppo\.prompts\.max_length: sequences of 30 tokens and answers of 8, but the value network has 32 positions",
    ),
    "plan ptx": (
        lambda f: lambda out: run_plan(PlanConfig(ppo=planned(f, ptx_coef=0.1, ptx=DataConfig(train=f.text)))),
        r"ppo\.ptx\.max_length: sequences of 1024 tokens, but the model has 64 positions",
    ),
}


def planned(files: Files, **changes: Any) -> PPOConfig:
    return ppo_config(files, prompts=DataConfig(train=files.prompts, max_length=30), **changes)


@pytest.mark.parametrize("door", DOORS)
def test_rows_beyond_the_positions_are_refused_at(door: str, files: Files, tmp_path: Path) -> None:
    make, error = DOORS[door]
    with pytest.raises(ConfigError, match=error):
        make(files)(str(tmp_path / "out"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_what_just_fits_is_read(files: Files, tmp_path: Path) -> None:
    """60 tokens and 4 more are 64; a row of 173 tokens is cut to 64."""
    sampling, out = SamplingConfig(max_new_tokens=4), str(tmp_path / "out.jsonl")
    run_generate(GenerateConfig(files.policy, files.long_prompts, out=out, sampling=sampling))
    assert len(read_jsonl(Path(out))) == 8
    run_score(ScoreConfig(files.reward, files.long_text, out=out, max_length=64))
    assert len(read_jsonl(Path(out))) == 8
