"""LoRA in a stage: it adds adapters to a model and splits the parameters into a trained and a frozen part."""

import jax
from jax.sharding import Mesh

from jrlhf.config import ConfigError, LoRAConfig
from jrlhf.core import partition
from jrlhf.models import ArchConfig, Pretrained, RewardModel, add_adapters, is_trained
from jrlhf.models.abstract import placed
from jrlhf.parallel import tree_shardings
from jrlhf.types import Key, Params


def trainable(
    model: Pretrained | RewardModel, lora: LoRAConfig, key: Key, *, mesh: Mesh, path: str
) -> tuple[Params, Params | None]:
    """Split a model's parameters, arrays or shapes, into ``(trained, frozen)``.

    Without LoRA all are trained and ``frozen`` is None; with LoRA only new adapters and a head are trained. The frozen
    part is the model's own arrays, not copies. ``path`` names ``lora`` in errors.
    """
    if lora.rank == 0:
        return model.params, None
    if isinstance(jax.tree.leaves(model.params)[0], jax.ShapeDtypeStruct):
        return partition(_abstract_adapters(model, lora, mesh, path), is_trained)
    params = with_adapters(model.params, model.arch, lora, key, path=path)
    # The new leaves go where the sharding rules say; the old leaves are there already.
    return partition(jax.device_put(params, tree_shardings(params, mesh, model.rules)), is_trained)


def _abstract_adapters(model: Pretrained | RewardModel, lora: LoRAConfig, mesh: Mesh, path: str) -> Params:
    """Add adapters as shapes. The old leaves stay the same objects, so that a plan counts each of them once."""
    shapes = jax.eval_shape(lambda p: with_adapters(p, model.arch, lora, jax.random.key(0), path=path), model.params)
    new = placed(shapes, tree_shardings(shapes, mesh, model.rules))
    old = {jax.tree_util.keystr(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    return jax.tree_util.tree_map_with_path(lambda where, leaf: old.get(jax.tree_util.keystr(where), leaf), new)


def with_adapters(params: Params, arch: ArchConfig, lora: LoRAConfig, key: Key, *, path: str) -> Params:
    """Add new adapters to the parameters. Raise ConfigError, which names ``path``, if ``lora.targets`` matches none."""
    try:
        return add_adapters(params, arch, key, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    except ValueError as error:
        raise ConfigError(f"{path}.{error}") from error
