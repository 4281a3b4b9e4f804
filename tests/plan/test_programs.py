"""What is planned is what runs: a plan lowers the very programs that a run of the same sizes compiles."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jrlhf.config import Config, DPOConfig, GRPOConfig, OptimConfig, PlanConfig
from jrlhf.plan.run import planned_target
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.stage import Stage
from jrlhf.stages.table import STAGES
from jrlhf.train.programs import Program
from tests.support.runs import small_config

LOCATION = re.compile(r"^#loc.*\n| loc\(.*\)$", flags=re.MULTILINE)
PROGRAMS = {
    "sft": {"start", "update", "evaluation"},
    "reward": {"start", "update", "evaluation"},
    "dpo": {"reference", "start", "update", "evaluation"},
    "ppo": {"start", "rollout", "readings", "scores", "update"},
    "grpo": {"start", "rollout", "readings", "scores", "update"},
}


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder into which JAX writes every program before it is compiled."""
    folder = tmp_path_factory.mktemp("programs")
    # JAX offers no way to read these two; both are off in the tests.
    jax.config.update("jax_dump_ir_to", str(folder))
    jax.config.update("jax_include_debug_info_in_dumps", False)
    yield folder
    jax.config.update("jax_dump_ir_to", None)
    jax.config.update("jax_include_debug_info_in_dumps", True)


@pytest.fixture(scope="module")
def run(dumped: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, set[str]]:
    """A run's config, and the text of every program that it compiled. No figure of the config depends on the data."""
    config = small_config(tmp_path_factory.mktemp("run"), "run")
    optim, rankings = OptimConfig(schedule="constant", warmup=0.0), str(config.reward.data.train)
    ranked = replace(config.reward.data, eval=rankings)
    quiet = replace(config.sft.log, samples=0)
    # Widths are multiples of 8.
    prompts = replace(config.ppo.prompts, max_length=16)
    config = replace(
        config,
        # The lengths of other prompts, and so the shapes of answers to them, are the data's.
        sft=replace(config.sft, optim=optim, microbatch=1, candidate_prompts="", log=quiet),
        reward=replace(config.reward, optim=optim, microbatch=1, data=ranked),
        dpo=DPOConfig(data=ranked, optim=optim, batch_size=8, microbatch=1, log=quiet),
        ppo=replace(config.ppo, optim=optim, prompts=prompts),
        grpo=GRPOConfig(
            prompts=prompts, sampling=config.ppo.sampling, optim=optim, samples=4, episodes=32, iterations=1, log=quiet
        ),
    )
    run_pipeline(config)
    return config, {text_of(path.read_text(encoding="utf-8")) for path in dumped.glob("*.mlir")}


def text_of(program: str) -> str:
    return LOCATION.sub("", program).strip()


def planned(stage: Stage, config: Config) -> dict[str, Program]:
    plan = PlanConfig(
        topology="cpu:8",
        completions=16,
        mesh=config.mesh,
        sft=config.sft,
        reward=config.reward,
        dpo=config.dpo,
        ppo=config.ppo,
        grpo=config.grpo,
    )
    sized = stage.plan(plan, planned_target(plan))
    return {program.name: program for program in sized.build(sized.rows).programs}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_plan_lowers_the_programs_of_the_run(stage: Stage, run: tuple[Config, set[str]]) -> None:
    config, texts = run
    programs = planned(stage, config)
    assert programs.keys() == PROGRAMS[stage.name]
    lowered = {name: text_of(program.jitted.lower(*program.args).as_text()) for name, program in programs.items()}
    assert [name for name, text in lowered.items() if text not in texts] == []
