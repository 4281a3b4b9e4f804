"""Small runs of the GRPO stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jrlhf.config import Config, GRPOConfig, ModelConfig, OptimConfig
from jrlhf.config.rewards import RequiredRuleConfig, RewardsConfig
from tests.support.runs import small_config
from tests.support.short_model import SHORT_MODEL

MODEL = ModelConfig(path=SHORT_MODEL)
WORDS = RewardsConfig(model_weight=0.0, required=RequiredRuleConfig(weight=1.0, patterns=("the", "was", "and")))
"""The share of three words that an answer has."""


def config_of(folder: Path, run: str, **changes: Any) -> Config:
    """Three iterations of four answers to each of four prompts, of which two devices share one."""
    small = small_config(folder, run)
    grpo = GRPOConfig(
        model=MODEL,
        rewards=WORDS,
        prompts=small.ppo.prompts,
        sampling=small.ppo.sampling,
        optim=OptimConfig(lr=1e-3, eps=1e-5),
        iterations=3,
        episodes=16,
        samples=4,
        log=small.ppo.log,
        checkpoint=small.ppo.checkpoint,
    )
    return Config(run=small.run, seed=small.seed, grpo=replace(grpo, **changes))
