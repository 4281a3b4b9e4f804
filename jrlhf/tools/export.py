"""Exports a checkpoint as a Hugging Face folder."""

from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, LoRAConfig, load_config, to_yaml
from jrlhf.config.tools import ExportConfig
from jrlhf.core import combine
from jrlhf.data import load_tokenizer
from jrlhf.models import (
    Pretrained,
    RewardModel,
    WeightDtype,
    load_pretrained,
    load_reward_model,
    load_reward_start,
)
from jrlhf.models.hf.folder_files import copy_files
from jrlhf.parallel import make_mesh
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.exports import RUN_CONFIG, companions, from_metadata, write_export
from jrlhf.runs.folder import StageName, model_source, read_summary
from jrlhf.runs.origin_check import check_base
from jrlhf.stages.inputs import stage_inputs
from jrlhf.train.lora import trainable
from jrlhf.train.state import abstract
from jrlhf.types import Params

FURTHEST: tuple[StageName, ...] = ("ppo", "reward", "sft")


def run_export(args: ExportConfig) -> None:
    """Write the model of a finished stage, or that of a checkpoint, to ``args.out``.

    The scores of a reward model from a checkpoint are not normalised: normalisation happens once, after training.
    """
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: {out} is not empty")
    folder, stage = _stage_of(args)
    # The run's folder may have moved, so its other stages are beside this one.
    config = replace(load_config(folder / "config.yaml"), run=str(folder.parent))
    if args.step == -1 and (folder / "hf" / "config.json").is_file():
        _export_finished(config, stage, folder, out, args)
        return
    with Checkpoints(folder / "checkpoints", keep=1, keep_best=0, best_metric=None, best_mode="min") as checkpoints:
        step = checkpoints.latest_step() if args.step == -1 else args.step
        if step is None or not (checkpoints.folder / str(step)).is_dir():
            raise ConfigError(f"step: {checkpoints.folder} has no checkpoint{f' {step}' if step else ''}")
        checkpoints.check(step)
        _export_step(config, stage, checkpoints, step, out, args)


def _stage_of(args: ExportConfig) -> tuple[Path, StageName]:
    run = Path(args.run)
    for stage in FURTHEST:
        if args.stage in (stage, "last"):
            if (run / stage / "checkpoints").is_dir():
                return run / stage, stage
            if run.name == stage and (run / "checkpoints").is_dir():
                return run, stage
    stage_name = "stage" if args.stage == "last" else f"{args.stage} stage"
    raise ConfigError(f"run: {run} has no {stage_name} with a checkpoint")


def _export_finished(config: Config, stage: StageName, folder: Path, out: Path, args: ExportConfig) -> None:
    """Copy what the stage exported; for other dtypes, write its exported weights again."""
    summary = read_summary(folder)
    # Before the option existed, a stage exported the dtypes of its source.
    own = None if summary is None else summary.get("export_dtype", "source")
    dtype = _dtype(config, stage, args)
    if args.dtype == "stage" or dtype == own:
        copy_files(folder / "hf", out)
        return
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    start, finished = _start(config, stage, mesh), folder / "hf"
    if isinstance(start, RewardModel):
        model = load_reward_model(finished, dtype="float32", mesh=mesh)
        start = replace(start, gain=model.gain, bias=model.bias)
    else:
        model = load_pretrained(finished, dtype="float32", mesh=mesh)
    about = finished / RUN_CONFIG
    text = about.read_text(encoding="utf-8") if about.exists() else to_yaml(config)
    beside = companions(load_tokenizer(str(finished)), text, stop=_stop(config, stage))
    write_export(start, model.params, out, beside=beside, dtype=dtype)


def _export_step(
    config: Config, stage: StageName, checkpoints: Checkpoints, step: int, out: Path, args: ExportConfig
) -> None:
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    start, where = _start(config, stage, mesh), checkpoints.folder / str(step)
    beside = from_metadata(checkpoints.metadata(step), stop=_stop(config, stage), where=where)
    lora, part = _trained_part(config, stage)
    if lora.rank:
        check_base(stage_inputs(config, stage), checkpoints.metadata(step))
    like, frozen = trainable(start, lora, jax.random.key(0), mesh=mesh, path=f"{stage}.lora")
    params: Params = combine(checkpoints.restore(step, abstract(like), part=part), frozen)
    write_export(start, params, out, beside=beside, dtype=_dtype(config, stage, args))


def _start(config: Config, stage: StageName, mesh: Mesh) -> Pretrained | RewardModel:
    """Load the model that the stage began with."""
    match stage:
        case "sft":
            source = model_source(config, config.sft.model.path, key="sft.model.path", stage=None)
        case "reward":
            source = model_source(config, config.reward.model.path, key="reward.model.path", stage="sft")
        case "ppo":
            source = model_source(config, config.ppo.model.path, key="ppo.model.path", stage="sft")
    if stage == "reward":
        return load_reward_start(source, jax.random.key(0), dtype="float32", mesh=mesh, option="reward.model.path")
    return load_pretrained(source, dtype="float32", mesh=mesh, option=f"{stage}.model.path")


def _trained_part(config: Config, stage: StageName) -> tuple[LoRAConfig, str]:
    """Return the adapters of a stage, and the path of its exported part in the training state."""
    match stage:
        case "sft":
            return config.sft.lora, "train/params"
        case "reward":
            return config.reward.lora, "train/params"
        case "ppo":
            return config.ppo.lora, "train/ema" if config.ppo.ema_decay else "train/params/policy"


def _stop(config: Config, stage: StageName) -> tuple[str, ...] | None:
    """Return the tokens that end a stage's answers; None for a model that gives none."""
    return {"sft": config.sft.sampling.stop, "reward": None, "ppo": config.ppo.sampling.stop}[stage]


def _dtype(config: Config, stage: StageName, args: ExportConfig) -> WeightDtype:
    own = {"sft": config.sft, "reward": config.reward, "ppo": config.ppo}[stage].export_dtype
    return own if args.dtype == "stage" else args.dtype
