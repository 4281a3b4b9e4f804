"""A stage's folder: who may write there, what it was started with, and what is finished."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

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
    stage_section,
    stage_sections,
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
from jrlhf.system.lines import json_text, write_text


def stage_folder(config: Config, stage: str) -> Path:
    return Path(config.run) / stage


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a finished stage found, or None for one that is not finished; all processes see what the first one sees.

    ConfigError where it cannot be read.
    """
    path = folder / "summary.json"

    def read() -> dict[str, Any] | None:
        try:
            return {**json.loads(path.read_text("utf-8"))} if path.exists() else None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: damaged ({error!r}); remove it to go on from the newest checkpoint") from error

    return from_first("look for a summary", read)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed over. The first process writes."""
    if not is_first():
        return
    write_text(path, json_text(value, indent=2) + "\n")


def pass_gates(stage: str, gates: Sequence[str], figures: Mapping[str, float], folder: Path) -> None:
    """Judge what a stage would pass on, and write ``gates.json``; GatesFailed where it does not keep them all."""
    verdicts = judge(gates, figures)
    if verdicts:
        write_json(folder / "gates.json", {"gates": [verdict._asdict() for verdict in verdicts]})
    if not all(verdict.passed for verdict in verdicts):
        raise failure(stage, verdicts)


def model_source(config: Config, path: str, *, key: str, stage: str | None) -> str:
    """Where a model is read from: an asset, a stage's folder, a run's (its ``stage``), an HF folder or a hub id.

    An empty ``path`` is what ``stage`` of the same run exported; ``key`` is the config path to name in an error.
    """
    if path:
        return exported_folder(assets.resolve(path), stages=() if stage is None else (stage,))
    if stage is None:
        raise ConfigError(f"{key}: is empty; name a Hugging Face folder, a hub id or asset:stories260k")
    folder = stage_folder(config, stage) / "hf"
    if not folder.is_dir():
        raise ConfigError(f"{key}: is empty and {folder} does not exist; run the {stage} stage first or name a model")
    return str(folder)


def exported_folder(path: str, *, stages: tuple[str, ...] = ()) -> str:
    """The HF folder in a stage's folder, or of the first of ``stages`` that a run's folder has, or ``path`` itself."""
    for inside in (Path(path) / "hf", *(Path(path) / stage / "hf" for stage in stages)):
        if (inside / "config.json").exists():
            return str(inside)
    return path


FREE: dict[type, tuple[str, ...]] = {
    ModelConfig: ("remat", "attention"),
    DataConfig: ("buckets", "cache"),
    StageConfig: ("log", "checkpoint", "gates", "microbatch", "max_skipped"),
    RewardsConfig: ("timeout",),
    BannedRuleConfig: ("match_timeout",),
    RequiredRuleConfig: ("match_timeout",),
    RefusalRuleConfig: ("match_timeout",),
    EndpointRuleConfig: ("timeout", "retries", "batch_size"),
}
"""The fields of a section that may change on the way, as they decide no result: how much is done at a time, by which
kernel, how long something may take, what is logged, saved, cached, and asked of the model in the end."""


def without_free(section: Any) -> Any:
    """A section of a config, and those in it, with the default of every field in ``FREE``."""
    sections = {name: without_free(value) for name, value in vars(section).items() if is_dataclass(value)}
    defaults = vars(type(section)())
    free = (name for cls in type(section).__mro__ for name in FREE.get(cls, ()))
    return replace(section, **sections | {name: defaults[name] for name in free})


def comparable(config: Config, stage: str) -> Config:
    """Only what decides the result of ``stage``: not where and how it runs, see ``FREE``."""
    blank = {name: section() for name, section in stage_sections().items() if name != stage}
    outside = {"mesh": MeshConfig(), "distributed": DistributedConfig(), "safety": SafetyConfig()}
    own = {stage: without_free(stage_section(config, stage))}
    return replace(config, run="", accept_changes=False, **outside, **blank, **own)


def has_begun(folder: Path) -> bool:
    """Whether there is anything to go on from: a run that failed before its first checkpoint may start anew."""
    checkpoints = folder / "checkpoints"
    return (folder / "summary.json").exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def refuse_links_out(run: Path, *paths: Path) -> None:
    """ConfigError for a link at or below one of ``paths`` that leads out of ``run``: nothing is written outside it.

    The run's own folder may be a link, as to a bigger disk: that is its owner's choice.
    """
    home = run.resolve()
    for path in paths:
        inside = (Path(at, name) for at, folders, files in os.walk(path) for name in (*folders, *files))
        for link in (path, *inside):
            if link.is_symlink() and not link.resolve().is_relative_to(home):
                raise ConfigError(
                    f"{link}: a link out of the run, to {link.resolve()}; remove it, or choose another --run"
                )


@contextmanager
def open_stage(config: Config, stage: str) -> Iterator[Path]:
    """The stage's folder, locked, with the config inside; refused if it holds a run of another config.

    Of several processes the first one holds it, and all leave when what it wrote is whole.
    """
    folder = stage_folder(config, stage)
    same_everywhere("config", lambda: to_yaml(comparable(config, stage)))
    with ExitStack() as held:
        with first_goes_ahead(f"open {folder}"):
            if is_first():
                held.enter_context(_opened(config, stage, folder))
        yield folder
        with first_goes_ahead(f"finish {folder}"):
            pass


@contextmanager
def _opened(config: Config, stage: str, folder: Path) -> Iterator[None]:
    refuse_links_out(Path(config.run), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        saved = folder / "config.yaml"
        if saved.exists() and has_begun(folder):
            differences = diff_configs(comparable(load_config(saved), stage), comparable(config, stage))
            if differences:
                listed = "\n  ".join(differences)
                raise ConfigError(
                    f"{folder} holds a run with another config:\n  {listed}\n"
                    "choose another --run, or take the old values to go on with it"
                )
        else:
            write_text(saved, to_yaml(config))
        yield
