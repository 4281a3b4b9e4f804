"""Exports a checkpoint as a Hugging Face folder."""

from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, load_config, stage_section, to_yaml
from jrlhf.config.tools import ExportConfig
from jrlhf.core import combine
from jrlhf.data import load_tokenizer
from jrlhf.models import Pretrained, RewardModel, load_pretrained, load_reward_model
from jrlhf.models.hf.folder_files import copy_files
from jrlhf.models.hf.write import WeightDtype
from jrlhf.parallel import make_mesh
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.exports import RUN_CONFIG, companions, from_metadata, write_export
from jrlhf.runs.folder import read_summary, run_order
from jrlhf.runs.origin_check import check_base
from jrlhf.stages.stage import Stage
from jrlhf.stages.table import stage_named
from jrlhf.train.keys import stream_key
from jrlhf.train.lora import trainable
from jrlhf.train.state import abstract
from jrlhf.types import Params


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


def _stage_of(args: ExportConfig) -> tuple[Path, Stage]:
    run = Path(args.run)
    for stage in map(stage_named, reversed(run_order(run))):
        if args.stage in (stage.name, "last"):
            if (run / stage.name / "checkpoints").is_dir():
                return run / stage.name, stage
            if run.name == stage.name and (run / "checkpoints").is_dir():
                return run, stage
    stage_name = "stage" if args.stage == "last" else f"{args.stage} stage"
    raise ConfigError(f"run: {run} has no {stage_name} with a checkpoint")


def _export_finished(config: Config, stage: Stage, folder: Path, out: Path, args: ExportConfig) -> None:
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
    beside = companions(load_tokenizer(str(finished)), text, stop=stage.stop(config))
    write_export(start, model.params, out, beside=beside, dtype=dtype)


def _export_step(
    config: Config, stage: Stage, checkpoints: Checkpoints, step: int, out: Path, args: ExportConfig
) -> None:
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    start, where = _start(config, stage, mesh), checkpoints.folder / str(step)
    beside = from_metadata(checkpoints.metadata(step), stop=stage.stop(config), where=where)
    lora = stage_section(config, stage.name).lora
    if lora.rank:
        check_base(stage.inputs(config), checkpoints.metadata(step))
    like, frozen = trainable(
        start, lora, stream_key(config.seed, stage.name, "lora"), mesh=mesh, path=f"{stage.name}.lora"
    )
    params: Params = combine(checkpoints.restore(step, abstract(like), part=stage.trained_part(config)), frozen)
    write_export(start, params, out, beside=beside, dtype=_dtype(config, stage, args))


def _start(config: Config, stage: Stage, mesh: Mesh) -> Pretrained | RewardModel:
    """Load the model that the stage began with."""
    return stage.start(stage.inputs(config).source, mesh=mesh, option=f"{stage.name}.model.path")


def _dtype(config: Config, stage: Stage, args: ExportConfig) -> WeightDtype:
    return stage_section(config, stage.name).export_dtype if args.dtype == "stage" else args.dtype
