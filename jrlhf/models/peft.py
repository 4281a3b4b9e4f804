"""Adapters as PEFT keeps them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from jrlhf.models.arch import ArchConfig
from jrlhf.models.folder_files import appear
from jrlhf.models.hf import ADAPTER_CONFIG, ADAPTER_WEIGHTS, leaf_at, read_json
from jrlhf.models.hf_read import unfused
from jrlhf.models.hf_write import fused
from jrlhf.models.lora import at_kernels, linear_maps, module_name
from jrlhf.models.names import Entry
from jrlhf.types import Params

_PREFIX = "base_model.model."
_HEAD = _PREFIX + "score.weight"
_HEAD_BIAS = "jrlhf.head_bias"
"""In the metadata of the weights' file: PEFT's head has no place for a bias, and a normalised reward model has one."""


def is_adapter_folder(folder: Path) -> bool:
    """A PEFT adapter, not a model of its own."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_own_adapter(folder: Path) -> bool:
    """Whether jrlhf wrote a reward model's adapter: its weights' file then holds the head's bias."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            return _HEAD_BIAS in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file: {error}") from error


def base_of(folder: Path) -> str:
    """The folder or hub id of the model that an adapter belongs to."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder}: base_model_name_or_path: expected a folder or hub id, found {base!r}")
    return base


def save_adapter(params: Params, arch: ArchConfig, folder: Path, *, base: str, alpha: float) -> None:
    """Write the adapters of a tree; a reward model's head goes with them.

    ``base``: a hub id or folder, as it is to stand in ``adapter_config.json``; a relative path is read from ``folder``
    here, and by PEFT from wherever its process runs. PEFT has one adapter for a fused projection where we have three:
    one of three times the rank, ours in its blocks.
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
        raise ValueError("no adapters in these parameters")
    metadata = {"format": "pt"}
    if "head" in params:
        tensors[_HEAD] = np.asarray(params["head"]["kernel"])[None]
        metadata[_HEAD_BIAS] = repr(float(params["head"]["bias"]))
    config = _config(ranks, base=base, alpha=alpha, reward="head" in params, conv1d=arch.family == "gpt2")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    appear(folder / ADAPTER_WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    appear(folder / ADAPTER_CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


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
    """Our kernels by the name of the tensor they are in: one, or the three of a fused projection."""
    maps: dict[str, list[Entry]] = {}
    for entry in linear_maps(arch):
        maps.setdefault(entry.name, []).append(entry)
    return maps


def _one_adapter(entries: list[Entry], factors: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """``(a [in, r], b [r, out])`` of their linear map."""
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
    return a, fused(parts, layout.groups)


def insert_adapter(params: Params, arch: ArchConfig, folder: Path) -> Params:
    """``params`` with the adapters of a folder, and with its head where ``params`` are a reward model's.

    ValueError for what is no plain LoRA, and naming the tensors that have no place here.
    """
    config = _checked_config(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file: {error}") from error
    used: set[str] = set()
    decoder, adapters = params.get("decoder", params), {}
    for name, entries in _by_tensor(arch).items():
        shapes = [leaf_at(decoder, entry.path).shape for entry in entries]
        found = [_read_layer(tensors, config, name.format(layer=i), used) for i in range(arch.num_layers)]
        if any(found):
            for entry, shape in zip(entries, shapes, strict=True):
                adapters[entry.path] = _stacked(found, entry, shape, where=f"{folder}: {name}")
    if "head" in params:
        if _HEAD not in tensors or tensors[_HEAD].shape != (1, arch.hidden_size):
            raise ValueError(f"{folder}: a reward model's adapter needs {_HEAD} of shape [1, {arch.hidden_size}]")
        kernel, bias = tensors[_HEAD][0], float(metadata.get(_HEAD_BIAS, 0.0))
        params = params | {"head": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.float32(bias)}}
        used.add(_HEAD)
    if unknown := sorted(tensors.keys() - used):
        raise ValueError(f"{folder}: tensors that have no place here: {', '.join(unknown[:8])}")
    paths = list(adapters)
    return at_kernels(params, paths, lambda leaves, i: leaves | adapters[paths[i]])


def _checked_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type: {config.get('peft_type')!r} is not supported; supported: 'LORA'")
    for key in ("use_dora", "use_qalora", "alora_invocation_tokens", "trainable_token_indices"):
        if config.get(key):
            raise ValueError(f"{folder}: {key}: not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: bias: {config['bias']!r} is not supported; supported: 'none'")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ValueError(f"{folder}: {key}: expected a positive number, found {config.get(key)!r}")
    return config


def _read_layer(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], name: str, used: set[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """``(a [in, r], scale · b [r, out])`` of one of their linear maps, or None where it has no adapter."""
    module = name.removesuffix(".weight")
    names = [f"{_PREFIX}{module}.lora_{side}.weight" for side in "AB"]
    if names[0] not in tensors or names[1] not in tensors:
        return None
    used.update(names)
    a, b = (tensors[n].astype(np.float32).T for n in names)
    alpha = next(
        (value for key, value in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)),
        config["lora_alpha"],
    )
    rank = a.shape[1]
    return a, b * np.float32(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _stacked(
    found: list[tuple[np.ndarray, np.ndarray] | None], entry: Entry, shape: tuple[int, ...], *, where: str
) -> dict[str, Any]:
    """The adapters of all layers in one array each; where a layer has none, or a smaller one, zeros fill it up."""
    layers, width, features = shape
    rank = max(a.shape[1] for a, _ in filter(None, found))
    a_stack, b_stack = np.zeros((layers, width, rank), np.float32), np.zeros((layers, rank, features), np.float32)
    for layer, factors in enumerate(found):
        if factors is None:
            continue
        a, b = factors
        b = b if entry.fused is None else unfused(b, entry.fused)
        if a.shape[0] != width or b.shape != (a.shape[1], features):
            raise ValueError(
                f"{where}: an adapter of {a.shape} and {b.shape} does not fit a map of {(width, features)}"
            )
        a_stack[layer, :, : a.shape[1]], b_stack[layer, : len(b)] = a, b
    return {
        "lora_a": jnp.asarray(a_stack),
        "lora_b": jnp.asarray(b_stack),
        "lora_scale": jnp.ones((layers,), jnp.float32),
    }
