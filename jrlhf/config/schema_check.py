"""Checks of the config sections that several stages share. Imports no JAX."""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

from jrlhf.config.gates import FORM, is_gate
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
)

Check = tuple[bool, str, Any, str]
"""Whether a value is valid, the field's path, the value, and the words for a valid one."""


def run_folder_checks(name: str, path: str) -> Iterator[Check]:
    """Refuse a path that another program would decode or resolve to a different folder."""
    yield bool(path.strip()) and "\0" not in path and "://" not in path, name, path, "a folder"
    climbs = ".." in PurePath(unquote(path)).parts
    yield not climbs, name, path, "without '..'; write an absolute path for a folder elsewhere"


def seed_check(seed: int) -> Check:
    return 0 <= seed < 2**32, "seed", seed, "from 0 to 2³² - 1"


def mesh_checks(path: str, mesh: MeshConfig) -> Iterator[Check]:
    yield mesh.data >= 1 or mesh.data == -1, f"{path}.data", mesh.data, "1 or more, or -1 for all remaining devices"
    yield mesh.fsdp >= 1, f"{path}.fsdp", mesh.fsdp, "1 or more"
    yield mesh.tensor >= 1, f"{path}.tensor", mesh.tensor, "1 or more"


def distributed_checks(path: str, distributed: DistributedConfig) -> Iterator[Check]:
    yield distributed.processes >= 0, f"{path}.processes", distributed.processes, "1 or more, or 0 (from the launcher)"
    yield distributed.process >= -1, f"{path}.process", distributed.process, "0 or more, or -1 (from the launcher)"
    yield distributed.start_timeout >= 1, f"{path}.start_timeout", distributed.start_timeout, "1 or more"
    yield distributed.heartbeat_timeout >= 5, f"{path}.heartbeat_timeout", distributed.heartbeat_timeout, "5 or more"
    yield distributed.stall_timeout >= 1, f"{path}.stall_timeout", distributed.stall_timeout, "1 or more"


def optim_checks(path: str, optim: OptimConfig) -> Iterator[Check]:
    yield optim.lr >= 0, f"{path}.lr", optim.lr, "0 or more"
    yield 0 <= optim.warmup <= 1, f"{path}.warmup", optim.warmup, "a fraction of the updates, from 0 to 1"
    yield 0 <= optim.b1 < 1, f"{path}.b1", optim.b1, "from 0 to below 1"
    yield 0 <= optim.b2 < 1, f"{path}.b2", optim.b2, "from 0 to below 1"
    yield optim.eps > 0, f"{path}.eps", optim.eps, "above 0"
    yield optim.weight_decay >= 0, f"{path}.weight_decay", optim.weight_decay, "0 or more"
    yield optim.max_grad_norm >= 0, f"{path}.max_grad_norm", optim.max_grad_norm, "0 or more"


def data_checks(path: str, data: DataConfig) -> Iterator[Check]:
    weights = [1.0] if isinstance(data.train, str) else list(data.train.values())
    weighted = bool(weights) and all(weight > 0 for weight in weights)
    yield weighted, f"{path}.train", data.train, "a source, or sources with weights above 0"
    yield data.max_length >= 1, f"{path}.max_length", data.max_length, "1 or more"
    yield data.buckets >= 1, f"{path}.buckets", data.buckets, "1 or more"


def checkpoint_checks(path: str, checkpoint: CheckpointConfig) -> Iterator[Check]:
    yield checkpoint.every >= 1, f"{path}.every", checkpoint.every, "1 or more"
    yield checkpoint.keep >= 1, f"{path}.keep", checkpoint.keep, "1 or more"
    yield checkpoint.keep_best >= 0, f"{path}.keep_best", checkpoint.keep_best, "0 or more"


def log_checks(path: str, log: LogConfig) -> Iterator[Check]:
    yield log.every >= 1, f"{path}.every", log.every, "1 or more"
    yield log.eval_every >= 1, f"{path}.eval_every", log.eval_every, "1 or more"
    yield log.eval_rows >= 0, f"{path}.eval_rows", log.eval_rows, "0 or more"
    yield bool(log.project.strip()), f"{path}.project", log.project, "a name"
    yield log.samples >= 0, f"{path}.samples", log.samples, "0 or more"


def sampling_checks(path: str, sampling: SamplingConfig) -> Iterator[Check]:
    yield sampling.max_new_tokens >= 1, f"{path}.max_new_tokens", sampling.max_new_tokens, "1 or more"
    yield sampling.temperature >= 0, f"{path}.temperature", sampling.temperature, "0 or more"
    yield sampling.top_k >= 0, f"{path}.top_k", sampling.top_k, "0 or more"
    yield 0 < sampling.top_p <= 1, f"{path}.top_p", sampling.top_p, "above 0 and at most 1"
    yield all(sampling.stop), f"{path}.stop", sampling.stop, "without empty strings"
    yield sampling.slots >= 0, f"{path}.slots", sampling.slots, "1 or more, or 0 (automatic)"


def batch_checks(path: str, rows: int, microbatch: int) -> Iterator[Check]:
    yield rows >= 1, f"{path}.batch_size", rows, "1 or more"
    yield microbatch >= 0, f"{path}.microbatch", microbatch, "0 (automatic) or more"


def packing_checks(path: str, pack_length: int, max_length: int) -> Iterator[Check]:
    fits = pack_length == 0 or pack_length >= max_length
    yield fits, f"{path}.pack_length", pack_length, f"0 (off), or at least {path}.data.max_length ({max_length})"


def lora_checks(path: str, lora: LoRAConfig) -> Iterator[Check]:
    yield lora.rank >= 0, f"{path}.rank", lora.rank, "0 (off) or more"
    yield lora.alpha > 0, f"{path}.alpha", lora.alpha, "above 0"
    yield _is_regex(lora.targets), f"{path}.targets", lora.targets, "a regular expression"


def trained_model_check(path: str, model: ModelConfig, lora: LoRAConfig) -> Check:
    """Refuse a dtype for the frozen weights of a model that has none."""
    must = f"auto or float32, because without {path}.lora all weights are trained"
    return lora.rank > 0 or model.weights != "bfloat16", f"{path}.model.weights", model.weights, must


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def gate_checks(path: str, gates: tuple[str, ...], heldout: str, source: str) -> Iterator[Check]:
    yield all(map(is_gate, gates)), path, gates, FORM
    yield bool(heldout) or not gates, source, heldout, f"set, because {path} are bounds on held-out figures"
