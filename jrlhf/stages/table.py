"""The table of stages in the order of the pipeline; a new stage adds a line here and a section of ``Config``."""

from jrlhf.config import stage_sections
from jrlhf.stages.dpo import DPO
from jrlhf.stages.grpo import GRPO
from jrlhf.stages.ppo import PPO
from jrlhf.stages.reward import REWARD
from jrlhf.stages.sft import SFT
from jrlhf.stages.stage import Stage

STAGES: tuple[Stage, ...] = (
    SFT,
    REWARD,
    DPO,
    PPO,
    GRPO,
)

assert [stage.name for stage in STAGES] == [*stage_sections()], "the table of stages and the sections of Config differ"


def stage_named(name: str) -> Stage:
    """Return the stage with that name."""
    return next(stage for stage in STAGES if stage.name == name)
