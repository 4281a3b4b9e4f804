"""A tokenizer with a token more than the model has embeddings, in the stages and commands: an error before any step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import Config, DataConfig, LogConfig, ModelConfig, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from jrlhf.config.tools import GenerateConfig, SampleConfig, ScoreConfig, VerifyConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.data import DataError
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.tools.inference import run_generate, run_sample, run_score
from jrlhf.tools.verify import run_verify
from tests.support.folders import byte_tokenizer, gpt2_folder

LAST = "\u00ad"
"""Its second byte is the tokenizer's last token, which the models here have no embedding for."""
TOKENS = len(byte_tokenizer())
ERROR = (
    rf"jsonl:1: 'Ń' \(id {TOKENS - 1}\): beyond the model's embeddings \(its vocab_size is {TOKENS - 1}, the tokenizer "
    rf"has {TOKENS} tokens\); resize the embeddings"
)
SAMPLING = SamplingConfig(max_new_tokens=4)
LOG = LogConfig(progress=False, tensorboard=False, samples=0)


class Files:
    """Models and rows of the test by name."""

    def __init__(self, folder: Path) -> None:
        self.policy = gpt2_folder(folder / "policy", vocab_size=TOKENS - 1)
        self.whole = gpt2_folder(folder / "whole")
        self.reward = gpt2_folder(folder / "reward", reward=True, vocab_size=TOKENS - 1)
        self.rows = str(folder / "rows.jsonl")
        self.good = str(folder / "good.jsonl")
        for path, text in ((self.rows, LAST), (self.good, "a")):
            row = {"prompt": f"Once {text}", "chosen": "upon", "rejected": "bad"}
            Path(path).write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")

    def sft(self, train: str = "", safety: str = "", **changes: Any) -> Callable[[str], Any]:
        data = DataConfig(train=train or self.good, on_bad_row="skip")
        model = ModelConfig(path=self.policy)
        sft = SFTConfig(model=model, data=data, sampling=SAMPLING, batch_size=8, log=LOG, **changes)
        return lambda run: run_sft(Config(run=run, sft=sft, safety=SafetyConfig(prompts=safety)))

    def train_reward(self, train: str, normalise: str = "") -> Callable[[str], Any]:
        data, model = DataConfig(train=train, on_bad_row="skip"), ModelConfig(path=self.policy)
        reward = RewardConfig(model=model, data=data, batch_size=8, log=LOG, normalise=normalise)
        return lambda run: run_reward(Config(run=run, reward=reward))

    def ppo(self, policy: str, train: str, **changes: Any) -> Callable[[str], Any]:
        model, reward = ModelConfig(path=policy), ModelConfig(path=self.reward)
        prompts = DataConfig(train=train, on_bad_row="skip")
        ppo = PPOConfig(
            model=model, reward=reward, prompts=prompts, sampling=SAMPLING, episodes=8, log=LOG, iterations=1, **changes
        )
        return lambda run: run_ppo(Config(run=run, ppo=ppo))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("embeddings"))


DOORS: dict[str, Callable[[Files], Callable[[str], Any]]] = {
    "sft train": lambda f: f.sft(f.rows),
    "sft candidates": lambda f: f.sft(candidate_prompts=f.rows),
    "sft safety": lambda f: f.sft(safety=f.rows),
    "reward train": lambda f: f.train_reward(f.rows),
    "reward texts": lambda f: f.train_reward(f.good, normalise=f.rows),
    "ppo train": lambda f: f.ppo(f.policy, f.rows),
    "ppo ptx": lambda f: f.ppo(f.policy, f.good, ptx_coef=0.1, ptx=DataConfig(train=f.rows)),
    "generate": lambda f: lambda out: run_generate(GenerateConfig(f.policy, f.rows, out=out, sampling=SAMPLING)),
    "sample": lambda f: lambda out: run_sample(SampleConfig(f.policy, f.rows, out=out, sampling=SAMPLING)),
    "score": lambda f: lambda out: run_score(ScoreConfig(f.reward, f.rows, out=out)),
    "verify": lambda f: lambda out: run_verify(VerifyConfig(f.policy, f.rows, max_new_tokens=4)),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_row_that_uses_it_is_refused_at(door: str, files: Files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=ERROR):
        DOORS[door](files)(str(tmp_path / "out"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_reward_model_that_reads_the_text_is_held_to_its_own_embeddings(files: Files, tmp_path: Path) -> None:
    """The policy has them all, so the reward model reads texts: of a prompt that it cannot, no score is made up."""
    with pytest.raises(DataError, match=rf"^ppo\.reward: .* prompt: 'Ń' \(id {TOKENS - 1}\): beyond the"):
        files.ppo(files.whole, files.rows)(str(tmp_path / "out"))
