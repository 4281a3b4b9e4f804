"""Reward models: a decoder with a scalar head, in Hugging Face's sequence-classification form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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
from jrlhf.models.hf.names import HEAD_BIAS, HEAD_KERNEL, SHARDING_RULES, reward_model_table
from jrlhf.models.hf.peft import is_own_adapter
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.read import open_tensors, read_tree
from jrlhf.models.hf.write import WeightDtype, write_folder
from jrlhf.models.lora import merge_adapters
from jrlhf.models.pretrained import Pretrained, load_pretrained
from jrlhf.models.reading import NOTE_KEY, SCORE_AT_KEY, STOP_TOKEN, Reading, reading_of
from jrlhf.parallel import ShardingRules, tree_shardings
from jrlhf.system.errors import UsageError
from jrlhf.system.paths import expanded
from jrlhf.types import Key, Params, ScoreFn


@dataclass(frozen=True)
class RewardModel:
    """A reward model: a decoder with a scalar head that scores every prefix of a text.

    To export it after training, save ``dataclasses.replace(model, params=trained)``.
    """

    params: Params = field(repr=False)
    """``{"decoder": ..., "head": {"kernel", "bias"}}`` in float32; the head includes the normalisation."""
    score_fn: ScoreFn
    config: dict[str, Any]
    arch: ArchConfig
    source: Path
    rules: ShardingRules
    stored: Mapping[str, Stored] = field(repr=False)
    gain: float = 1.0
    """Factor of the normalisation; a record, since the head already includes it."""
    bias: float = 0.0
    """Offset of the normalisation; a record, since the head already includes it."""
    reading: Reading = STOP_TOKEN
    """Tokens that the model receives and the token of its score, in jrlhf's way or transformers'."""

    def score(self, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Return each row's score at the token that ``reading`` selects; 0 for a row without tokens."""
        return at_last_token(self.score_fn(params, tokens, mask), self.reading.last(tokens, mask))


def reward_from_pretrained(pretrained: Pretrained, key: Key) -> RewardModel:
    """Build a reward model from a language model's decoder; the head's kernel is normal with std 1/√(d+1), its bias 0.

    The decoder's arrays are shared, not copied: donating one model's parameters invalidates the other's.
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
    """Fold the normalisation r → gain · r + bias into the head, so that every user of the scores gets it.

    Ziegler et al. 2019, section 2.2.
    """
    if not (math.isfinite(gain) and math.isfinite(bias) and gain > 0.0):
        raise ValueError(f"gain and bias must be finite and gain positive: gain={gain}, bias={bias}")
    head = model.params["head"]
    new_head = {"kernel": head["kernel"] * gain, "bias": head["bias"] * gain + bias}
    params = {"decoder": model.params["decoder"], "head": new_head}
    return replace(model, params=params, gain=model.gain * gain, bias=model.bias * gain + bias)


def load_reward_model(
    path: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    option: str = "",
) -> RewardModel:
    """Load a reward model from a sequence-classification folder or hub id with one label.

    The options are those of ``load_pretrained``. A PEFT folder gives its base with the adapters merged in; the base is
    a reward model, or a language model if the adapter has a head.
    """
    source = model_folder(path)
    require_kind(source, "reward", option=option)
    compute_options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "attention": attention}
    has_head = model_kind(source._replace(adapters=())) == "reward"
    if has_head:
        model = _read_reward(source.base, **compute_options)
    else:
        model = reward_from_pretrained(load_pretrained(source.base, **compute_options), jax.random.key(0))
        model = replace(model, reading=reading_of(model.config, model.arch.family))
    for number, adapter in enumerate(source.adapters, 1):
        # The last adapter is the last chance for a head.
        needs_head = not has_head and number == len(source.adapters)
        params = merge_adapters(insert_adapter(model.params, model.arch, adapter, needs_head=needs_head))
        if params["head"]["kernel"] is not model.params["head"]["kernel"]:
            # The record of the base's normalisation does not apply to a new head.
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
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    option: str = "",
) -> RewardModel:
    """Load the model that a reward stage starts from: a reward model, or a language model with a new head.

    ``key`` draws the new head. A reward model keeps its scores, normalised or not, but its record of a normalisation
    is reset. Its head is exported like a new one, in float32 and with the bias in config.json.
    """
    compute_options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "attention": attention}
    if model_kind(model_folder(path)) == "language":
        return reward_from_pretrained(load_pretrained(path, option=option, **compute_options), key)
    model = load_reward_model(path, option=option, **compute_options)
    stored = {name: how for name, how in model.stored.items() if name not in (HEAD_KERNEL, HEAD_BIAS)}
    # Whatever its reading was, the stage trains it on texts up to the stop token.
    return replace(model, stored=stored, gain=1.0, bias=0.0, reading=STOP_TOKEN)


def _read_reward(
    folder: Path, *, dtype: Any, mesh: Mesh | None, remat: bool | Literal["auto"], attention: AttentionKernel
) -> RewardModel:
    config = read_config(folder)
    arch = arch_from_hf(config)
    gain, bias, head_bias = _check_head(folder, config)
    shapes = abstract_reward_params(arch)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, SHARDING_RULES)
    tensors = open_tensors(folder, arch)
    table = reward_model_table(arch, head_bias=HEAD_BIAS in tensors.stored)
    params = read_tree(tensors, arch, table, shapes, shardings)
    if "bias" not in params["head"]:
        # A NumPy scalar, which unlike a JAX array every host can put onto a mesh that spans hosts.
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
        rules=SHARDING_RULES,
        stored=tensors.stored,
        gain=gain,
        bias=bias,
        reading=reading_of(config, arch.family),
    )


def _check_head(folder: Path, config: Mapping[str, Any]) -> tuple[float, float, float]:
    # transformers counts the names of the labels and assumes two labels if neither field is set.
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise UsageError(f"{folder}: num_labels: a reward model must have 1 label, found {labels}")
    note = config.get(NOTE_KEY, {})
    values = [note.get(name, default) for name, default in (("gain", 1.0), ("bias", 0.0), ("head_bias", 0.0))]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UsageError(f"{folder}: {NOTE_KEY}: gain, bias and head_bias must be finite numbers, found {note}")
    gain, bias, head_bias = (float(value) for value in values)
    return gain, bias, head_bias


def save_reward_model(
    model: RewardModel,
    path: str | Path,
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a sequence-classification folder with one label; transformers' score lacks the head's bias.

    This bias, the record of the normalisation and the reading are stored in config.json under "jrlhf" and read back. If
    the source's head has a bias tensor, the bias goes there. ``save_pretrained`` explains ``dtype`` and ``files``.
    """
    in_tensor = HEAD_BIAS in model.stored
    note: dict[str, Any] = {"gain": model.gain, "bias": model.bias, SCORE_AT_KEY: model.reading.score_at}
    note["head_bias"] = 0.0 if in_tensor else float(model.params["head"]["bias"])
    config = model.config | {
        "architectures": [CLASSES[model.arch.family].sequence_classification],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    # An unchanged model of another tool keeps its config unchanged.
    if NOTE_KEY in config or note != {"gain": 1.0, "bias": 0.0, "head_bias": 0.0, SCORE_AT_KEY: "whole_chat"}:
        config[NOTE_KEY] = note
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
