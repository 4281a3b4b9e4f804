"""Our tree into a Hugging Face folder: ``hf_read`` backwards, file by file."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf import CONFIG, DTYPES, INDEX, WEIGHTS, Stored, leaf_at, names_of, read_json
from jrlhf.models.names import Entry, lm_head_name
from jrlhf.types import Params

Source = tuple[Entry, int | None]
"""A leaf of our tree, and which layer of it."""


def export_plan(
    tree: Params, arch: ArchConfig, table: tuple[Entry, ...], stored: Mapping[str, Stored]
) -> dict[str, list[Source]]:
    """Their tensors by name, each with the leaves it is made of: one, or three where it is fused."""
    plan: dict[str, list[Source]] = {}
    for entry in table:
        for layer, name in enumerate(names_of(entry, tree)):
            plan.setdefault(name, []).append((entry, layer if entry.stacked else None))
    tied = [entry for entry in table if entry.path == ("embed",) and arch.tie_embeddings]
    if tied and lm_head_name(arch) in stored:
        plan[lm_head_name(arch)] = [(tied[0], None)]
    return plan


def their_tensor(tree: Params, sources: list[Source], dtype: str) -> np.ndarray:
    """One of their tensors. With several hosts all of them must call this: parts that others hold are gathered."""
    parts, entry = [_local(tree, source) for source in sources], sources[0][0]
    value = parts[0] if entry.fused is None else fused(parts, entry.fused.groups)
    theirs = {"same": value, "transposed": value.T, "row": value[None]}[entry.form]
    return np.ascontiguousarray(theirs.astype(DTYPES[dtype]))


def _local(tree: Params, source: Source) -> np.ndarray:
    entry, layer = source
    leaf = leaf_at(tree, entry.path)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        part = leaf if layer is None else leaf[layer]
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    values = np.asarray(leaf)
    return values if layer is None else values[layer]


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tree: Params,
    arch: ArchConfig,
    table: tuple[Entry, ...],
    stored: Mapping[str, Stored],
    source: Path,
    copied: tuple[str, ...],
) -> None:
    """``config.json``, the weights, and those ``copied`` files that ``source`` has; the first host writes.

    Tensors go to the files and in the dtypes that ``stored`` names, new ones in float32 to the last file. The config
    comes last, and each file appears whole or not at all: a broken-off export cannot be loaded.
    """
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for name in copied:
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
    plan = export_plan(tree, arch, table, stored)
    last = max((stored[name].file for name in plan if name in stored), default=WEIGHTS)
    where = {name: stored[name].file if name in stored else last for name in plan}
    for file in sorted(set(where.values())):
        tensors = {
            name: their_tensor(tree, sources, stored[name].dtype if name in stored else "F32")
            for name, sources in plan.items()
            if where[name] == file
        }
        if writes:
            # One file holds everything under one name, whatever its own was.
            target = file if len(set(where.values())) > 1 else WEIGHTS
            _appear(folder / target, lambda path, tensors=tensors: save_file(tensors, path, metadata={"format": "pt"}))
    if writes:
        _write_index(folder, where, source)
        _appear(folder / CONFIG, lambda path: path.write_bytes(_json_bytes(config, source / CONFIG)))


def _appear(file: Path, write: Callable[[Path], Any]) -> None:
    partial = file.parent / f".{file.name}.partial"
    write(partial)
    os.replace(partial, file)


def _write_index(folder: Path, where: Mapping[str, str], source: Path) -> None:
    """Which file has which tensor, if there are several; what an earlier export left is taken away."""
    if len(set(where.values())) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    (folder / WEIGHTS).unlink(missing_ok=True)
    size = sum((folder / file).stat().st_size for file in set(where.values()))
    index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    original = source / INDEX
    if original.is_file() and read_json(original).get("weight_map") == where:
        index = read_json(original)
    _appear(folder / INDEX, lambda path: path.write_bytes(_json_bytes(index, original)))


def _json_bytes(content: Mapping[str, Any], original: Path) -> bytes:
    """The original's own bytes while they say the same: another writer's spacing and number format are kept."""
    if original.is_file() and read_json(original) == content:
        return original.read_bytes()
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def fused(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """``_unfused`` backwards, of queries, keys and values."""
    grouped = [x.reshape(*x.shape[:-1], groups, -1) for x in parts]
    return np.stack(grouped, axis=-2).reshape(*parts[0].shape[:-1], -1)
