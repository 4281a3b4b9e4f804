"""PPO on rules: alone, and beside a reward model."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from jrlhf.config import Config, DataConfig, ModelConfig, PlanConfig, PPOConfig, SamplingConfig
from jrlhf.config_check import ConfigError, check
from jrlhf.config_rewards import JSONRuleConfig, LengthRuleConfig, RewardsConfig
from jrlhf.metrics import read_metrics
from jrlhf.rules import Episode
from jrlhf.stages.plan.ppo import ppo_stage
from jrlhf.stages.plan.run import planned_site
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.rules import Rule, start_rules

from .conftest import read_jsonl, small_config
from .test_pipeline import compare_runs

LENGTH = LengthRuleConfig(weight=2.0, min=3, max=5)
RULES = RewardsConfig(model_weight=0.0, json=JSONRuleConfig(weight=1.0), length=LENGTH)


def rules_only(folder: Path, run: str, rewards: RewardsConfig, **changes: Any) -> Config:
    config = small_config(folder, run)
    policy = replace(config.ppo.model, path="asset:stories260k")
    return replace(config, ppo=replace(config.ppo, model=policy, rewards=rewards, ptx_coef=0.0, **changes))


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on rules alone: no reward stage, no reward model."""
    config = rules_only(tmp_path_factory.mktemp("rules"), "run", RULES)
    run_ppo(config)
    return config


def test_rules_alone_make_a_run(ruled: Config) -> None:
    folder = Path(ruled.run) / "ppo"
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "kl" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["reward/score_mean"] == pytest.approx(line["reward/rule/json"] + 2 * line["reward/rule/length"])
        assert "reward/model" not in line
    assert lines[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-4)  # the critic begins with 0 everywhere
    answers = read_jsonl(folder / "evals" / "000003.jsonl")
    for row in answers:
        length = row["length"]
        assert row["rule/length"] == pytest.approx(min(length / 3, 1.0, 5 / length))
        assert row["score"] == pytest.approx(row["rule/json"] + 2 * row["rule/length"])
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert after["eval/rule/length"] == pytest.approx(sum(row["rule/length"] for row in answers) / len(answers))


def test_the_same_seed_gives_the_same_run(ruled: Config, tmp_path: Path) -> None:
    again = replace(ruled, run=str(tmp_path / "again"))
    run_ppo(again)
    compare_runs(Path(ruled.run) / "ppo", tmp_path / "again" / "ppo")


def test_a_rule_that_fails_or_hangs_is_named() -> None:
    episodes = [Episode({}, "a", 1, True)]

    def broken(episodes: Any) -> list[float]:
        raise KeyError("x")

    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.function: KeyError: 'x'"):
        start_rules([Rule("function", 1.0, broken)], episodes, timeout=60.0)()
    never = Event()
    slow = Rule("function", 1.0, lambda episodes: [float(never.wait())])
    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.function: not done in 0\.01 s"):
        start_rules([slow], episodes, timeout=0.01)()
    never.set()


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (RewardsConfig(model_weight=0.0), r"ppo\.rewards\.model_weight: must be above 0, as no rule"),
        (RewardsConfig(model_weight=-1.0), r"ppo\.rewards\.model_weight: must be 0"),
        (RewardsConfig(json=JSONRuleConfig(weight=-1.0)), r"ppo\.rewards\.json\.weight: must be 0"),
        (RewardsConfig(timeout=0.0), r"ppo\.rewards\.timeout: must be above 0"),
        (RewardsConfig(length=LengthRuleConfig(min=5, max=4)), r"ppo\.rewards\.length\.max: must be at least .*\(5\)"),
        (RewardsConfig(length=LengthRuleConfig(min=0)), r"ppo\.rewards\.length\.min: must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rewards: RewardsConfig, said: str) -> None:
    config = Config()
    with pytest.raises(ConfigError, match=said):
        check(replace(config, ppo=replace(config.ppo, rewards=rewards)))


def test_a_value_network_cannot_start_from_a_reward_model_that_is_not_there() -> None:
    config = Config()
    with pytest.raises(ConfigError, match=r"ppo\.value_from: must be auto or policy"):
        check(replace(config, ppo=replace(config.ppo, rewards=RULES, value_from="reward")))


def test_a_run_on_rules_can_be_planned() -> None:
    """There is no program for a reward model, nor are its weights held."""
    plan = PlanConfig(
        topology="cpu:8",
        ppo=PPOConfig(
            model=ModelConfig(path="asset:stories260k"),
            prompts=DataConfig(max_length=16),
            sampling=SamplingConfig(max_new_tokens=8),
            episodes=16,
            rewards=RULES,
        ),
    )
    sized = ppo_stage(plan, planned_site(plan))
    names = [program.name for program in sized.build(1).programs]
    assert "scores" not in names
    assert {"rollout", "experience", "update"} <= set(names)
