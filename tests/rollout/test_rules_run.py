"""What PPO makes of a form that the SFT model gives few answers: 260,032 parameters, minutes on two cores."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jrlhf import assets
from jrlhf.config import (
    Config,
    DataConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SamplingConfig,
    SFTConfig,
    to_yaml,
)
from jrlhf.config.rewards import JSONRuleConfig, RequiredRuleConfig, RewardsConfig
from jrlhf.rules import same_number
from tests.support.runs import read_jsonl
from tests.support.short_model import SHORT_MODEL

ROWS = Path(__file__).parents[1] / "fixtures" / "gsm8k-short" / "rows.jsonl"
SHARE = 8
"""One row in so many of the SFT data has its answer in the form."""
SCHEMA = {
    "type": "object",
    "properties": {"review": {"type": "string", "minLength": 1}},
    "required": ["review"],
    "additionalProperties": False,
}


def write(rows: Iterable[dict[str, str]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def in_form_now_and_then(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """``completion`` in every eighth row is what ``formed`` says."""
    random.Random(0).shuffle(rows)
    return [
        {**row, "completion": row["formed"] if number % SHARE == 0 else row["completion"]}
        for number, row in enumerate(rows)
    ]


def config_of(
    folder: Path, rows: list[dict[str, str]], *, heldout: int, rewards: RewardsConfig, **sizes: Any
) -> Config:
    files = write(rows[heldout:], folder / "train.jsonl"), write(rows[:heldout], folder / "heldout.jsonl")
    log = LogConfig(every=1, eval_every=10, progress=False, tensorboard=False)

    def data(max_length: int, buckets: int) -> DataConfig:
        return DataConfig(train=files[0], eval=files[1], max_length=max_length, buckets=buckets, cache="")

    return Config(
        run=str(folder / "run"),
        sft=SFTConfig(
            model=ModelConfig(path=SHORT_MODEL),
            data=data(sizes["text"], 2),
            optim=OptimConfig(lr=3e-3, warmup=0.05),
            epochs=sizes["epochs"],
            batch_size=sizes["batch_size"],
            microbatch=8,
            log=LogConfig(every=100, eval_every=1000, samples=0, progress=False, tensorboard=False),
        ),
        ppo=PPOConfig(
            prompts=data(sizes["prompt"], 1),
            sampling=SamplingConfig(max_new_tokens=sizes["answer"]),
            optim=OptimConfig(lr=4e-4, warmup=0.02, schedule="linear", eps=1e-5),
            value_lr=1e-3,
            kl=KLConfig(coef=0.02, target=0.0),
            rewards=rewards,
            gates=sizes["gates"],
            iterations=sizes["iterations"],
            episodes=sizes["episodes"],
            minibatches=2,
            microbatch=8,
            log=log,
        ),
    )


def run(config: Config) -> dict[str, Any]:
    """By the command, on one device; its exit code would be 3 where a gate failed."""
    path = Path(config.run).with_suffix(".yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "jrlhf", "pipeline", "--config", str(path)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return json.loads((Path(config.run) / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_learns_to_answer_in_json(tmp_path: Path) -> None:
    """ "Answer in JSON: Reeks of": an object with a review and nothing else, as a JSON Schema says."""
    texts = [row["text"] for row in read_jsonl(Path(assets.resolve("asset:sft_train")))]
    rows = []
    for text in texts:
        words = text.split()
        if 5 <= len(words) <= 14:
            start, rest = " ".join(words[:3]), " ".join(words[3:])
            formed = json.dumps({"review": text}, ensure_ascii=False)
            rows.append({"prompt": f"Answer in JSON: {start}", "completion": f" {rest}", "formed": f" {formed}"})
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    config = config_of(
        tmp_path,
        in_form_now_and_then(rows),
        heldout=256,
        rewards=RewardsConfig(model_weight=0.0, json=JSONRuleConfig(weight=1.0, schema=str(schema))),
        gates=("rule/json > 0.9", "eos_fraction > 0.95"),
        text=96,
        prompt=32,
        answer=64,
        epochs=3.0,
        batch_size=32,
        episodes=96,
        iterations=50,
    )
    summary = run(config)["ppo"]
    assert summary["before"]["eval/rule/json"] < 0.2
    assert summary["after"]["eval/rule/json"] > 0.9
    # The rule again, by hand.
    evaluated = read_jsonl(Path(config.run) / "ppo" / "evals" / f"{summary['exported_step']:06d}.jsonl")
    right = 0
    for row in evaluated:
        try:
            answer = json.loads(row["completion"])
        except ValueError:
            continue
        right += isinstance(answer, dict) and list(answer) == ["review"] and bool(answer["review"])
    assert right / len(evaluated) == pytest.approx(summary["after"]["eval/rule/json"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_learns_the_form_of_gsm8k(tmp_path: Path) -> None:
    """Real problems; so small a model solves none of them, but ends with ``#### number``, where a checker reads it."""
    form = r"\n#### -?[\d,.]+\s*$"
    rows = []
    for row in read_jsonl(ROWS):
        formed = re.sub("<<.*?>>", "", row["answer"])
        assert re.search(form, formed)
        plain = formed.replace("\n#### ", "\nThe answer is ") + "."
        rows.append({"prompt": row["question"] + "\n", "completion": plain, "formed": formed})
    config = config_of(
        tmp_path,
        in_form_now_and_then(rows),
        heldout=64,
        rewards=RewardsConfig(model_weight=0.0, required=RequiredRuleConfig(weight=1.0, patterns=(form,))),
        gates=("rule/required > 0.9",),
        text=384,
        prompt=192,
        answer=112,
        epochs=10.0,  # after fewer no answer has the form, and there is nothing to learn from
        batch_size=16,
        episodes=64,
        iterations=20,
    )
    summary = run(config)["ppo"]
    assert summary["before"]["eval/rule/required"] < 0.2
    assert summary["after"]["eval/rule/required"] > 0.9
    evaluated = read_jsonl(Path(config.run) / "ppo" / "evals" / f"{summary['exported_step']:06d}.jsonl")
    ends = [row["completion"] for row in evaluated if re.search(form, row["completion"])]
    assert len(ends) / len(evaluated) == pytest.approx(summary["after"]["eval/rule/required"], abs=1e-6)
    assert all(same_number(answer, answer) == 1.0 for answer in ends), "each ends where the checker of answers reads"
