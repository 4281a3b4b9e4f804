"""Hugging Face folders: finding them locally or on the hub, their JSON files, and the names of their tensors."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jrlhf.models.hf.names import Entry
from jrlhf.system.errors import UsageError
from jrlhf.system.paths import expanded
from jrlhf.system.suggest import near_folder
from jrlhf.types import Params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.*.json",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Patterns of the files of a tokenizer in transformers."""
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def find_folder(path: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """Return a local folder, or download the JSON, safetensors and tokenizer files of a hub id.

    Without ``weights`` only configs and tokenizer are downloaded. ``revision`` applies to a hub id. Raises
    FileNotFoundError with similar folder names if there is neither.
    """
    if not str(path):
        raise FileNotFoundError("the path of a model is empty: name a Hugging Face folder or a hub id")
    folder = Path(expanded(str(path)))
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLE_SUFFIXES:
        raise UsageError(f"{path}: pickled weights are never opened; convert them to a folder with safetensors")
    if folder.exists():
        raise FileNotFoundError(f"{path}: is a file; name the Hugging Face folder that contains it")
    if not _may_be_hub_id(str(path)):
        raise FileNotFoundError(f"{path}: no such folder{near_folder(folder)}")
    # Imported here because the import is slow and only a hub id needs it.
    from huggingface_hub import snapshot_download

    small = [CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, ADAPTER_CONFIG]
    patterns = [*(["model*.safetensors", INDEX, ADAPTER_WEIGHTS] if weights else []), *small]
    revision_argument: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, **revision_argument))
    except (OSError, ValueError) as error:
        missing = f"{path}: no such folder{near_folder(folder)}"
        raise FileNotFoundError(f"{missing}; and no such model on the hub: {_reason(error)}") from error


def _may_be_hub_id(path: str) -> bool:
    """Tell whether the path has the form of a hub id; paths from ., / or ~ and deeper paths are folders."""
    name = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(f"{name}(/{name})?", path) is not None and "--" not in path and ".." not in path


def _reason(error: Exception) -> str:
    """Explain a hub error in one line, since the library's messages have many."""
    match type(error).__name__:
        case "LocalEntryNotFoundError" | "OfflineModeIsEnabled":
            return "it is not in the local cache, and the hub was not reached (offline, or HF_HUB_OFFLINE is set)"
        case "GatedRepoError":
            return "its owner must grant you access: request it there, then log in with `hf auth login`"
        case "RepositoryNotFoundError":
            return "it has no such model (or a private one: log in with `hf auth login`)"
    return next((line for line in str(error).split("\n") if line.strip()), type(error).__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; a missing one is a FileNotFoundError that names subfolders which have one."""
    if folder.is_dir() and not (folder / CONFIG).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        listed = f"; there is one in {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else ""
        raise FileNotFoundError(f"{folder / CONFIG}: missing, so this is not a Hugging Face model folder{listed}")
    return read_json(folder / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; every error names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected a JSON object")
    return content


class Stored(NamedTuple):
    """The dtype and file of a tensor in a checkpoint, which an export keeps."""

    dtype: str
    file: str


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """Return the leaf at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def names_of(entry: Entry, tree: Params) -> list[str]:
    """Return the Hugging Face names of a leaf: one per layer if layers are stacked."""
    if not entry.stacked:
        return [entry.name]
    return [entry.name.format(layer=layer) for layer in range(leaf_at(tree, entry.path).shape[0])]
