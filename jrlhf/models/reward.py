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
from jrlhf.models.frozen import ExactFn, FrozenDtype, as_it_is, stored_shapes
from jrlhf.models.functions import abstract_params, abstract_reward_params, decoder_fns, init_head, reward_params
from jrlhf.models.hf.adapter_folder import model_folder, model_kind, require_kind
from jrlhf.models.hf.families import CLASSES, arch_from_hf
from jrlhf.models.hf.folder import TOKENIZER_FILES, Stored, read_config
from jrlhf.models.hf.names import (
    HEAD_BIAS,
    HEAD_KERNEL,
    SHARDING_RULES,
    language_model_table,
    reward_model_table,
)
from jrlhf.models.hf.peft import is_own_adapter
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.read import Tensors, check_tensors, open_tensors
from jrlhf.models.hf.weights import Weights
from jrlhf.models.hf.write import WeightDtype, write_folder
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
    """``{"decoder": ..., "head": {"kernel", "bias"}}`` in float32, but for a decoder of frozen weights that is rounded;
    the head includes the normalisation."""
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
    exact: ExactFn = field(default=as_it_is, repr=False)
    """``(path, leaf) -> leaf``: a leaf of ``params`` in float32, as the source has it."""

    def score(self, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Return each row's score at the token that ``reading`` selects; 0 for a row without tokens."""
        return at_last_token(self.score_fn(params, tokens, mask), self.reading.last(tokens, mask))


def reward_from_pretrained(pretrained: Pretrained, key: Key) -> RewardModel:
    """Build a reward model from a language model's decoder; the head's kernel is normal with std 1/√(d+1), its bias 0.

    The decoder's arrays are shared, not copied: donating one model's parameters invalidates the other's.
    """
    of_decoder = pretrained.exact
    return RewardModel(
        params=reward_params(pretrained.params, pretrained.arch, key),
        score_fn=pretrained.score_fn,
        config=pretrained.config,
        arch=pretrained.arch,
        source=pretrained.source,
        rules=pretrained.rules,
        stored=pretrained.stored,
        # The head, which the language model lacks, is never rounded.
        exact=lambda path, leaf: leaf if path[0] == "head" else of_decoder(path[1:], leaf),
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
    weights: FrozenDtype = "float32",
    option: str = "",
) -> RewardModel:
    """Load a reward model from a sequence-classification folder or hub id with one label.

    The options are those of ``load_pretrained``. A PEFT folder gives its base with the adapters merged in; the base is
    a reward model, or a language model if the adapter has a head.
    """
    source = model_folder(path)
    require_kind(source, "reward", option=option)
    config = read_config(source.base)
    arch = arch_from_hf(config)
    shapes = stored_shapes(abstract_reward_params(arch), weights, dtype)
    shardings = None if mesh is None else tree_shardings(shapes, mesh, SHARDING_RULES)
    tensors = open_tensors(source.base, arch)
    model = RewardModel(
        params={"decoder": shapes["decoder"], "head": None},
        score_fn=decoder_fns(arch, dtype=dtype, remat=remat, attention=attention, mesh=mesh).score_fn,
        config=config,
        arch=arch,
        source=source.base,
        rules=SHARDING_RULES,
        stored=tensors.stored,
        reading=reading_of(config, arch.family),
    )
    has_head = model_kind(source._replace(adapters=())) == "reward"
    model = _with_head(model, tensors, shapes, shardings) if has_head else _with_new_head(model, tensors)
    model, adapters = _with_adapters(model, source.adapters, has_head=has_head)
    table = [entry for entry in reward_model_table(arch) if entry.path[0] == "decoder"]
    on_disk = Weights(tensors, table, shapes, shardings, adapters)
    return replace(model, params=on_disk.tree() | {"head": model.params["head"]}, exact=on_disk.exact)


def _with_head(model: RewardModel, tensors: Tensors, shapes: Params, shardings: Params | None) -> RewardModel:
    """Check the tensors of a reward model's folder, and read its head and the record of its normalisation."""
    gain, bias, head_bias = _check_head(model.source, model.config)
    table = reward_model_table(model.arch, head_bias=HEAD_BIAS in tensors.stored)
    check_tensors(tensors, model.arch, table, shapes)
    head = Weights(tensors, [entry for entry in table if entry.path[0] == "head"], shapes, shardings).tree()["head"]
    if "bias" not in head:
        # A NumPy scalar, which unlike a JAX array every host can put onto a mesh that spans hosts.
        scalar = np.float32(head_bias)
        head["bias"] = (
            jax.device_put(scalar) if shardings is None else jax.device_put(scalar, shardings["head"]["bias"])
        )
    return replace(model, params=model.params | {"head": head}, gain=gain, bias=bias)


def _with_new_head(model: RewardModel, tensors: Tensors) -> RewardModel:
    """Check the tensors of a language model's folder, and draw a head, which an adapter will replace."""
    check_tensors(tensors, model.arch, language_model_table(model.arch), abstract_params(model.arch))
    return replace(model, params=model.params | {"head": init_head(model.arch, jax.random.key(0))})


def _with_adapters(
    model: RewardModel, folders: tuple[Path, ...], *, has_head: bool
) -> tuple[RewardModel, list[Params]]:
    """Read adapters for a model whose decoder is still shapes: its head and reading, and the factors for its decoder.

    The factors are trees with the leaves of an adapter beside those of its kernel.
    """
    adapters = []
    for number, folder in enumerate(folders, 1):
        # The last adapter is the last chance for a head.
        needs_head = not has_head and number == len(folders)
        params = insert_adapter(model.params, model.arch, folder, needs_head=needs_head)
        if params["head"]["kernel"] is not model.params["head"]["kernel"]:
            # The record of the base's normalisation does not apply to a new head.
            has_head, model = True, replace(model, gain=1.0, bias=0.0)
        adapters.append({"decoder": params["decoder"]})
        reading = STOP_TOKEN if is_own_adapter(folder) else model.reading
        model = replace(model, params=model.params | {"head": params["head"]}, reading=reading)
    return model, adapters


def load_reward_start(
    path: str | Path,
    key: Key,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    weights: FrozenDtype = "float32",
    option: str = "",
) -> RewardModel:
    """Load the model that a reward stage starts from: a reward model, or a language model with a new head.

    ``key`` draws the new head. A reward model keeps its scores, normalised or not, but its record of a normalisation
    is reset. Its head is exported like a new one, in float32 and with the bias in config.json.
    """
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "attention": attention}
    options |= {"weights": weights, "option": option}
    if model_kind(model_folder(path)) == "language":
        return reward_from_pretrained(load_pretrained(path, **options), key)
    model = load_reward_model(path, **options)
    stored = {name: how for name, how in model.stored.items() if name not in (HEAD_KERNEL, HEAD_BIAS)}
    # Whatever its reading was, the stage trains it on texts up to the stop token.
    return replace(model, stored=stored, gain=1.0, bias=0.0, reading=STOP_TOKEN)


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
