"""Digests of the files of a model's folder, which distinguish folders without reading every byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import xxhash

from jrlhf.models.hf.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, read_json

ModelFileKind = Literal["weights", "config", "tokenizer"]

MAX_FULL_READ = 64 * 2**20
"""Size in bytes up to which a whole weights file is read."""
SAMPLE_BLOCKS, BLOCK_BYTES = 512, 128 * 2**10
"""Number and size in bytes of the blocks that are read of a larger file; each tensor adds one more block."""

CONFIGS = (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG)
IGNORED_KEYS = ("_name_or_path", "base_model_name_or_path", "transformers_version")
"""Keys of a config that do not describe the model but its location and writer."""
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
    """A file of a model's folder and its purpose."""

    kind: ModelFileKind
    name: str
    """Path in the folder."""


def model_files(folder: Path) -> list[ModelFile]:
    """List the weights, configs and tokenizer files in a folder; reading the model reports missing files."""
    weights = [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    by_kind: dict[ModelFileKind, list[str]] = {"weights": [*weights, ADAPTER_WEIGHTS], "config": [*CONFIGS]}
    files = [ModelFile(kind, name) for kind, names in by_kind.items() for name in names if (folder / name).is_file()]
    tokenizer_files = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return files + [ModelFile("tokenizer", path.relative_to(folder).as_posix()) for path in sorted(tokenizer_files)]


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    # Names that lead out of the folder are skipped; reading the weights reports them.
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and Path(name).name == name})


def model_file_digest(path: Path, kind: ModelFileKind) -> str:
    """Return the digest of one file of a model's folder, computed according to its kind."""
    match kind:
        case "weights":
            return weights_digest(path)
        case "config":
            return config_digest(path)
        case "tokenizer":
            return file_digest(path)


def file_digest(path: Path) -> str:
    """Return the digest of all bytes of a small file."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def config_digest(path: Path) -> str:
    """Return the digest of a JSON object's content, which ignores its layout and ``IGNORED_KEYS``."""
    content = {name: value for name, value in read_json(path).items() if name not in IGNORED_KEYS}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def weights_digest(path: Path) -> str:
    """Return the digest of a safetensors file's size, header and tensors.

    A file of up to 64 MiB is read completely. In a larger one, tensors of up to 128 KiB are read completely, and of the
    others evenly spread blocks: one each, and 512 more in proportion to their sizes. So at most 128 MiB are read. Only
    a change in a small part of one large tensor can go unnoticed, and training changes all of a tensor.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= MAX_FULL_READ:
            while part := file.read(2**20):
                digest.update(part)
            return digest.hexdigest()
        for start, length in _sample(file, size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, length)`` of each part of a large file to read, in the file's order."""
    data = 8 + int.from_bytes(file.read(8), "little")
    tensors = _tensors(file, data, size)
    yield 0, min(data, size, MAX_FULL_READ)
    # With many tensors the blocks are smaller, so that at most twice MAX_FULL_READ bytes are read.
    block = min(BLOCK_BYTES, MAX_FULL_READ // max(len(tensors), 1))
    total = max(sum(length for _, length in tensors), 1)
    for start, length in tensors:
        count = 1 + SAMPLE_BLOCKS * length // total
        if length <= count * block:
            yield start, length
        else:
            yield from ((start + (length - block) * (2 * i + 1) // (2 * count), block) for i in range(count))


def _tensors(file: BinaryIO, data: int, size: int) -> list[tuple[int, int]]:
    """Return ``(start, length)`` of each tensor; with an unreadable header the whole file counts as one tensor."""
    try:
        if data > size:
            raise ValueError
        header: dict[str, Any] = json.loads(file.read(data - 8))
        offsets = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
        return [(data + int(start), int(end) - int(start)) for start, end in offsets]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [(0, size)]
