"""The schema of a run, its checks, and its YAML. Imports no JAX."""

from jrlhf.config.check import check
from jrlhf.config.errors import ConfigError
from jrlhf.config.files import load_config, to_yaml
from jrlhf.config.schema import (
    CanaryConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    KLConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    Sources,
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
    "SFTConfig",
    "SamplingConfig",
    "Sources",
    "check",
    "load_config",
    "to_yaml",
]
