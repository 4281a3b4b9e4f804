"""The schema of a run, its checks, and its YAML. Imports no JAX."""

from jrlhf.config.check import check
from jrlhf.config.errors import ConfigError
from jrlhf.config.files import load_config, to_yaml
from jrlhf.config.grpo import GroupKLConfig, GRPOConfig
from jrlhf.config.rollout import CanaryConfig, KLConfig, RolloutConfig
from jrlhf.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    Sources,
    Switch,
)
from jrlhf.config.stage import StageConfig
from jrlhf.config.stages import (
    Config,
    DPOConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    pipeline_stages,
    required_value,
    stage_order,
    stage_section,
    stage_sections,
    stages_before,
    stages_of_kind,
)

__all__ = [
    "CanaryConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DPOConfig",
    "DataConfig",
    "DistributedConfig",
    "GRPOConfig",
    "GroupKLConfig",
    "KLConfig",
    "LoRAConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "PlanConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "SamplingConfig",
    "Sources",
    "StageConfig",
    "Switch",
    "check",
    "load_config",
    "pipeline_stages",
    "required_value",
    "stage_order",
    "stage_section",
    "stage_sections",
    "stages_before",
    "stages_of_kind",
    "to_yaml",
]
