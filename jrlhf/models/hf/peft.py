"""Writing of adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, leaf_at
from jrlhf.models.hf.folder_files import write_atomically
from jrlhf.models.hf.names import Entry
from jrlhf.models.hf.write import join_fused
from jrlhf.models.lora import linear_maps, module_name
from jrlhf.system.errors import UsageError
from jrlhf.types import Params

_PREFIX = "base_model.model."
_HEAD = _PREFIX + "score.weight"
_HEAD_BIAS = "jrlhf.head_bias"
"""Key of the head's bias in the metadata of the weights file, since PEFT's format has no tensor for it."""


def is_own_adapter(folder: Path) -> bool:
    """Tell whether jrlhf wrote a reward model's adapter, whose weights file then holds the head's bias."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            return _HEAD_BIAS in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file: {error}") from error


def save_adapter(params: Params, arch: ArchConfig, folder: Path, *, base: str, alpha: float) -> None:
    """Write the adapters of a tree, with a reward model's head.

    ``base`` is the hub id or folder for ``adapter_config.json``; jrlhf resolves a relative path from ``folder``, PEFT
    from the working directory. A fused projection has one adapter in PEFT and three here: they become the blocks of one
    adapter of three times the rank.
    """
    decoder = params.get("decoder", params)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, entries in _by_tensor(arch).items():
        leaves = [leaf_at(decoder, entry.path[:-1]) for entry in entries]
        if "lora_a" not in leaves[0]:
            continue
        factors = [(np.asarray(leaf["lora_a"]), np.asarray(leaf["lora_b"])) for leaf in leaves]
        ranks[module_name(entries[0])] = sum(a.shape[-1] for a, _ in factors)
        for layer in range(arch.num_layers):
            a, b = _one_adapter(entries, [(a[layer], b[layer]) for a, b in factors])
            stem = _PREFIX + name.format(layer=layer).removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b.T)
    if not ranks:
        raise ValueError("the parameters have no adapters to save")
    metadata = {"format": "pt"}
    if "head" in params:
        tensors[_HEAD] = np.asarray(params["head"]["kernel"])[None]
        metadata[_HEAD_BIAS] = repr(float(params["head"]["bias"]))
    config = _config(ranks, base=base, alpha=alpha, reward="head" in params, conv1d=arch.family == "gpt2")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ADAPTER_WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    write_atomically(folder / ADAPTER_CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _config(ranks: Mapping[str, int], *, base: str, alpha: float, reward: bool, conv1d: bool) -> dict[str, Any]:
    rank = min(ranks.values())
    wider = {name: r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha * r / rank for name, r in wider.items()},
        "fan_in_fan_out": conv1d,
        "modules_to_save": ["score"] if reward else None,
        "inference_mode": True,
    }


def _by_tensor(arch: ArchConfig) -> dict[str, list[Entry]]:
    """Group kernels by the name of their tensor: one each, or the three of a fused projection."""
    maps: dict[str, list[Entry]] = {}
    for entry in linear_maps(arch):
        maps.setdefault(entry.name, []).append(entry)
    return maps


def _one_adapter(entries: list[Entry], factors: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(a [in, r], b [r, out])`` of PEFT's adapter for these kernels."""
    layout = entries[0].fused
    if layout is None:
        return factors[0]
    a = np.concatenate([a for a, _ in factors], axis=1)
    parts, start = [], 0
    for _, b in factors:
        padded = np.zeros((a.shape[1], b.shape[1]), b.dtype)
        padded[start : start + len(b)] = b
        parts.append(padded)
        start += len(b)
    return a, join_fused(parts, layout.groups)
