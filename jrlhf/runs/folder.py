"""A stage's folder: its lock, its config, its summary, and its exported model."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jrlhf import assets
from jrlhf.config import (
    Config,
    ConfigError,
    DataConfig,
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    StageConfig,
    load_config,
    required_value,
    stage_order,
    stage_section,
    stage_sections,
    stages_of_kind,
    to_yaml,
)
from jrlhf.config.files import diff_configs
from jrlhf.config.gates import failure, judge
from jrlhf.config.rewards import (
    BannedRuleConfig,
    EndpointRuleConfig,
    RefusalRuleConfig,
    RequiredRuleConfig,
    RewardsConfig,
)
from jrlhf.config.watch import SafetyConfig
from jrlhf.parallel import is_first
from jrlhf.parallel.hosts import first_goes_ahead, from_first, same_everywhere
from jrlhf.runs.lock import run_lock
from jrlhf.system.errors import reason_of
from jrlhf.system.lines import json_text, write_text
from jrlhf.system.suggest import either


def stage_folder(config: Config, stage: str) -> Path:
    """Return the folder of a stage, ``<run>/<stage>``."""
    return Path(config.run) / stage


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished stage, or None; all processes get what the first one reads.

    Raises ConfigError if the summary cannot be read.
    """
    path = folder / "summary.json"

    def read() -> dict[str, Any] | None:
        try:
            return {**json.loads(path.read_text("utf-8"))} if path.exists() else None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: damaged ({reason_of(error)}); remove it to resume from the newest checkpoint"
            ) from error

    return from_first("look for a summary", read)


def plain_floats(value: Any) -> Any:
    """Return a summary with each NumPy float in it as the shortest decimal that its own dtype reads as this value.

    A setting that the state of a run holds in float32 then reads as it was set: 0.04, not 0.03999999910593033.
    """
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, Mapping):
        return {name: plain_floats(inner) for name, inner in value.items()}
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; only the first process writes."""
    if not is_first():
        return
    write_text(path, json_text(value, indent=2) + "\n")


def pass_gates(stage: str, gates: Sequence[str], figures: Mapping[str, float], folder: Path) -> None:
    """Check a stage's figures against its gates and write ``gates.json``; raise GatesFailed if one fails."""
    verdicts = judge(gates, figures)
    if verdicts:
        write_json(folder / "gates.json", {"gates": [verdict._asdict() for verdict in verdicts]})
    if not all(verdict.passed for verdict in verdicts):
        raise failure(stage, verdicts)


def model_source(config: Config, path: str, *, key: str, before: Sequence[str], otherwise: str = "") -> str:
    """Return the folder or hub id of a model from an asset, a stage's folder, a run's folder, an HF folder or a hub id.

    ``before`` are the stages whose exports may be meant, in order of preference. In a run's folder the first that
    exported a model counts. An empty ``path`` means the first that is a part of this run or has exported a model.
    Errors name the config field ``key``; ``otherwise`` is what to do where no model is needed.
    """
    if path:
        return exported_folder(assets.resolve(path), stages=before)
    if not before:
        raise ConfigError(f"{key}: is empty; name a Hugging Face folder, a hub id or asset:stories260k")
    folders = {stage: stage_folder(config, stage) / "hf" for stage in before}
    in_run = (stage for stage in before if required_value(config, stage) or folders[stage].is_dir())
    stage = next(in_run, "")
    if not stage and config.stages:
        order = f"no stage before it in stages ({', '.join(config.stages)}) has such a model"
        raise ConfigError(f"{key}: is empty, and {order}; name a model or another order{otherwise}")
    stage = stage or before[-1]
    folder = folders[stage]
    if not folder.is_dir():
        advice = f"run the {stage} stage first or name a model{otherwise}"
        raise ConfigError(f"{key}: is empty, and {folder} does not exist; {advice}")
    return str(folder)


def exported_folder(path: str, *, stages: Sequence[str] = ()) -> str:
    """Return the HF folder in a stage's folder or in a run's first folder of ``stages``; otherwise ``path`` itself.

    Raise ConfigError for a stage that has exported no model yet, and for a run none of whose ``stages`` has.
    """
    folder = Path(path)
    for inside in (folder / "hf", *(folder / stage / "hf" for stage in stages)):
        if (inside / "config.json").exists():
            return str(inside)
    if (folder / "config.json").exists():
        return path
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{path}: this stage has not exported a model yet; start it again to finish it")
    if begun := [name for name in stage_sections() if (folder / name / "config.yaml").exists()]:
        missing = f"no exported model of {either(stages)}" if stages else "more than one model; name a stage's folder"
        raise ConfigError(f"{path}: this run has {missing}; its stages: {', '.join(begun)}")
    return path


def last_export(path: str, *kinds: Literal["language", "reward"]) -> str:
    """Return the HF folder of the last stage of a run that exported a model of the first kind that there is.

    ``path`` may also be a stage's folder; anything else is returned as it is.
    """
    order = run_order(Path(path))
    return exported_folder(path, stages=[name for kind in kinds for name in stages_of_kind(order, kind)])


def run_order(run: Path) -> tuple[str, ...]:
    """Return all stages in the order of a run, as the config of its newest stage has it."""
    configs = [file for name in stage_sections() if (file := run / name / "config.yaml").exists()]
    newest = max(configs, key=lambda file: file.stat().st_mtime, default=None)
    return stage_order(Config() if newest is None else load_config(newest))


NEUTRAL_FIELDS: dict[type, tuple[str, ...]] = {
    ModelConfig: ("remat", "attention"),
    DataConfig: ("buckets", "cache"),
    StageConfig: ("log", "checkpoint", "gates", "microbatch", "max_skipped"),
    RewardsConfig: ("timeout",),
    BannedRuleConfig: ("match_timeout",),
    RequiredRuleConfig: ("match_timeout",),
    RefusalRuleConfig: ("match_timeout",),
    EndpointRuleConfig: ("timeout", "retries", "batch_size"),
}
"""Fields of each config section that may change when a run resumes, because they do not affect its result.

They set batch sizes and kernels, timeouts, logging, checkpoints, caches and gates.
"""


def without_neutral_fields(section: Any) -> Any:
    """Return a config section, with its subsections, in which all fields of ``NEUTRAL_FIELDS`` have their defaults."""
    sections = {name: without_neutral_fields(value) for name, value in vars(section).items() if is_dataclass(value)}
    defaults = vars(type(section)())
    free = [name for cls in type(section).__mro__ for name in NEUTRAL_FIELDS.get(cls, ())]
    if isinstance(section, ModelConfig) and not (section.dtype == "float32" and section.weights == "bfloat16"):
        # Elsewhere the dtype of frozen weights changes no result.
        free.append("weights")
    return replace(section, **sections | {name: defaults[name] for name in free})


def comparable(config: Config, stage: str) -> Config:
    """Return a config with only the fields that decide the result of ``stage``; see ``NEUTRAL_FIELDS``."""
    blank = {name: section() for name, section in stage_sections().items() if name != stage}
    outside = {"mesh": MeshConfig(), "distributed": DistributedConfig(), "safety": SafetyConfig()}
    own = {stage: without_neutral_fields(stage_section(config, stage))}
    return replace(config, run="", stages=(), accept_changes=False, **outside, **blank, **own)


def has_begun(folder: Path) -> bool:
    """Tell whether a stage has a summary or a checkpoint; a run that failed before its first one may start over."""
    checkpoints = folder / "checkpoints"
    return (folder / "summary.json").exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def refuse_links_out(run: Path, *paths: Path) -> None:
    """Raise ConfigError for a link at or below ``paths`` that leads out of ``run``, so that nothing is written there.

    The run's own folder may be a link, for example to a larger disk.
    """
    home = run.resolve()
    for path in paths:
        inside = (Path(at, name) for at, folders, files in os.walk(path) for name in (*folders, *files))
        for link in (path, *inside):
            if link.is_symlink() and not link.resolve().is_relative_to(home):
                raise ConfigError(
                    f"{link}: is a link out of the run, to {link.resolve()}; remove it, or choose another --run"
                )


@contextmanager
def open_stage(config: Config, stage: str) -> Iterator[Path]:
    """Lock the stage's folder and write the config there; raise ConfigError if it has a run with another config.

    Of several processes the first one holds the lock, and all leave the block together after its last write.
    """
    folder = stage_folder(config, stage)
    same_everywhere("config", lambda: to_yaml(comparable(config, stage)))
    with ExitStack() as stack:
        with first_goes_ahead(f"open {folder}"):
            if is_first():
                stack.enter_context(_locked_folder(config, stage, folder))
        yield folder
        with first_goes_ahead(f"finish {folder}"):
            pass


@contextmanager
def _locked_folder(config: Config, stage: str, folder: Path) -> Iterator[None]:
    refuse_links_out(Path(config.run), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        saved = folder / "config.yaml"
        if saved.exists() and has_begun(folder):
            differences = diff_configs(comparable(load_config(saved), stage), comparable(config, stage))
            if differences:
                lines = "\n  ".join(differences)
                raise ConfigError(
                    f"{folder} holds a run with another config:\n  {lines}\n"
                    "choose another --run, or use the old values to resume it"
                )
        else:
            write_text(saved, to_yaml(config))
        yield
