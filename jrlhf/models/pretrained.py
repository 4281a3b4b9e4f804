"""Language models of a Hugging Face folder or hub id: in, and out again byte for byte."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jrlhf.models.arch import SEQUENCE_CLASSIFICATION, ArchConfig, arch_from_hf
from jrlhf.models.functions import abstract_params, decoder_fns
from jrlhf.models.hf import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    find_folder,
    open_tensors,
    read_config,
    read_tree,
    their_tensors,
    write_folder,
)
from jrlhf.models.names import RULES, language_model_table
from jrlhf.parallel import Rules, tree_shardings
from jrlhf.types import ApplyFn, DecodeFns, LogprobFn, Params, ScoreFn


@dataclass(frozen=True)
class Pretrained:
    """A language model. After training, export ``dataclasses.replace(model, params=trained)``."""

    params: Params = field(repr=False)
    """Float32 master weights, layers stacked on axis 0."""
    apply_fn: ApplyFn
    logprob_fn: LogprobFn
    decode_fns: DecodeFns
    score_fn: ScoreFn
    """Over a reward model's tree, which this decoder may become: see ``reward_from_pretrained``."""
    config: dict[str, Any]
    """``config.json`` as read."""
    arch: ArchConfig
    source: Path
    """The folder it was read from."""
    rules: Rules
    dtypes: Mapping[str, str] = field(repr=False)
    """The dtype of every tensor in the source, in which it is written back."""


def load_pretrained(path: str | Path, *, dtype: Any, mesh: Mesh | None = None, remat: bool = False) -> Pretrained:
    """Read a folder or hub id. With ``mesh`` the parameters are born sharded by the family's rules.

    ``dtype``: what is computed in ("float32", "bfloat16"); parameters are float32 always. ``remat``: recompute
    a layer's activations in the backward pass. ValueError where config or tensors do not fit, FileNotFoundError where
    they are missing.
    """
    folder = find_folder(path)
    config = read_config(folder)
    arch = arch_from_hf(config)
    if SEQUENCE_CLASSIFICATION in (config.get("architectures") or ()):
        raise ValueError(f"{folder}: architectures: {SEQUENCE_CLASSIFICATION} is a reward model: use load_reward_model")
    shapes = abstract_params(arch)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, RULES)
    with open_tensors(folder) as tensors:
        params = read_tree(tensors, language_model_table(arch), shapes, shardings)
        dtypes = tensors.dtypes
    fns = decoder_fns(arch, dtype=dtype, remat=remat)
    return Pretrained(
        params=params,
        apply_fn=fns.apply_fn,
        logprob_fn=fns.logprob_fn,
        decode_fns=fns.decode_fns,
        score_fn=fns.score_fn,
        config=config,
        arch=arch,
        source=folder,
        rules=RULES,
        dtypes=dtypes,
    )


def save_pretrained(pretrained: Pretrained, path: str | Path) -> None:
    """Write config.json, one model.safetensors and the source's tokenizer files.

    Tensors get the dtypes they were read in, so unchanged parameters give the source's bytes (if it was one file).
    """
    table = language_model_table(pretrained.arch)
    tensors = their_tensors(pretrained.params, table, pretrained.dtypes)
    write_folder(Path(path), pretrained.config, tensors, pretrained.source, (*TOKENIZER_FILES, GENERATION_CONFIG))
