"""A small training state on any devices, and its checkpoints."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrlhf import assets
from jrlhf.config import OptimConfig
from jrlhf.models import load_pretrained
from jrlhf.parallel import fetch, make_mesh
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.steps import make_sft_step
from jrlhf.train.keys import stream_key
from jrlhf.train.optim import make_optimizer
from jrlhf.train.start import begin, build_training
from jrlhf.train.state import RunState, abstract


def sft_state(devices: Any) -> tuple[RunState, Any]:
    """A small model and its optimizer on these devices, as the SFT stage starts with, and the step."""
    mesh = make_mesh(data=-1, fsdp=2 if len(devices) > 1 else 1, tensor=1, devices=devices)
    model = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32", mesh=mesh)
    tx, _ = make_optimizer(OptimConfig(lr=1e-3), updates=100)
    step = make_sft_step(model.logprob_fn, tx, accumulation=1)
    training = build_training(step, tx, model.params, None, mesh=mesh, rules=model.rules)
    return begin(training, mesh=mesh, key=stream_key(0, "sft", "train")), training.step


def open_checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep=3, keep_best=0, best_metric=None, best_mode="min")


def restored(folder: Path, devices: Any) -> tuple[RunState, Any]:
    """What is saved in a folder, on these devices, and the step."""
    state, step = sft_state(devices)
    with open_checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.latest_step(), abstract(state)), step


def leaves(state: RunState) -> list[np.ndarray]:
    """Every leaf, whole, keys as the integers they are made of."""
    return fetch([x if x.dtype != state.key.dtype else jax.random.key_data(x) for x in jax.tree.leaves(state)])
