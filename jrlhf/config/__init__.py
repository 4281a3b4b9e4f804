"""The schema of a run, its checks, and its YAML. Imports no JAX."""

from jrlhf.config.check import check
from jrlhf.config.errors import ConfigError
from jrlhf.config.files import load_config, to_yaml
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
from jrlhf.config.stages import (
    CanaryConfig,
    Config,
    KLConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    StageConfig,
    required_value,
    stage_section,
    stage_sections,
    stages_of_kind,
)

__all__ = [
    "CanaryConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
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
    "required_value",
    "stage_section",
    "stage_sections",
    "stages_of_kind",
    "to_yaml",
]
