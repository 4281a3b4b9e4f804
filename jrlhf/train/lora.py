"""LoRA in a stage: which part of a model is trained, and the model that comes of it."""

import jax
from jax.sharding import Mesh

from jrlhf.config import ConfigError, LoRAConfig
from jrlhf.core import partition
from jrlhf.models import ArchConfig, Pretrained, RewardModel, add_adapters, is_trained
from jrlhf.parallel import tree_shardings
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
