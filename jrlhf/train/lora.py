"""LoRA in a stage: it adds adapters to a model and splits the parameters into a trained and a frozen part."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.config import ConfigError, LoRAConfig
from jrlhf.core import partition
from jrlhf.models import ArchConfig, Pretrained, RewardModel, add_adapters, is_trained
from jrlhf.models.abstract import own_shapes, placed
from jrlhf.parallel import tree_shardings
from jrlhf.train.batches import tree_copy
from jrlhf.types import Key, Params


def trainable(
    model: Pretrained | RewardModel, lora: LoRAConfig, key: Key, *, mesh: Mesh, path: str, shared: bool = False
) -> tuple[Params, Params | None]:
    """Split a model's parameters, arrays or shapes, into ``(trained, frozen)``.

    Without LoRA all are trained and ``frozen`` is None; with LoRA only new adapters and a head are trained. The trained
    part is float32 and belongs to the state, whose step donates it. With ``shared`` the stage also reads the model
    itself, so the trained part is other arrays; the frozen part is always the model's own. ``path`` names ``lora`` in
    errors.
    """
    abstract = isinstance(jax.tree.leaves(model.params)[0], jax.ShapeDtypeStruct)
    if lora.rank == 0:
        own = own_shapes if abstract else partial(own_weights, model)
        return own(model.params) if shared else model.params, None
    if abstract:
        return partition(_abstract_adapters(model, lora, mesh, path), is_trained)
    params = with_adapters(model.params, model.arch, lora, key, path=path)
    # The new leaves go where the sharding rules say; the old leaves are there already.
    trained, frozen = partition(jax.device_put(params, tree_shardings(params, mesh, model.rules)), is_trained)
    return tree_copy(trained), frozen


def own_weights(model: Pretrained | RewardModel, params: Params) -> Params:
    """Return a model's parameters in other arrays, in float32: a leaf that is rounded is read again from the source."""

    def own(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        exact = model.exact(tuple(entry.key for entry in path), leaf)
        return leaf.copy() if exact is leaf else exact

    return jax.tree_util.tree_map_with_path(own, params)


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
