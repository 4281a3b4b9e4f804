"""Loading of language models from Hugging Face folders or hub ids, and saving that preserves unchanged bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.models.frozen import ExactFn, FrozenDtype, as_it_is, stored_shapes
from jrlhf.models.functions import abstract_params, decoder_fns
from jrlhf.models.hf.adapter_folder import model_folder, require_kind
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.folder import GENERATION_CONFIG, TOKENIZER_FILES, Stored, read_config
from jrlhf.models.hf.names import SHARDING_RULES, language_model_table
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.read import check_tensors, open_tensors
from jrlhf.models.hf.weights import Weights
from jrlhf.models.hf.write import WeightDtype, write_folder
from jrlhf.parallel import ShardingRules, tree_shardings
from jrlhf.system.paths import expanded
from jrlhf.types import ActorCriticFn, ApplyFn, DecodeFns, LogprobFn, Params, ScoreFn


@dataclass(frozen=True)
class Pretrained:
    """A language model. To export it after training, save ``dataclasses.replace(model, params=trained)``."""

    params: Params = field(repr=False)
    """Weights, layers stacked on axis 0, in float32; frozen ones may be rounded, see ``load_pretrained``."""
    apply_fn: ApplyFn
    logprob_fn: LogprobFn
    decode_fns: DecodeFns
    score_fn: ScoreFn
    """Scores from a reward model's tree, as ``reward_from_pretrained`` builds it from this decoder."""
    actor_critic_fn: ActorCriticFn
    """Policy and critic in one forward pass over ``PPOParams(params, {"head": ...})``."""
    config: dict[str, Any]
    """Content of ``config.json``."""
    arch: ArchConfig
    source: Path
    """Folder that the model was read from."""
    rules: ShardingRules
    stored: Mapping[str, Stored] = field(repr=False)
    """File and dtype of every tensor in the source, which an export keeps."""
    exact: ExactFn = field(default=as_it_is, repr=False)
    """``(path, leaf) -> leaf``: a leaf of ``params`` in float32, as the source has it."""


def load_pretrained(
    path: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    weights: FrozenDtype = "float32",
    option: str = "",
) -> Pretrained:
    """Load a language model from a folder or hub id; a PEFT folder gives its base model with the adapters merged in.

    With ``mesh`` the parameters are created sharded. ``dtype`` is the compute dtype ("float32", "bfloat16").
    ``weights`` is the dtype of the parameters; only for a model or a LoRA base that is never trained may it be
    "bfloat16", or "auto", the compute dtype, which changes no result. ``decoder_fns`` explains ``remat`` and
    ``attention``.
    ``option`` names the path's config field in errors. Raises UsageError if config or tensors do not fit or the model
    is a reward model, and FileNotFoundError if a file is missing.
    """
    source = model_folder(path)
    require_kind(source, "language", option=option)
    folder = source.base
    config = read_config(folder)
    arch = arch_from_hf(config)
    shapes, table = stored_shapes(abstract_params(arch), weights, dtype), language_model_table(arch)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, SHARDING_RULES)
    tensors = open_tensors(folder, arch)
    check_tensors(tensors, arch, table, shapes)
    on_disk = Weights(
        tensors, table, shapes, shardings, [insert_adapter(shapes, arch, adapter) for adapter in source.adapters]
    )
    fns = decoder_fns(arch, dtype=dtype, remat=remat, attention=attention, mesh=mesh)
    return Pretrained(
        params=on_disk.tree(),
        apply_fn=fns.apply_fn,
        logprob_fn=fns.logprob_fn,
        decode_fns=fns.decode_fns,
        score_fn=fns.score_fn,
        actor_critic_fn=fns.actor_critic_fn,
        config=config,
        arch=arch,
        source=folder,
        rules=SHARDING_RULES,
        stored=tensors.stored,
        exact=on_disk.exact,
    )


def save_pretrained(
    pretrained: Pretrained,
    path: str | Path,
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, the weights, and the source's tokenizer files and generation config.

    With ``dtype`` "source" tensors keep the dtypes they were read in, so unchanged parameters give the source's bytes.
    "float32" rounds nothing and sets the dtype in config.json. ``files`` maps names to contents to write instead of the
    source's tokenizer files and generation config.
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
