"""A value network that is a head on the policy: one forward pass for both."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from jrlhf.config import Config, DataConfig, LoRAConfig, ModelConfig, PlanConfig, PPOConfig, SamplingConfig
from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.plan.run import planned_target
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import plan_ppo, run_ppo
from jrlhf.train.programs import device_bytes
from tests.support.runs import compare_runs, small_config
from tests.support.short_model import SHORT_MODEL

RULES = RewardsConfig(model_weight=0.0, length=LengthRuleConfig(weight=2.0, min=3, max=5))


@pytest.fixture(params=[0, 2], ids=["whole", "lora"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    config = small_config(tmp_path, "run")
    ppo = replace(
        config.ppo,
        model=ModelConfig(path=SHORT_MODEL),
        rewards=RULES,
        ptx_coef=0.0,
        value_from="shared",
        lora=LoRAConfig(rank=request.param),
        iterations=2,
    )
    return replace(config, ppo=ppo)


def test_a_run_trains_policy_and_head(run: Config, tmp_path: Path) -> None:
    summary = run_ppo(run)
    folder = Path(run.run) / "ppo"
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "kl" in line]
    assert len(lines) == 2
    assert lines[0]["policy/first_minibatch_max_abs_log_ratio"] < 5e-5
    # A head of zeros calls all worth nothing at first, and no longer once it was trained.
    assert lines[0]["loss/value"] > 0.0
    assert abs(lines[0]["value/explained_variance"]) < 1e-5
    assert lines[1]["value/explained_variance"] != pytest.approx(0.0, abs=1e-6)
    assert summary["after"]["eval/kl"] > 0.0
    again = replace(run, run=str(tmp_path / "again"))
    run_ppo(again)
    compare_runs(folder, tmp_path / "again" / "ppo")


def test_it_is_planned_with_one_network() -> None:
    def trained(value_from: Literal["shared", "policy"]) -> tuple[float, float]:
        plan = PlanConfig(
            topology="cpu:8",
            ppo=PPOConfig(
                model=ModelConfig(path=SHORT_MODEL),
                prompts=DataConfig(max_length=16),
                sampling=SamplingConfig(max_new_tokens=8),
                episodes=16,
                rewards=RULES,
                value_from=value_from,
            ),
        )
        stage = plan_ppo(plan, planned_target(plan)).build(1)
        figures = {program.name: program.flops for program in stage.programs}
        return device_bytes(stage.held["trained"]), figures["update"]

    (shared, less), (apart, more) = trained("shared"), trained("policy")
    assert shared < 0.6 * apart
    assert less < 0.65 * more
