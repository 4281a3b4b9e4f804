"""All checks of a config's values, before a run touches any device or file. Imports no JAX."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from jrlhf.config.dpo_check import dpo_checks
from jrlhf.config.errors import LOGIN, ConfigError
from jrlhf.config.grpo import GRPOConfig
from jrlhf.config.grpo_check import grpo_checks
from jrlhf.config.methods import method_advice
from jrlhf.config.schema_check import (
    Check,
    distributed_checks,
    mesh_checks,
    run_folder_checks,
    sampling_checks,
    seed_check,
)
from jrlhf.config.stage import StageConfig
from jrlhf.config.stages import (
    Config,
    DPOConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    required_value,
    stage_section,
    stage_sections,
)
from jrlhf.config.stages_check import ppo_checks, reward_checks, sft_checks
from jrlhf.config.tools import (
    ExportConfig,
    GenerateConfig,
    QuickstartConfig,
    RankConfig,
    SampleConfig,
    ScoreConfig,
    ShowConfig,
    VerifyConfig,
)
from jrlhf.config.tools_check import sample_checks
from jrlhf.config.watch_check import safety_checks


def check(config: Any) -> None:
    """Raise ConfigError with one line for each value that is out of range or conflicts with another value."""
    checks = (*_login_checks(config), *_checks(config))
    problems = [f"{path}: must be {expected}, got {value!r}" for valid, path, value, expected in checks if not valid]
    if problems:
        raise ConfigError("\n".join(problems))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field that is not a section."""
    for field in fields(config):
        value = vars(config)[field.name]
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _login_checks(config: Any) -> Iterator[Check]:
    """Refuse passwords: a run writes its config into its folder, its checkpoints and its report."""
    for name, value in leaves(config):
        yield not LOGIN.search(str(value)), name, value, "without a user and password"


def _stage_checks(name: str, section: StageConfig) -> Iterator[Check]:
    match section:
        case SFTConfig():
            yield from sft_checks(name, section)
        case RewardConfig():
            yield from reward_checks(name, section)
        case DPOConfig():
            yield from dpo_checks(name, section)
        case PPOConfig():
            yield from ppo_checks(name, section)
        case GRPOConfig():
            yield from grpo_checks(name, section)
        case _:
            raise TypeError(f"{name}: {type(section).__name__} has no checks")


def _order_checks(config: Config) -> Iterator[Check]:
    sections = stage_sections()
    known = all(name in sections for name in config.stages)
    advice = "".join(f"; {text}" for text in map(method_advice, config.stages) if text)
    yield known, "stages", config.stages, f"some of {', '.join(sections)}{advice}"
    yield len({*config.stages}) == len(config.stages), "stages", config.stages, "different stages"
    for name in config.stages if known else ():
        path, value = f"{name}.{sections[name].required}", required_value(config, name)
        yield bool(value), path, value, f"set, because stages names {name}"


def _checks(config: Any) -> Iterator[Check]:
    match config:
        case Config():
            if isinstance(config, PlanConfig):
                yield config.completions >= 2, "completions", config.completions, "2 or more"
            yield from run_folder_checks("run", config.run)
            yield seed_check(config.seed)
            yield from mesh_checks("mesh", config.mesh)
            yield from distributed_checks("distributed", config.distributed)
            yield from _order_checks(config)
            yield from safety_checks("safety", config.safety)
            for name in stage_sections():
                yield from _stage_checks(name, stage_section(config, name))
        case QuickstartConfig():
            yield from run_folder_checks("out", config.out)
            yield seed_check(config.seed)
        case GenerateConfig():
            if isinstance(config, SampleConfig):
                yield from sample_checks(config)
            yield config.samples >= 1, "samples", config.samples, "1 or more"
            yield seed_check(config.seed)
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
            yield from sampling_checks("sampling", config.sampling)
            alone = "0, because batch_size is the number of answers that all devices decode at once"
            yield config.sampling.slots == 0, "sampling.slots", config.sampling.slots, alone
        case RankConfig():
            yield bool(config.tasks.strip()), "tasks", config.tasks, "a file"
            yield bool(config.host.strip()), "host", config.host, "an address"
            yield 0 <= config.port < 2**16, "port", config.port, "from 0 to 65535"
            modes = [bool(config.export), bool(config.import_from), config.report]
            yield sum(modes) <= 1, "report", config.report, "set alone: choose one of export, import_from and report"
            has_file = bool(config.export or config.import_from)
            yield (
                has_file or config.format == "ranking",
                "format",
                config.format,
                "set with export or import_from",
            )
        case ExportConfig():
            names = ["last", *stage_sections()]
            yield config.stage in names, "stage", config.stage, f"one of {', '.join(names)}"
        case ScoreConfig():
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case ShowConfig():
            yield config.rows >= 0, "rows", config.rows, "0 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case VerifyConfig():
            yield seed_check(config.seed)
            yield config.temperature > 0, "temperature", config.temperature, "above 0"
            yield config.max_new_tokens >= 1, "max_new_tokens", config.max_new_tokens, "1 or more"
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case _:
            return
