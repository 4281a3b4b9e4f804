"""Abstract models: the shapes, dtypes and shardings of ``load_pretrained``'s results, for ahead-of-time compilation."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.models.attention import AttentionKernel
from jrlhf.models.frozen import FrozenDtype, stored_shapes
from jrlhf.models.functions import abstract_head, abstract_params, decoder_fns
from jrlhf.models.hf.adapter_folder import ModelKind, model_folder, require_kind
from jrlhf.models.hf.families import arch_from_hf, is_sequence_classification
from jrlhf.models.hf.folder import read_config
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.models.pretrained import Pretrained
from jrlhf.models.reading import STOP_TOKEN, reading_of
from jrlhf.models.reward import RewardModel
from jrlhf.parallel import tree_shardings
from jrlhf.types import Params


def placed(shapes: Any, shardings: Any) -> Any:
    """Attach a sharding to every shape of a tree."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def own_shapes(shapes: Any) -> Any:
    """Return shapes of arrays in float32 with the same shardings, which a plan counts as other arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), shapes)


def abstract_pretrained(
    path: str | Path,
    *,
    dtype: Any,
    mesh: Mesh,
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    weights: FrozenDtype = "float32",
    kind: ModelKind | None = None,
    option: str = "",
) -> Pretrained:
    """Return what ``load_pretrained`` returns, without weights, from the config.json of a folder or hub id.

    A PEFT folder counts as its base model, and a reward model's folder gives the language model of the same sizes.
    Raises UsageError for a model that is not of ``kind`` (None: any kind).
    """
    source = model_folder(path, weights=False)
    if kind is not None:
        require_kind(source, kind, option=option)
    folder = source.base
    config = read_config(folder)
    arch = arch_from_hf(config)
    shapes = stored_shapes(abstract_params(arch), weights, dtype)
    fns = decoder_fns(arch, dtype=dtype, remat=remat, attention=attention, mesh=mesh)
    return Pretrained(
        params=placed(shapes, tree_shardings(shapes, mesh, SHARDING_RULES)),
        apply_fn=fns.apply_fn,
        logprob_fn=fns.logprob_fn,
        decode_fns=fns.decode_fns,
        score_fn=fns.score_fn,
        actor_critic_fn=fns.actor_critic_fn,
        config=config,
        arch=arch,
        source=folder,
        rules=SHARDING_RULES,
        stored={},
    )


def abstract_reward(pretrained: Pretrained, mesh: Mesh) -> RewardModel:
    """Return what ``reward_from_pretrained`` returns, without weights; the shapes of the decoder are shared.

    For a reward model, its config decides where the score is read.
    """
    head: Params = {"head": abstract_head(pretrained.arch)}
    decoder = {name: leaf for name, leaf in pretrained.params.items() if name != "lm_head"}
    config, arch = pretrained.config, pretrained.arch
    return RewardModel(
        params={"decoder": decoder} | placed(head, tree_shardings(head, mesh, SHARDING_RULES)),
        score_fn=pretrained.score_fn,
        config=config,
        arch=arch,
        source=pretrained.source,
        rules=pretrained.rules,
        stored={},
        reading=reading_of(config, arch.family) if is_sequence_classification(config, arch) else STOP_TOKEN,
    )
