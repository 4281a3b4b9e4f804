"""What leaves a run as a Hugging Face folder: one writer for every stage, and for ``jrlhf export``."""

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from jrlhf.config import LoRAConfig
from jrlhf.core import combine, partition
from jrlhf.data import Tokenizer, load_tokenizer, stop_token_ids, tokenizer_files
from jrlhf.models import (
    STOP_TOKEN,
    Pretrained,
    RewardModel,
    WeightDtype,
    is_trained,
    merge_adapters,
    round_to_stored,
    save_adapter,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.folder import GENERATION_CONFIG
from jrlhf.models.hf.folder_files import generation_config, is_inside, write_files
from jrlhf.parallel import fetch, is_first
from jrlhf.types import Params

RUN_CONFIG = "jrlhf.yaml"
"""Beside the weights: the config of the run that made them."""
HEAD = "score."


class Companions(NamedTuple):
    """What an export has beside its weights. It is read before training, and saved with every checkpoint."""

    tokenizer: Mapping[str, bytes]
    """The tokenizer's files by name."""
    pad_token: int
    stop_tokens: tuple[int, ...]
    """All that ends an answer; empty where a model gives none."""
    config: str
    """The run's config as YAML."""


def companions(tokenizer: Tokenizer, config: str, *, stop: tuple[str, ...] | None) -> Companions:
    """The companions of a model with this tokenizer. ``stop``: tokens that end its answers besides the tokenizer's own;
    None for a reward model, which gives no answers."""
    stops = () if stop is None else stop_token_ids(tokenizer, stop)
    return Companions(tokenizer_files(tokenizer), int(tokenizer.pad_token_id), stops, config)


def as_metadata(beside: Companions) -> dict[str, Any]:
    """Companions as JSON, for a checkpoint; files that are not UTF-8 stand apart, in base64."""
    texts, binaries = dict[str, str](), dict[str, str]()
    for name, content in beside.tokenizer.items():
        try:
            texts[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            binaries[name] = base64.b64encode(content).decode("ascii")
    return {
        "config": beside.config,
        "tokenizer": texts,
        "tokenizer_base64": binaries,
        "pad_token": beside.pad_token,
        "stop_tokens": list(beside.stop_tokens),
    }


def from_metadata(saved: Mapping[str, Any], *, stop: tuple[str, ...] | None, where: Path) -> Companions:
    """``as_metadata`` backwards. ValueError, which names ``where`` it was saved, for a file that would lie elsewhere.

    Checkpoints of earlier versions have the tokenizer alone: their tokens are read from it, as ``companions`` does.
    """
    files = {name: text.encode("utf-8") for name, text in saved["tokenizer"].items()}
    files |= {name: base64.b64decode(text) for name, text in saved.get("tokenizer_base64", {}).items()}
    if outside := [name for name in files if not is_inside(name)]:
        raise ValueError(f"{where}: {outside[0]!r} is not the name of a tokenizer's file")
    if "pad_token" in saved:
        return Companions(files, int(saved["pad_token"]), tuple(saved["stop_tokens"]), saved["config"])
    with TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return companions(load_tokenizer(folder), saved["config"], stop=stop)


def exported_form(model: Pretrained | RewardModel, dtype: WeightDtype) -> Callable[[Params], Params]:
    """Parameters to the ones that an export of them holds: what figures are of, where they judge what is passed on.

    In float32 these are the parameters themselves; else adapters are merged, and each weight rounded to the dtype that
    the source has it in.
    """
    stored = _stored(model)
    if dtype == "float32" or all(tensor.dtype == "F32" for tensor in stored.values()):
        return lambda params: params
    return lambda params: round_to_stored(merge_adapters(params), model.arch, stored)


def write_export(
    model: Pretrained | RewardModel, params: Params, folder: Path, *, beside: Companions, dtype: WeightDtype
) -> None:
    """The model with ``params``, adapters merged in, as a folder that any reader of the format takes as it was here.

    config.json and generation_config.json name the pad token of the tokenizer that goes with them, which transformers
    needs to find a batch's last tokens; and generation_config.json all tokens that end an answer.
    """
    config = model.config | {"pad_token_id": beside.pad_token}
    files = {**beside.tokenizer, RUN_CONFIG: beside.config.encode("utf-8")}
    merged = merge_adapters(params)
    match model:
        case RewardModel():
            # Whatever it began as, a run trains it to be read at the token that ends an answer.
            model = replace(model, params=merged, config=config, stored=_stored(model), reading=STOP_TOKEN)
            save_reward_model(model, folder, dtype=dtype, files=files)
        case Pretrained():
            files |= _generation(model, beside)
            save_pretrained(replace(model, params=merged, config=config), folder, dtype=dtype, files=files)


def write_adapter(
    model: Pretrained | RewardModel, params: Params, lora: LoRAConfig, folder: Path, *, base: str, beside: Companions
) -> None:
    """A PEFT folder beside the merged model; nothing without ``lora``. ``base``: where the frozen weights are from.

    A base in the same run is named relative to ``folder``, so that the two may move together. PEFT reads such a path
    from where its process runs: elsewhere load the base first, then ``PeftModel.from_pretrained(base, folder)``.
    """
    if not lora.rank:
        return
    learnt, frozen = partition(params, is_trained)
    params = combine(fetch(learnt), frozen)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, beside.tokenizer)
        if isinstance(model, Pretrained):
            write_files(folder, _generation(model, beside))
        save_adapter(params, model.arch, folder, base=_base_name(base, folder), alpha=lora.alpha)


def _base_name(base: str, folder: Path) -> str:
    """How an adapter in ``folder``, which is ``<run>/<stage>/peft``, names its base."""
    if not Path(base).is_dir():
        return base
    target, run = Path(base).resolve(), folder.resolve().parent.parent
    return Path(os.path.relpath(target, folder.resolve())).as_posix() if target.is_relative_to(run) else str(target)


def _generation(model: Pretrained, beside: Companions) -> dict[str, bytes]:
    content = generation_config(model.source, model.config, stop_tokens=beside.stop_tokens, pad_token=beside.pad_token)
    return {GENERATION_CONFIG: content}


def _stored(model: Pretrained | RewardModel) -> Mapping[str, Any]:
    """The source's dtypes; a reward model's head, into which the normalisation is folded, is float32 in any export."""
    return {
        name: tensor._replace(dtype="F32") if name.startswith(HEAD) else tensor for name, tensor in model.stored.items()
    }
