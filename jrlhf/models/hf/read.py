"""Reading of a Hugging Face folder's tensors, in parts, and checks of their names and shapes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import DTYPES, INDEX, PICKLE_SUFFIXES, WEIGHTS, Stored, leaf_at, names_of, read_json
from jrlhf.models.hf.names import IGNORED, Entry, Fused, base_prefix, decoder_table, lm_head_name
from jrlhf.system.errors import UsageError
from jrlhf.types import Params


class Tensors:
    """The tensors of a folder by name, read in parts and on demand.

    Each read opens the file again, so that its mapped memory is released at once.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], prefix: str) -> None:
        self.folder = folder
        self._file_names = {prefix + name: name for name in files}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stamps = {file: _stamp(folder / file) for file in files.values()}
        self.stored: dict[str, Stored] = {}
        for file in sorted(set(files.values())):
            with _open_file(folder / file) as handle:
                for name in (name for name, where in files.items() if where == file):
                    part = handle.get_slice(name)
                    self._shapes[prefix + name] = tuple(part.get_shape())
                    self.stored[prefix + name] = Stored(part.get_dtype(), file)
        for name, (dtype, _) in self.stored.items():
            if dtype not in DTYPES:
                raise UsageError(f"{folder}: {name} is {dtype}; supported: {', '.join(DTYPES)}")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UsageError if a tensor has another shape."""
        actual = self._shapes[name]
        if actual != shape:
            raise UsageError(f"{self.folder}: {name} has shape {list(actual)}, the config asks for {list(shape)}")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read part of a tensor in float32. Raise UsageError if its file has changed since it was opened first."""
        file = self.stored[name].file
        if _stamp(self.folder / file) != self._stamps[file]:
            raise UsageError(f"{self.folder / file}: has changed since the model was loaded")
        with _open_file(self.folder / file) as handle:
            return handle.get_slice(self._file_names[name])[index].astype(np.float32)


def _stamp(file: Path) -> tuple[int, int]:
    """Return the size and the time of the last change of a file."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _open_file(file: Path) -> Iterator[Any]:
    try:
        handle: Any = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: not a readable safetensors file: {error}") from error
    with handle:
        yield handle


def open_tensors(folder: Path, arch: ArchConfig) -> Tensors:
    """Open ``model.safetensors`` or the shards of its index; other formats are refused."""
    if (folder / WEIGHTS).is_file():
        with _open_file(folder / WEIGHTS) as handle:
            files = dict.fromkeys(handle.keys(), WEIGHTS)
    elif (folder / INDEX).is_file():
        files = _shard_map(folder / INDEX)
    else:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} and no {INDEX}{_conversion_hint(folder, pickled)}")
    base = base_prefix(arch) + "."
    return Tensors(folder, files, "" if any(name.startswith(base) for name in files) else base)


def _conversion_hint(folder: Path, pickled: list[str]) -> str:
    """Return a command that converts pickled weights, which jrlhf never opens because they can run any code."""
    if not pickled:
        return ""
    command = (
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
    )
    return f"; {pickled[0]} is pickled and is never opened: if you trust it, convert it (needs torch): {command}"


def _shard_map(index: Path) -> dict[str, str]:
    """Read and check the index, which maps each tensor to its file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UsageError(f"{index}: weight_map must map tensor names to file names")
    for file in sorted(set(weight_map.values())):
        # A name that leads out of the folder could read any file.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UsageError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
        with _open_file(index.parent / file) as handle:
            file_names = set(handle.keys())
        for name in (name for name, where in weight_map.items() if where == file):
            if name not in file_names:
                raise UsageError(f"{index}: {name} is not in {file}")
    return weight_map


def check_tensors(tensors: Tensors, arch: ArchConfig, table: tuple[Entry, ...], shapes: Params) -> None:
    """Raise UsageError with the names of missing, unexpected or wrongly shaped tensors.

    ``shapes`` is a tree with at least the leaves of ``table``.
    """
    if arch.num_layers > len(tensors.stored):
        has = f"has {len(tensors.stored)} tensors"
        raise UsageError(f"{tensors.folder}: the config asks for {arch.num_layers} layers, the folder {has}")
    _check_names(tensors, arch, {name for entry in table for name in names_of(entry, shapes)})
    for entry in table:
        shape = leaf_at(shapes, entry.path).shape
        for name in names_of(entry, shapes):
            tensors.check(name, tensor_shape(entry, shape[1:] if entry.stacked else shape))


def _check_names(tensors: Tensors, arch: ArchConfig, expected: set[str]) -> None:
    actual = {name for name in tensors.stored if not IGNORED.search(name)}
    extra, head = actual - expected, lm_head_name(arch)
    if arch.tie_embeddings and head in extra:
        # Some tied checkpoints store the same matrix under both names.
        everything = (slice(None), slice(None))
        if np.array_equal(tensors.read(head, everything), tensors.read(_embedding_name(arch), everything)):
            extra.remove(head)
    problems = [("missing", sorted(expected - actual)), ("unexpected", sorted(extra))]
    messages = [
        f"{what} tensors: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" for what, names in problems if names
    ]
    if messages:
        hints = _hints(arch, expected - actual, extra)
        raise UsageError(f"{tensors.folder}: {'; '.join(messages + hints)}")


def _hints(arch: ArchConfig, missing: set[str], extra: set[str]) -> list[str]:
    """Return advice for common cases of missing and unexpected tensors."""
    head, embedding = lm_head_name(arch), _embedding_name(arch)
    hints = []
    if arch.tie_embeddings and head in extra:
        hints.append(
            f"config.json says tie_word_embeddings, but {head} is not {embedding}: transformers 5 then does not tie "
            f"them and 4 drops {head}; set tie_word_embeddings to false to use it, or remove it from the file"
        )
    if head in missing and "score.weight" not in extra:
        hints.append(f"if {head} is the embedding, set tie_word_embeddings to true in config.json")
    if "score.weight" in extra:
        hints.append("score.weight is a reward model's head: if it is one, correct architectures in config.json")
    return hints


def _embedding_name(arch: ArchConfig) -> str:
    return next(entry.name for entry in decoder_table(arch) if entry.path == ("embed",))


def leaf_reader(
    tensors: Tensors, entry: Entry, shape: tuple[int, ...], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Return a function that reads a part of a leaf into ``dtype``, with no more than one tensor in float32."""

    def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if entry.fused is not None:
            tensor = tensors.read(name, (slice(None),) * len(index))
            return split_fused(tensor.T if entry.form == "transposed" else tensor, entry.fused)[index]
        match entry.form:
            case "same":
                return tensors.read(name, index)
            case "transposed":
                return tensors.read(name, index[::-1]).T
            case "row":
                return np.asarray(tensors.read(name, (slice(0, 1), *index))[0])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not entry.stacked:
            # ascontiguousarray would turn a scalar into a vector.
            return np.asarray(one(entry.name, index), dtype, order="C")
        layers = range(shape[0])[index[0]]
        sizes = (len(range(size)[part]) for size, part in zip(shape[1:], index[1:], strict=True))
        stacked = np.empty((len(layers), *sizes), dtype)
        for place, layer in enumerate(layers):
            stacked[place] = one(entry.name.format(layer=layer), index[1:])
        return stacked

    return read


def split_fused(x: np.ndarray, fused: Fused) -> np.ndarray:
    """Extract one of queries, keys and values from a fused tensor: ``[..., groups · 3 · n] -> [..., groups · n]``."""
    grouped = x.reshape(*x.shape[:-1], fused.groups, 3, -1)
    return grouped[..., fused.part, :].reshape(*x.shape[:-1], -1)


def tensor_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the checkpoint's tensor for a leaf (or one layer of it) of shape ``shape``."""
    if entry.fused is not None:
        shape = (*shape[:-1], 3 * shape[-1])
    match entry.form:
        case "same":
            return shape
        case "transposed":
            return shape[::-1]
        case "row":
            return (1, *shape)
