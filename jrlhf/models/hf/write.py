"""Our tree into a Hugging Face folder: ``hf_read`` backwards, file by file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import CONFIG, DTYPES, INDEX, WEIGHTS, Stored, leaf_at, names_of, read_json
from jrlhf.models.hf.folder_files import appear, json_bytes, read_files, write_files
from jrlhf.models.hf.names import Entry, lm_head_name
from jrlhf.system.errors import UsageError
from jrlhf.types import Params

Source = tuple[Entry, int | None]
"""A leaf of our tree, and which layer of it."""

WeightDtype = Literal["float32", "source"]
"""What weights are written in: float32, or the dtypes of the folder they were read from."""


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
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(theirs.astype(DTYPES[dtype]))
    if dtype == "F16" and not np.isfinite(narrow[np.isfinite(theirs)]).all():
        raise UsageError(
            f"{entry.name}: a weight is beyond 65504, the largest number in float16; export float32 instead"
        )
    return narrow


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
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """``config.json``, the weights, and ``files`` or those files of ``source`` that ``copied`` matches.

    Tensors go to the files that ``stored`` names, new ones to the last of them. ``dtype`` "source" gives them the
    dtypes that ``stored`` names (new ones float32). The first host writes. The config comes last, and each file
    appears whole or not at all: a broken-off export cannot be loaded.
    """
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        if source.resolve() != folder.resolve():
            # What an earlier export left must not be loaded with some of the files that come now.
            (folder / CONFIG).unlink(missing_ok=True)
        if files is not None:
            write_files(folder, files)
        elif source.resolve() != folder.resolve():
            write_files(folder, read_files(source, copied))
    plan = export_plan(tree, arch, table, stored)
    last = max((stored[name].file for name in plan if name in stored), default=WEIGHTS)
    where = {name: stored[name].file if name in stored else last for name in plan}
    dtypes = {name: stored[name].dtype if dtype == "source" and name in stored else "F32" for name in plan}
    size = 0
    for file in sorted(set(where.values())):
        tensors = {name: their_tensor(tree, plan[name], dtypes[name]) for name in plan if where[name] == file}
        size += sum(tensor.nbytes for tensor in tensors.values())
        if writes:
            # One file holds everything under one name, whatever its own was.
            target = file if len(set(where.values())) > 1 else WEIGHTS
            appear(folder / target, lambda path, tensors=tensors: save_file(tensors, path, metadata={"format": "pt"}))
    if writes:
        as_stored = all(dtypes[name] == stored[name].dtype for name in plan if name in stored)
        _write_index(folder, where, source, size=None if as_stored else size)
        config = config if dtype == "source" else _in_float32(config, as_stored=as_stored)
        appear(folder / CONFIG, lambda path: path.write_bytes(json_bytes(config, source / CONFIG)))


def _in_float32(config: Mapping[str, Any], *, as_stored: bool) -> Mapping[str, Any]:
    """The config of an export in float32: transformers loads weights in the dtype that it names, whatever theirs is."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if as_stored and all(config[key] in (None, "float32") for key in keys):
        return config
    return {**config, **dict.fromkeys(keys or ["dtype"], "float32")}


def _write_index(folder: Path, where: Mapping[str, str], source: Path, *, size: int | None) -> None:
    """Which file has which tensor, if there are several; what an earlier export left is taken away.

    ``size``: bytes of all tensors, where they are not in the dtypes of ``source``.
    """
    if len(set(where.values())) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    (folder / WEIGHTS).unlink(missing_ok=True)
    total = sum((folder / file).stat().st_size for file in set(where.values())) if size is None else size
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    original = source / INDEX
    if size is None and original.is_file() and read_json(original).get("weight_map") == where:
        index = read_json(original)
    appear(folder / INDEX, lambda path: path.write_bytes(json_bytes(index, original)))


def fused(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """``_unfused`` backwards, of queries, keys and values."""
    grouped = [x.reshape(*x.shape[:-1], groups, -1) for x in parts]
    return np.stack(grouped, axis=-2).reshape(*parts[0].shape[:-1], -1)
