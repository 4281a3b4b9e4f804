"""Writing of a parameter tree to a Hugging Face folder, file by file."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import CONFIG, DTYPES, INDEX, WEIGHTS, Stored, leaf_at, names_of, read_json
from jrlhf.models.hf.folder_files import json_bytes, read_files, write_atomically, write_files
from jrlhf.models.hf.names import Entry, lm_head_name
from jrlhf.system.errors import UsageError
from jrlhf.types import Params

Source = tuple[Entry, int | None]
"""A leaf of the tree and the layer of it (None: the whole leaf)."""

WeightDtype = Literal["float32", "source"]
"""Dtype of written weights: float32, or the dtypes of the folder that they were read from."""


def export_plan(
    tree: Params, arch: ArchConfig, table: tuple[Entry, ...], stored: Mapping[str, Stored]
) -> dict[str, list[Source]]:
    """Return the names of all tensors to write, each with its leaves: one, or three if it is fused."""
    plan: dict[str, list[Source]] = {}
    for entry in table:
        for layer, name in enumerate(names_of(entry, tree)):
            plan.setdefault(name, []).append((entry, layer if entry.stacked else None))
    tied = [entry for entry in table if entry.path == ("embed",) and arch.tie_embeddings]
    if tied and lm_head_name(arch) in stored:
        plan[lm_head_name(arch)] = [(tied[0], None)]
    return plan


def build_tensor(tree: Params, sources: list[Source], dtype: str) -> np.ndarray:
    """Build one tensor of the checkpoint. With several hosts all must call this, since it gathers their parts."""
    parts, entry = [_local(tree, source) for source in sources], sources[0][0]
    value = parts[0] if entry.fused is None else join_fused(parts, entry.fused.groups)
    tensor = {"same": value, "transposed": value.T, "row": value[None]}[entry.form]
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(tensor.astype(DTYPES[dtype]))
    if dtype == "F16" and not np.isfinite(rounded[np.isfinite(tensor)]).all():
        raise UsageError(f"{entry.name}: a weight exceeds 65504, the largest number in float16; export float32 instead")
    return rounded


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
    patterns: tuple[str, ...],
    *,
    dtype: WeightDtype = "source",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``config.json``, the weights, and ``files`` or else the files of ``source`` that match ``patterns``.

    Tensors go to the files that ``stored`` names, new ones to the last of these. With ``dtype`` "source" they get the
    dtypes that ``stored`` names, new ones float32. Only the first host writes. Each file is written atomically and the
    config comes last, so that an interrupted export cannot be loaded.
    """
    is_writer = jax.process_index() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        if source.resolve() != folder.resolve():
            # The folder must not be loadable while it mixes files of an earlier export with new ones.
            (folder / CONFIG).unlink(missing_ok=True)
        if files is not None:
            write_files(folder, files)
        elif source.resolve() != folder.resolve():
            write_files(folder, read_files(source, patterns))
    plan = export_plan(tree, arch, table, stored)
    last = max((stored[name].file for name in plan if name in stored), default=WEIGHTS)
    where = {name: stored[name].file if name in stored else last for name in plan}
    dtypes = {name: stored[name].dtype if dtype == "source" and name in stored else "F32" for name in plan}
    size = 0
    for file in sorted(set(where.values())):
        tensors = {name: build_tensor(tree, plan[name], dtypes[name]) for name in plan if where[name] == file}
        size += sum(tensor.nbytes for tensor in tensors.values())
        if is_writer:
            # A single file always has the standard name.
            target = file if len(set(where.values())) > 1 else WEIGHTS
            write_atomically(folder / target, partial(save_file, tensors, metadata={"format": "pt"}))
    if is_writer:
        as_stored = all(dtypes[name] == stored[name].dtype for name in plan if name in stored)
        _write_index(folder, where, source, size=None if as_stored else size)
        config = config if dtype == "source" else _float32_config(config, as_stored=as_stored)
        write_atomically(folder / CONFIG, lambda path: path.write_bytes(json_bytes(config, source / CONFIG)))


def _float32_config(config: Mapping[str, Any], *, as_stored: bool) -> Mapping[str, Any]:
    """Return a config that names float32, since transformers loads weights in the dtype of the config."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if as_stored and all(config[key] in (None, "float32") for key in keys):
        return config
    return {**config, **dict.fromkeys(keys or ["dtype"], "float32")}


def _write_index(folder: Path, where: Mapping[str, str], source: Path, *, size: int | None) -> None:
    """Write the index of tensors and files if there are several files, and remove files of an earlier export.

    ``size`` is the number of bytes of all tensors, or None if they have the dtypes of ``source``.
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
    write_atomically(folder / INDEX, lambda path: path.write_bytes(json_bytes(index, original)))


def join_fused(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """Join queries, keys and values to one tensor, the inverse of ``read.split_fused``."""
    grouped = [x.reshape(*x.shape[:-1], groups, -1) for x in parts]
    return np.stack(grouped, axis=-2).reshape(*parts[0].shape[:-1], -1)
