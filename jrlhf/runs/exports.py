"""Export of models as Hugging Face folders, for every stage and for ``jrlhf export``."""

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
    Pretrained,
    RewardModel,
    is_trained,
    merge_adapters,
    save_adapter,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.folder import GENERATION_CONFIG
from jrlhf.models.hf.folder_files import generation_config, is_inside, write_files
from jrlhf.models.hf.rounding import round_to_stored
from jrlhf.models.hf.write import WeightDtype
from jrlhf.models.reading import STOP_TOKEN
from jrlhf.parallel import fetch, is_first
from jrlhf.system.errors import UsageError
from jrlhf.types import Params

RUN_CONFIG = "jrlhf.yaml"
"""Name of the run's config beside the exported weights."""
HEAD = "score."


class Companions(NamedTuple):
    """The content of an export other than weights, which is read before training and saved with every checkpoint."""

    tokenizer: Mapping[str, bytes]
    """The tokenizer's files by name."""
    pad_token: int
    stop_tokens: tuple[int, ...]
    """Ids of all tokens that end an answer; empty for a reward model."""
    config: str
    """The run's config as YAML."""


def companions(tokenizer: Tokenizer, config: str, *, stop: tuple[str, ...] | None) -> Companions:
    """Return the companions of a model with this tokenizer.

    ``stop`` names stop tokens in addition to the tokenizer's own; None means a reward model, which gives no answers.
    """
    stops = () if stop is None else stop_token_ids(tokenizer, stop)
    return Companions(tokenizer_files(tokenizer), int(tokenizer.pad_token_id), stops, config)


def as_metadata(beside: Companions) -> dict[str, Any]:
    """Return companions as JSON for a checkpoint; files that are not UTF-8 are encoded in base64."""
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
    """Read companions from the JSON of ``as_metadata``; ValueErrors name the checkpoint ``where`` it was saved.

    Checkpoints of earlier versions only have the tokenizer, so their tokens are read from it as in ``companions``. A
    file name that leads out of the folder is a ValueError.
    """
    files = {name: text.encode("utf-8") for name, text in saved["tokenizer"].items()}
    files |= {name: base64.b64decode(text) for name, text in saved.get("tokenizer_base64", {}).items()}
    if outside_names := [name for name in files if not is_inside(name)]:
        raise UsageError(f"{where}: {outside_names[0]!r} is not the name of a tokenizer's file")
    if "pad_token" in saved:
        return Companions(files, int(saved["pad_token"]), tuple(saved["stop_tokens"]), saved["config"])
    with TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return companions(load_tokenizer(folder), saved["config"], stop=stop)


def exported_form(model: Pretrained | RewardModel, dtype: WeightDtype) -> Callable[[Params], Params]:
    """Return a function from parameters to those that their export contains, for figures about the exported model.

    For a float32 export these are the parameters themselves; otherwise adapters are merged and each weight is rounded
    to its dtype in the source.
    """
    stored = _stored(model)
    if dtype == "float32" or all(tensor.dtype == "F32" for tensor in stored.values()):
        return lambda params: params
    return lambda params: round_to_stored(merge_adapters(params, model.exact), model.arch, stored)


def write_export(
    model: Pretrained | RewardModel, params: Params, folder: Path, *, beside: Companions, dtype: WeightDtype
) -> None:
    """Write the model with ``params``, adapters merged in, as a Hugging Face folder.

    Frozen weights are written as the source has them, whatever their dtype in memory.
    config.json and generation_config.json name the tokenizer's pad token, which transformers needs to find a batch's
    last tokens. generation_config.json names all stop tokens.
    """
    config = model.config | {"pad_token_id": beside.pad_token}
    files = {**beside.tokenizer, RUN_CONFIG: beside.config.encode("utf-8")}
    merged = merge_adapters(params, model.exact)
    match model:
        case RewardModel():
            # Whatever the model's reading was, a run trains it to be read at the stop token of an answer.
            model = replace(model, params=merged, config=config, stored=_stored(model), reading=STOP_TOKEN)
            save_reward_model(model, folder, dtype=dtype, files=files)
        case Pretrained():
            files |= _generation(model, beside)
            save_pretrained(replace(model, params=merged, config=config), folder, dtype=dtype, files=files)


def write_adapter(
    model: Pretrained | RewardModel, params: Params, lora: LoRAConfig, folder: Path, *, base: str, beside: Companions
) -> None:
    """Write the adapters as a PEFT folder beside the merged model, if ``lora`` is on; ``base`` is the base's path.

    A base in the same run is named relative to ``folder``, so that both can move together. PEFT resolves such a path
    from the working directory; from another one load the base first, then ``PeftModel.from_pretrained(base, folder)``.
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
    """Return the name of its base for an adapter in ``folder``, which is ``<run>/<stage>/peft``."""
    if not Path(base).is_dir():
        return base
    target, run = Path(base).resolve(), folder.resolve().parent.parent
    return Path(os.path.relpath(target, folder.resolve())).as_posix() if target.is_relative_to(run) else str(target)


def _generation(model: Pretrained, beside: Companions) -> dict[str, bytes]:
    content = generation_config(model.source, model.config, stop_tokens=beside.stop_tokens, pad_token=beside.pad_token)
    return {GENERATION_CONFIG: content}


def _stored(model: Pretrained | RewardModel) -> Mapping[str, Any]:
    """Return the source's dtypes, with float32 for a reward model's head, which includes the normalisation."""
    return {
        name: tensor._replace(dtype="F32") if name.startswith(HEAD) else tensor for name, tensor in model.stored.items()
    }
