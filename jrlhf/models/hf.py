"""Hugging Face folders: where they are, what they hold, and how our leaves are called there."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jrlhf.models.names import Entry
from jrlhf.paths import expanded
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
"""Patterns of the files that transformers reads a tokenizer from."""
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
    """A local folder as it is, or the hub's snapshot of a hub id: its JSON, safetensors and tokenizer files only.

    Without ``weights`` no more than its configs and its tokenizer.
    """
    folder = Path(expanded(str(path)))
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLED:
        raise ValueError(f"{path}: pickled weights are never opened; convert them to a folder with safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) or folder.exists():
        raise FileNotFoundError(f"{path}: not a folder, and not a hub id")
    # Not at the top: it is only needed here, and slow to import.
    from huggingface_hub import snapshot_download

    adapter = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    wanted = ["model*.safetensors", INDEX, CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, *adapter]
    wanted = wanted if weights else [CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path}: no such folder, and the hub did not give it: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands."""
    return read_json(folder / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


class Stored(NamedTuple):
    """How a checkpoint keeps a tensor; an export keeps it so."""

    dtype: str
    file: str


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def names_of(entry: Entry, tree: Params) -> list[str]:
    """Their names of one of our leaves: one a layer where layers are stacked."""
    if not entry.stacked:
        return [entry.name]
    return [entry.name.format(layer=layer) for layer in range(leaf_at(tree, entry.path).shape[0])]
