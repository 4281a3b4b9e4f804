"""Hugging Face folders: where they are, what they hold, tensors in and out. Only JSON and safetensors are opened."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jrlhf.models.names import EMBEDDING, IGNORED, LM_HEAD, Entry
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
)
GENERATION_CONFIG = "generation_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def find_folder(path: str | Path) -> Path:
    """A local folder as it is, or the hub's snapshot of a hub id: its JSON, safetensors and tokenizer files only."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.suffix in _PICKLED:
        raise ValueError(f"{path}: pickled weights are never opened; convert them to a folder with safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) or folder.exists():
        raise FileNotFoundError(f"{path}: not a folder, and not a hub id")
    # Not at the top: it is only needed here, and slow to import.
    from huggingface_hub import snapshot_download

    wanted = ["model*.safetensors", INDEX, CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path}: no such folder, and the hub did not give it: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands."""
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


class Tensors:
    """The tensors of a folder by name, read in parts and on demand."""

    def __init__(self, handles: Mapping[str, Any], folder: Path) -> None:
        self._slices = {name: handle.get_slice(name) for name, handle in handles.items()}
        self.folder = folder
        self.dtypes: dict[str, str] = {name: part.get_dtype() for name, part in self._slices.items()}
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES:
                raise ValueError(f"{folder}: {name} is {dtype}; supported: {', '.join(_DTYPES)}")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        found = tuple(self._slices[name].get_shape())
        if found != shape:
            raise ValueError(f"{self.folder}: {name} has shape {list(found)}, the config asks for {list(shape)}")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slices[name][index].astype(np.float32)


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """``model.safetensors``, or the shards that the index names. Other formats are refused."""
    single, index = folder / WEIGHTS, folder / INDEX
    with ExitStack() as stack:

        def handle(file: Path) -> Any:
            try:
                return stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not a readable safetensors file: {error}") from error

        if single.is_file():
            opened = handle(single)
            handles = dict.fromkeys(opened.keys(), opened)
        elif index.is_file():
            weight_map = _read_json(index).get("weight_map")
            handles = _open_shards(index, weight_map, handle)
        else:
            pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
            hint = f"; {pickled[0]} is pickled and is never opened: convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"{folder}: no {WEIGHTS} and no {INDEX}{hint}")
        yield Tensors(handles, folder)


def _open_shards(index: Path, weight_map: Any, handle: Callable[[Path], Any]) -> dict[str, Any]:
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    for file in weight_map.values():
        # A name that leads elsewhere would read whatever it points to.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
    shards = {file: handle(index.parent / file) for file in sorted(set(weight_map.values()))}
    held = {file: set(shard.keys()) for file, shard in shards.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise ValueError(f"{index}: {name} is not in {file}")
    return {name: shards[file] for name, file in weight_map.items()}


def read_tree(tensors: Tensors, table: tuple[Entry, ...], shapes: Params, shardings: Params | None) -> Params:
    """The tree of ``table``'s entries in float32, leaf by leaf; of each only the parts that this host's devices hold.

    ``shapes``: a tree with at least these leaves. ValueError naming what is missing, unexpected or misshapen.
    """
    expected = {name for entry in table for name in names_of(entry, shapes)}
    _check_names(tensors, expected)
    tree: dict[str, Any] = {}
    for entry in table:
        shape = leaf_at(shapes, entry.path).shape
        for name in names_of(entry, shapes):
            tensors.check(name, _their_shape(entry, shape[1:] if entry.stacked else shape))
        read = _leaf_reader(tensors, entry, shape)
        if shardings is None:
            leaf = jnp.array(read((slice(None),) * len(shape)))
        else:
            leaf = jax.make_array_from_callback(shape, leaf_at(shardings, entry.path), read)  # pyright: ignore[reportArgumentType]
        parent = tree
        for key in entry.path[:-1]:
            parent = parent.setdefault(key, {})
        parent[entry.path[-1]] = leaf
    return tree


def _check_names(tensors: Tensors, expected: set[str]) -> None:
    found = {name for name in tensors.dtypes if not IGNORED.search(name)}
    extra = found - expected
    if LM_HEAD in extra and EMBEDDING in expected:
        # Some tied checkpoints hold the same matrix under both names.
        everything = (slice(None), slice(None))
        if np.array_equal(tensors.read(LM_HEAD, everything), tensors.read(EMBEDDING, everything)):
            extra.remove(LM_HEAD)
    problems = [("missing", sorted(expected - found)), ("unexpected", sorted(extra))]
    told = [
        f"{what} tensors: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" for what, names in problems if names
    ]
    if told:
        raise ValueError(f"{tensors.folder}: {'; '.join(told)}")


def _leaf_reader(tensors: Tensors, entry: Entry, shape: tuple[int, ...]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        match entry.form:
            case "same":
                return tensors.read(name, index)
            case "transposed":
                return tensors.read(name, index[::-1]).T
            case "row":
                return tensors.read(name, (slice(0, 1), *index))[0]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not entry.stacked:
            return np.ascontiguousarray(one(entry.name, index))
        layers = range(shape[0])[index[0]]
        sizes = (len(range(size)[part]) for size, part in zip(shape[1:], index[1:], strict=True))
        stacked = np.empty((len(layers), *sizes), np.float32)
        for place, layer in enumerate(layers):
            stacked[place] = one(entry.name.format(layer=layer), index[1:])
        return stacked

    return read


def their_tensors(tree: Params, table: tuple[Entry, ...], dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """``read_tree`` backwards: every tensor on this host, in the dtype it was read in (float32 if it is new).

    With several hosts all of them must call this: parts that others hold are gathered.
    """
    tensors: dict[str, np.ndarray] = {}
    for entry in table:
        leaf = leaf_at(tree, entry.path)
        gathered = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        values = np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if gathered else leaf)
        layers = values if entry.stacked else values[None]
        for name, value in zip(names_of(entry, tree), layers, strict=True):
            theirs = {"same": value, "transposed": value.T, "row": value[None]}[entry.form]
            tensors[name] = np.ascontiguousarray(theirs.astype(_DTYPES[dtypes.get(name, "F32")]))
    if LM_HEAD in dtypes and LM_HEAD not in tensors and EMBEDDING in tensors:
        tensors[LM_HEAD] = tensors[EMBEDDING].astype(_DTYPES[dtypes[LM_HEAD]])
    return tensors


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray], source: Path, copied: tuple[str, ...]
) -> None:
    """``config.json``, ``model.safetensors`` and those ``copied`` files that ``source`` has; the first host writes.

    The config comes last, and each file appears whole or not at all: a broken-off export cannot be loaded.
    """
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in copied:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_bytes(_config_bytes(config, source))
    os.replace(partial, folder / CONFIG)


def _config_bytes(config: Mapping[str, Any], source: Path) -> bytes:
    """The source's own bytes while they say the same: another writer's spacing and number format are kept."""
    original = source / CONFIG
    if original.is_file() and _read_json(original) == config:
        return original.read_bytes()
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


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


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    match entry.form:
        case "same":
            return shape
        case "transposed":
            return shape[::-1]
        case "row":
            return (1, *shape)
