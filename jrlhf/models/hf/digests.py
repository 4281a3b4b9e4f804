"""Digests of the files of a model's folder, by which two folders are told apart without comparing every byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import xxhash

from jrlhf.models.hf.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, read_json

ModelFileKind = Literal["weights", "config", "tokenizer"]

WHOLE = 64 * 2**20
"""Bytes of a weights file up to which all of it is read."""
BLOCKS, BLOCK = 512, 128 * 2**10
"""Of a larger one about so many blocks, of so many bytes each, are read: 64 MiB, and a block more for each tensor."""

CONFIGS = (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG)
NOTES = ("_name_or_path", "base_model_name_or_path", "transformers_version")
"""Keys of a config that say where a model was and who wrote it, not what it is."""
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)


class ModelFile(NamedTuple):
    """A file of a model's folder, and what it is there for."""

    kind: ModelFileKind
    name: str
    """Its path in the folder."""


def model_files(folder: Path) -> list[ModelFile]:
    """The weights, configs and tokenizer files that a folder has; what it lacks, its reader will say."""
    weights = [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    by_kind: dict[ModelFileKind, list[str]] = {"weights": [*weights, ADAPTER_WEIGHTS], "config": [*CONFIGS]}
    files = [ModelFile(kind, name) for kind, names in by_kind.items() for name in names if (folder / name).is_file()]
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return files + [ModelFile("tokenizer", path.relative_to(folder).as_posix()) for path in sorted(found)]


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    named = read_json(index).get("weight_map") if index.is_file() else None
    # What is no name of a file in this folder, whoever reads the weights refuses.
    names = named.values() if isinstance(named, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and Path(name).name == name})


def model_file_digest(path: Path, kind: ModelFileKind) -> str:
    """The digest of one file of a model's folder, by what it is there for."""
    match kind:
        case "weights":
            return weights_digest(path)
        case "config":
            return config_digest(path)
        case "tokenizer":
            return file_digest(path)


def file_digest(path: Path) -> str:
    """The digest of all bytes of a small file."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def config_digest(path: Path) -> str:
    """The digest of what a JSON object says, whatever its layout, but for ``NOTES``."""
    content = {name: value for name, value in read_json(path).items() if name not in NOTES}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def weights_digest(path: Path) -> str:
    """The digest of a safetensors file: its size, its header, and its tensors.

    A file of up to 64 MiB is read whole. Of a larger one tensors of up to 128 KiB are, and blocks of the others that
    are spread evenly over each: a block at least, and 512 more in proportion to their sizes. So 128 MiB are read at
    most, and a change is seen unless it is confined to a small part of one large tensor, as no training is.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= WHOLE:
            while part := file.read(2**20):
                digest.update(part)
            return digest.hexdigest()
        for start, length in _sample(file, size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """``(start, length)`` of what is read of a large file, in its order."""
    data = 8 + int.from_bytes(file.read(8), "little")
    tensors = _tensors(file, data, size)
    yield 0, min(data, size, WHOLE)
    # Many tensors have small blocks, so that no file has more than twice the bytes of a whole one.
    block = min(BLOCK, WHOLE // max(len(tensors), 1))
    total = max(sum(length for _, length in tensors), 1)
    for start, length in tensors:
        count = 1 + BLOCKS * length // total
        if length <= count * block:
            yield start, length
        else:
            yield from ((start + (length - block) * (2 * i + 1) // (2 * count), block) for i in range(count))


def _tensors(file: BinaryIO, data: int, size: int) -> list[tuple[int, int]]:
    """``(start, length)`` of each tensor; where the header cannot be read, all that follows counts as one."""
    try:
        if data > size:
            raise ValueError
        header: dict[str, Any] = json.loads(file.read(data - 8))
        offsets = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
        return [(data + int(start), int(end) - int(start)) for start, end in offsets]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [(0, size)]
