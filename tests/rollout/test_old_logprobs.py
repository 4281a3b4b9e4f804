"""PPO held against the log-probs that answers were drawn with, beside those that are read again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import Config, ConfigError, ModelConfig, PPOConfig, SamplingConfig, check
from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import run_ppo
from tests.support.runs import small_config


def first_lines(config: Config) -> list[dict[str, float]]:
    run_ppo(config)
    return [line for line in read_metrics(Path(config.run) / "ppo" / "metrics.jsonl") if "kl" in line]


def test_a_run_is_the_same_up_to_rounding_and_says_how_far_the_two_are_apart(tmp_path: Path) -> None:
    base = small_config(tmp_path, "run")
    rewards = RewardsConfig(model_weight=0.0, length=LengthRuleConfig(weight=1.0, min=3, max=5))
    model = replace(base.ppo.model, path="asset:stories260k")
    prompts = replace(base.ppo.prompts, eval="")
    ppo = replace(base.ppo, model=model, rewards=rewards, prompts=prompts, ptx_coef=0.0, iterations=2)
    read = first_lines(replace(base, run=str(tmp_path / "read"), ppo=ppo))
    taken = first_lines(replace(base, run=str(tmp_path / "taken"), ppo=replace(ppo, old_logprobs="sampler")))
    for again, own in zip(read, taken, strict=True):
        assert set(again) - set(own) == {"sampler/mean_ratio"}
        for name in ("loss", "loss/policy", "loss/value", "grad_norm", "reward/total", "policy/entropy", "kl"):
            assert own[name] == pytest.approx(again[name], rel=1e-3, abs=1e-4), name
        # -log p of what was drawn: an estimate of what is exact otherwise.
        assert own["entropy"] == pytest.approx(again["entropy"], rel=0.25)
        assert own["entropy"] != again["entropy"]
        apart = own["sampler/max_abs_logprob_diff"]
        assert apart == own["policy/first_minibatch_max_abs_log_ratio"]
        assert 0 < apart < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"value_from": "shared"},
        {"model": ModelConfig(dtype="bfloat16")},
        {"sampling": SamplingConfig(kv_cache="int8")},
    ],
)
def test_where_the_two_are_not_the_same_it_is_refused(changes: dict[str, Any]) -> None:
    ppo = PPOConfig(old_logprobs="sampler")
    check(Config(ppo=ppo))
    with pytest.raises(ConfigError, match=r"ppo\.old_logprobs: must be policy, unless"):
        check(Config(ppo=replace(ppo, **changes)))
