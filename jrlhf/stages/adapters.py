"""LoRA in a stage: which part of a model is trained, and the model that comes of it."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.config import LoRAConfig
from jrlhf.config_io import ConfigError
from jrlhf.core import combine, partition
from jrlhf.models import ArchConfig, Pretrained, RewardModel, add_adapters, is_trained, merge_adapters, save_adapter
from jrlhf.parallel import fetch, is_first, tree_shardings
from jrlhf.types import Key, Params


def trainable(
    model: Pretrained | RewardModel, lora: LoRAConfig, key: Key, *, mesh: Mesh, path: str
) -> tuple[Params, Params | None]:
    """``(trained, frozen)`` of a model: all of it and None, or with ``lora`` fresh adapters (and a head) and the rest.

    The frozen part is the model's own arrays, not copies. ``path``: the config's name of ``lora``, for errors.
    """
    if lora.rank == 0:
        return model.params, None
    params = with_adapters(model.params, model.arch, lora, key, path=path)
    # The new leaves go where the rules say; the old ones are there already, and stay as they are.
    return partition(jax.device_put(params, tree_shardings(params, mesh, model.rules)), is_trained)


def with_adapters(params: Params, arch: ArchConfig, lora: LoRAConfig, key: Key, *, path: str) -> Params:
    """The parameters with fresh adapters; ConfigError, which names ``path``, where ``lora.targets`` finds nothing."""
    try:
        return add_adapters(params, arch, key, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    except ValueError as error:
        raise ConfigError(f"{path}.{error}") from error


def merged(trained: Params, frozen: Params | None) -> Params:
    """The whole tree with its adapters, if there are any, merged into the weights."""
    return merge_adapters(combine(trained, frozen))


def write_adapter(
    model: Pretrained | RewardModel, params: Params, lora: LoRAConfig, folder: Path, *, base: str, tokenizer: Any
) -> None:
    """A PEFT folder beside the merged model; nothing without ``lora``. ``base``: where the frozen weights are from."""
    if lora.rank:
        local = str(Path(base).resolve()) if Path(base).is_dir() else base
        learnt, frozen = partition(params, is_trained)
        params = combine(fetch(learnt), frozen)
        if is_first():
            tokenizer.save_pretrained(folder)
            save_adapter(params, model.arch, folder, base=local, alpha=lora.alpha)
