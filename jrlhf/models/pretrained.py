"""Language models of a Hugging Face folder or hub id: in, and out again byte for byte."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.models.functions import abstract_params, decoder_fns
from jrlhf.models.hf.adapter_folder import model_folder, require_kind
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.folder import GENERATION_CONFIG, TOKENIZER_FILES, Stored, read_config
from jrlhf.models.hf.names import RULES, language_model_table
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.read import open_tensors, read_tree
from jrlhf.models.hf.write import WeightDtype, write_folder
from jrlhf.models.lora import merge_adapters
from jrlhf.parallel import ShardingRules, tree_shardings
from jrlhf.system.paths import expanded
from jrlhf.types import ActorCriticFn, ApplyFn, DecodeFns, LogprobFn, Params, ScoreFn


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
    actor_critic_fn: ActorCriticFn
    """Policy and critic in one forward pass, of ``PPOParams(params, {"head": ...})``."""
    config: dict[str, Any]
    """``config.json`` as read."""
    arch: ArchConfig
    source: Path
    """The folder it was read from."""
    rules: ShardingRules
    stored: Mapping[str, Stored] = field(repr=False)
    """The file and dtype of every tensor in the source, in which it is written back."""


def load_pretrained(
    path: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool = False,
    attention: AttentionKernel = "xla",
    option: str = "",
) -> Pretrained:
    """Read a folder or hub id. With ``mesh`` the parameters are born sharded by the family's rules.

    A PEFT folder gives its base model with the adapters merged in.

    ``dtype``: what is computed in ("float32", "bfloat16"); parameters are float32 always. ``remat``: whole
    layers are computed again in the backward pass. ``attention``: as in ``decoder_fns``. ``option``: what names the
    path in a config, for errors. UsageError where config or tensors do not fit, and for a reward model;
    FileNotFoundError where they are missing.
    """
    source = model_folder(path)
    require_kind(source, "language", option=option)
    folder = source.base
    config = read_config(folder)
    arch = arch_from_hf(config)
    shapes = abstract_params(arch)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, RULES)
    tensors = open_tensors(folder, arch)
    params = read_tree(tensors, arch, language_model_table(arch), shapes, shardings)
    for adapter in source.adapters:
        params = merge_adapters(insert_adapter(params, arch, adapter))
    fns = decoder_fns(arch, dtype=dtype, remat=remat, attention=attention, mesh=mesh)
    return Pretrained(
        params=params,
        apply_fn=fns.apply_fn,
        logprob_fn=fns.logprob_fn,
        decode_fns=fns.decode_fns,
        score_fn=fns.score_fn,
        actor_critic_fn=fns.actor_critic_fn,
        config=config,
        arch=arch,
        source=folder,
        rules=RULES,
        stored=tensors.stored,
    )


def save_pretrained(
    pretrained: Pretrained,
    path: str | Path,
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, the weights, and the source's tokenizer files and generation config.

    ``dtype`` "source" gives tensors the dtypes they were read from, so unchanged parameters give the source's bytes;
    "float32" rounds nothing, and config.json says so. ``files`` are the contents, by name, of what is written beside
    them in place of the source's tokenizer and generation config.
    """
    write_folder(
        Path(expanded(str(path))),
        pretrained.config,
        pretrained.params,
        pretrained.arch,
        language_model_table(pretrained.arch),
        pretrained.stored,
        pretrained.source,
        (*TOKENIZER_FILES, GENERATION_CONFIG),
        dtype=dtype,
        files=files,
    )
