"""Reward models: a decoder with a scalar head, in Hugging Face's sequence-classification form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import at_last_token
from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.models.functions import abstract_reward_params, decoder_fns, reward_params
from jrlhf.models.hf.adapter_folder import model_folder, model_kind, require_kind
from jrlhf.models.hf.families import CLASSES, arch_from_hf
from jrlhf.models.hf.folder import TOKENIZER_FILES, Stored, read_config
from jrlhf.models.hf.names import HEAD_BIAS, HEAD_KERNEL, RULES, reward_model_table
from jrlhf.models.hf.peft import is_own_adapter
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.read import open_tensors, read_tree
from jrlhf.models.hf.write import WeightDtype, write_folder
from jrlhf.models.lora import merge_adapters
from jrlhf.models.pretrained import Pretrained, load_pretrained
from jrlhf.models.reading import FIELD, NOTE, STOP_TOKEN, Reading, reading_of
from jrlhf.parallel import ShardingRules, tree_shardings
from jrlhf.system.errors import UsageError
from jrlhf.system.paths import expanded
from jrlhf.types import Key, Params, ScoreFn


@dataclass(frozen=True)
class RewardModel:
    """A scalar for every prefix. After training, export ``dataclasses.replace(model, params=trained)``."""

    params: Params = field(repr=False)
    """``{"decoder": ..., "head": {"kernel", "bias"}}`` in float32. The normalisation is folded into the head."""
    score_fn: ScoreFn
    config: dict[str, Any]
    arch: ArchConfig
    source: Path
    rules: ShardingRules
    stored: Mapping[str, Stored] = field(repr=False)
    gain: float = 1.0
    """What the head was multiplied by to normalise it, and then shifted by: a record, already applied."""
    bias: float = 0.0
    reading: Reading = STOP_TOKEN
    """Which tokens of a text it is given, and where its score is read: as jrlhf trains it, or as transformers does."""

    def score(self, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """The scalar where ``reading`` has it, at a row's last real token or before padding that ends the text; 0 for a
        row without tokens."""
        return at_last_token(self.score_fn(params, tokens, mask), self.reading.last(tokens, mask))


def reward_from_pretrained(pretrained: Pretrained, key: Key) -> RewardModel:
    """A reward model that starts from a language model's decoder; head kernel normal with std 1/√(d+1), bias 0.

    It holds the decoder's very arrays, not copies: donating one model's parameters takes them from the other.
    """
    return RewardModel(
        params=reward_params(pretrained.params, pretrained.arch, key),
        score_fn=pretrained.score_fn,
        config=pretrained.config,
        arch=pretrained.arch,
        source=pretrained.source,
        rules=pretrained.rules,
        stored=pretrained.stored,
    )


def normalise_reward(model: RewardModel, *, gain: float, bias: float) -> RewardModel:
    """Fold r → gain · r + bias into the head, so that every reader of the scores gets it. Ziegler et al. 2019, 2.2."""
    if not (math.isfinite(gain) and math.isfinite(bias) and gain > 0.0):
        raise ValueError(f"gain must be positive and both finite: gain={gain}, bias={bias}")
    head = model.params["head"]
    folded = {"kernel": head["kernel"] * gain, "bias": head["bias"] * gain + bias}
    params = {"decoder": model.params["decoder"], "head": folded}
    return replace(model, params=params, gain=model.gain * gain, bias=model.bias * gain + bias)


def load_reward_model(
    path: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool = False,
    attention: AttentionKernel = "xla",
    option: str = "",
) -> RewardModel:
    """Read a sequence-classification folder or hub id with one label; the rest is as in ``load_pretrained``.

    A PEFT folder gives its base with the adapters merged in: a reward model, or a language model if the adapter brings
    a head.
    """
    source = model_folder(path)
    require_kind(source, "reward", option=option)
    computed: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "attention": attention}
    has_head = model_kind(source._replace(adapters=())) == "reward"
    if has_head:
        model = _read_reward(source.base, **computed)
    else:
        model = reward_from_pretrained(load_pretrained(source.base, **computed), jax.random.key(0))
        model = replace(model, reading=reading_of(model.config, model.arch.family))
    for number, adapter in enumerate(source.adapters, 1):
        # The outermost is the last that could bring a head.
        needs_head = not has_head and number == len(source.adapters)
        params = merge_adapters(insert_adapter(model.params, model.arch, adapter, needs_head=needs_head))
        if params["head"]["kernel"] is not model.params["head"]["kernel"]:
            # Another head: what the base's was normalised by says nothing of it.
            has_head, model = True, replace(model, gain=1.0, bias=0.0)
        reading = STOP_TOKEN if is_own_adapter(adapter) else model.reading
        model = replace(model, params=params, reading=reading)
    return model


def load_reward_start(
    path: str | Path,
    key: Key,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool = False,
    attention: AttentionKernel = "xla",
    option: str = "",
) -> RewardModel:
    """The model that a reward stage begins with: a reward model as it is, or a language model with a fresh head.

    ``key`` draws that head. A reward model's scores are taken as they are, normalised or not, and its record of a
    normalisation begins anew. Its head is exported as a fresh one: in float32, the bias in config.json.
    """
    computed: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "attention": attention}
    if model_kind(model_folder(path)) == "language":
        return reward_from_pretrained(load_pretrained(path, option=option, **computed), key)
    model = load_reward_model(path, option=option, **computed)
    stored = {name: how for name, how in model.stored.items() if name not in (HEAD_KERNEL, HEAD_BIAS)}
    # Whatever it was read by before: from here on it learns what jrlhf gives it.
    return replace(model, stored=stored, gain=1.0, bias=0.0, reading=STOP_TOKEN)


def _read_reward(
    folder: Path, *, dtype: Any, mesh: Mesh | None, remat: bool, attention: AttentionKernel
) -> RewardModel:
    config = read_config(folder)
    arch = arch_from_hf(config)
    gain, bias, head_bias = _check_head(folder, config)
    shapes = abstract_reward_params(arch)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, RULES)
    tensors = open_tensors(folder, arch)
    table = reward_model_table(arch, head_bias=HEAD_BIAS in tensors.stored)
    params = read_tree(tensors, arch, table, shapes, shardings)
    if "bias" not in params["head"]:
        # A NumPy scalar, not a JAX one: every host can put its own copy onto a mesh that spans hosts.
        scalar = np.float32(head_bias)
        params["head"]["bias"] = (
            jax.device_put(scalar) if shardings is None else jax.device_put(scalar, shardings["head"]["bias"])
        )
    return RewardModel(
        params=params,
        score_fn=decoder_fns(arch, dtype=dtype, remat=remat, attention=attention, mesh=mesh).score_fn,
        config=config,
        arch=arch,
        source=folder,
        rules=RULES,
        stored=tensors.stored,
        gain=gain,
        bias=bias,
        reading=reading_of(config, arch.family),
    )


def _check_head(folder: Path, config: Mapping[str, Any]) -> tuple[float, float, float]:
    # transformers counts the names of the labels, and takes two labels where it finds neither.
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise UsageError(f"{folder}: num_labels: a reward model has 1 label, this one has {labels}")
    ours = config.get(NOTE, {})
    values = [ours.get(name, default) for name, default in (("gain", 1.0), ("bias", 0.0), ("head_bias", 0.0))]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UsageError(f"{folder}: {NOTE}: gain, bias and head_bias must be finite numbers, found {ours}")
    gain, bias, head_bias = (float(value) for value in values)
    return gain, bias, head_bias


def save_reward_model(
    model: RewardModel,
    path: str | Path,
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the family's sequence-classification form with one label: transformers' score is ours less the head's bias.

    That bias, the record of the normalisation, and where the score is read stand in config.json under "jrlhf" and are
    read back; where the source's head had a bias of its own, as a tensor, the bias stays there. ``dtype`` and ``files``
    are as in ``save_pretrained``.
    """
    in_tensor = HEAD_BIAS in model.stored
    ours: dict[str, Any] = {"gain": model.gain, "bias": model.bias, FIELD: model.reading.score_at}
    ours["head_bias"] = 0.0 if in_tensor else float(model.params["head"]["bias"])
    config = model.config | {
        "architectures": [CLASSES[model.arch.family].sequence_classification],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    # Another's folder that nothing was changed of keeps its config as it was.
    if NOTE in config or ours != {"gain": 1.0, "bias": 0.0, "head_bias": 0.0, FIELD: "whole_chat"}:
        config[NOTE] = ours
    write_folder(
        Path(expanded(str(path))),
        config,
        model.params,
        model.arch,
        reward_model_table(model.arch, head_bias=in_tensor),
        model.stored,
        model.source,
        TOKENIZER_FILES,
        dtype=dtype,
        files=files,
    )
