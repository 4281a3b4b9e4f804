"""A checkpoint as a Hugging Face folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax

from jrlhf.checkpoint import Checkpoints
from jrlhf.config import Config, LoRAConfig
from jrlhf.config_io import ConfigError, load_config
from jrlhf.config_tools import ExportConfig
from jrlhf.models import (
    Pretrained,
    RewardModel,
    load_pretrained,
    reward_from_pretrained,
    save_pretrained,
    save_reward_model,
)
from jrlhf.parallel import make_mesh
from jrlhf.stages.adapters import merged, trainable
from jrlhf.stages.inputs import stage_inputs
from jrlhf.stages.origin_check import check_base
from jrlhf.stages.run import StageName, model_source
from jrlhf.stages.state import abstract
from jrlhf.types import Params

FURTHEST: tuple[StageName, ...] = ("ppo", "reward", "sft")
RUN_CONFIG = "jrlhf.yaml"
"""Beside the weights of a checkpoint: the config of the run that made them."""


def run_export(args: ExportConfig) -> None:
    """Write a finished stage's model, or the one in a checkpoint, to ``args.out``.

    A reward model from a checkpoint is not normalised: that is done once, after training.
    """
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: {out} is not empty")
    folder, stage = _stage_of(args)
    if args.step == -1 and (folder / "hf").is_dir():
        shutil.copytree(folder / "hf", out, dirs_exist_ok=True)
        return
    # The run may have moved since: its stages are beside this one.
    config = replace(load_config(folder / "config.yaml"), run=str(folder.parent))
    with Checkpoints(folder / "checkpoints", keep=1, keep_best=0, best_metric=None, best_mode="min") as checkpoints:
        step = checkpoints.latest_step() if args.step == -1 else args.step
        if step is None or not (checkpoints.folder / str(step)).is_dir():
            raise ConfigError(f"step: {checkpoints.folder} has no checkpoint{f' {step}' if step else ''}")
        checkpoints.check(step)
        _export_step(config, stage, checkpoints, step, out)


def _stage_of(args: ExportConfig) -> tuple[Path, StageName]:
    run = Path(args.run)
    for stage in FURTHEST:
        if args.stage in (stage, "last"):
            if (run / stage / "checkpoints").is_dir():
                return run / stage, stage
            if run.name == stage and (run / "checkpoints").is_dir():
                return run, stage
    wanted = "stage" if args.stage == "last" else f"{args.stage} stage"
    raise ConfigError(f"run: {run} has no {wanted} with a checkpoint")


def _export_step(config: Config, stage: StageName, checkpoints: Checkpoints, step: int, out: Path) -> None:
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    if vars(config)[stage].lora.rank:
        check_base(stage_inputs(config, stage), checkpoints.metadata(step))

    def trained(model: Pretrained | RewardModel, lora: LoRAConfig, part: str) -> Params:
        like, frozen = trainable(model, lora, jax.random.key(0), mesh=mesh, path=f"{stage}.lora")
        return merged(checkpoints.restore(step, abstract(like), part=part), frozen)

    match stage:
        case "sft":
            source = model_source(config, config.sft.model.path, key="sft.model.path", stage=None)
            model = load_pretrained(source, dtype="float32", mesh=mesh)
            params = trained(model, config.sft.lora, "train/params")
            save_pretrained(replace(model, params=params), out)
        case "reward":
            source = model_source(config, config.reward.model.path, key="reward.model.path", stage="sft")
            base = load_pretrained(source, dtype="float32", mesh=mesh)
            reward = reward_from_pretrained(base, jax.random.key(0))
            params = trained(reward, config.reward.lora, "train/params")
            save_reward_model(replace(reward, params=params), out)
        case "ppo":
            source = model_source(config, config.ppo.model.path, key="ppo.model.path", stage="sft")
            model = load_pretrained(source, dtype="float32", mesh=mesh)
            part = "train/ema" if config.ppo.ema_decay else "train/params/policy"
            save_pretrained(replace(model, params=trained(model, config.ppo.lora, part)), out)
    saved = checkpoints.metadata(step)
    for name, text in saved["tokenizer"].items():
        if Path(name).name != name:
            raise ValueError(f"{checkpoints.folder / str(step)}: {name!r} is not the name of a tokenizer's file")
        (out / name).write_text(text, encoding="utf-8")
    (out / RUN_CONFIG).write_text(saved["config"], encoding="utf-8")
