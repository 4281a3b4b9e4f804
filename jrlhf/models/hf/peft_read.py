"""Reading of adapters in PEFT's format: plain LoRA and a reward model's head. Other features are refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, leaf_at, read_json
from jrlhf.models.hf.names import Entry
from jrlhf.models.hf.peft import _HEAD, _HEAD_BIAS, _PREFIX, _by_tensor
from jrlhf.models.hf.read import split_fused
from jrlhf.models.lora import at_kernels
from jrlhf.system.errors import UsageError
from jrlhf.types import Params

_HEAD_BIAS_TENSOR = _PREFIX + "score.bias"
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that only initialise the factors and leave the base unchanged."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the first factors from the base; variants have a suffix, such as ``pissa_niter_4``."""
FIELDS_READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform",
    "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
})  # fmt: skip
# These fields matter only for training or together with unsupported fields. ensure_weight_tying concerns adapters on
# tied embeddings, whose tensors are refused.
FIELDS_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
})  # fmt: skip
_MERGE = "merge it in PEFT (merge_and_unload) and save the whole model"


class Adapter(NamedTuple):
    """The content of an adapter folder."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def insert_adapter(params: Params, arch: ArchConfig, folder: Path, *, needs_head: bool = True) -> Params:
    """Return ``params`` with the adapters of a folder and, for a reward model, with its head.

    With ``needs_head`` a reward model's adapter must have a head; otherwise the base's head may stay. Raises ValueError
    for anything but plain LoRA and for tensors that the model has no place for, which it names.
    """
    adapter = _read_adapter(folder)
    used_names: set[str] = set()
    decoder, adapters = params.get("decoder", params), {}
    for name, entries in _by_tensor(arch).items():
        shapes = [leaf_at(decoder, entry.path).shape for entry in entries]
        layers = [_read_layer(adapter, name.format(layer=i), i, used_names) for i in range(arch.num_layers)]
        if any(layers):
            for entry, shape in zip(entries, shapes, strict=True):
                adapters[entry.path] = _stack_layers(layers, entry, shape, where=f"{folder}: {name}")
    if "head" in params:
        head = _read_head(adapter, arch, used_names)
        if head is None and needs_head:
            raise UsageError(f"{folder}: a reward model's adapter needs {_HEAD} of shape [1, {arch.hidden_size}]")
        params = params if head is None else params | {"head": head}
    if unknown := sorted(adapter.tensors.keys() - used_names):
        raise UsageError(f"{folder}: tensors that are not supported: {', '.join(unknown[:8])}; {_MERGE}")
    if not used_names:
        raise UsageError(f"{folder / ADAPTER_WEIGHTS}: contains no tensors")
    paths = list(adapters)
    return at_kernels(params, paths, lambda leaves, i: leaves | adapters[paths[i]])


def _read_adapter(folder: Path) -> Adapter:
    config, file = _read_config(folder), folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        how = "; adapter_model.bin is pickled and is never opened: save the adapter as safetensors" if pickled else ""
        raise FileNotFoundError(f"{file}: missing{how}")
    try:
        with safe_open(file, framework="numpy") as handle:
            names, metadata = list(handle.keys()), handle.metadata() or {}
            dtypes = {name: handle.get_slice(name).get_dtype() for name in names}
            unread = [name for name in names if dtypes[name] not in DTYPES]
            tensors = {name: handle.get_tensor(name) for name in names if name not in unread}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: not a readable safetensors file: {error}") from error
    if unread:
        raise UsageError(f"{file}: {unread[0]} is {dtypes[unread[0]]}; supported: {', '.join(DTYPES)}")
    return Adapter(folder, config, tensors, metadata)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{folder}: peft_type: {config.get('peft_type')!r} is not supported; supported: 'LORA'")
    if config.get("bias") not in (None, "none"):
        raise UsageError(f"{folder}: bias: {config['bias']!r} is not supported; supported: 'none'")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UsageError(f"{folder}: {key}: expected a positive number, found {config.get(key)!r}")
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        _check_patterns(folder, key, config.get(key))
    _check_layers(folder, config.get("layers_to_transform"))
    _check_init(folder, config.get("init_lora_weights"))
    saved = config.get("modules_to_save")
    for name in saved if isinstance(saved, list) else [] if saved is None else [saved]:
        # PEFT lists all usual names of a classifier's head, even if the model lacks them.
        if name not in ("score", "classifier"):
            raise UsageError(
                f"{folder}: modules_to_save: {name!r} is not supported, only a reward model's score; {_MERGE}"
            )
    for key, value in config.items():
        # Null, false, 0 and empty values mean off in all of PEFT's fields, and presumably in future ones.
        if value and key not in FIELDS_READ | FIELDS_WITHOUT_EFFECT:
            raise UsageError(f"{folder}: {key}: not supported, and it may change what the adapter does; {_MERGE}")
    return config


def _check_patterns(folder: Path, key: str, value: Any) -> None:
    """Raise UsageError if a field's patterns are not regular expressions or its numbers are not positive."""
    if key in ("rank_pattern", "alpha_pattern") and value and not isinstance(value, dict):
        raise UsageError(f"{folder}: {key}: expected one number per pattern, found {value!r}")
    patterns = value if isinstance(value, dict | list) else [] if value is None else [value]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UsageError(f"{folder}: {key}: {pattern!r} is not a valid pattern: {error}") from error
    for number in value.values() if isinstance(value, dict) else ():
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise UsageError(f"{folder}: {key}: expected positive numbers, found {number!r}")


def _check_layers(folder: Path, value: Any) -> None:
    """Raise UsageError if ``layers_to_transform`` are not layer numbers."""
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise UsageError(f"{folder}: layers_to_transform: expected whole numbers, found {value!r}")


def _check_init(folder: Path, init: Any) -> None:
    """Raise UsageError for an initialisation that changes the base model."""
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, str) and name.startswith(BASE_CHANGING_INITS):
        convert = "" if name == "loftq" else "save it with path_initial_model_for_weight_conversion (PEFT), or "
        raise UsageError(
            f"{folder}: init_lora_weights: {init!r} subtracts the first factors from the base's weights, so with the "
            f"original base the adapter gives another model; {convert}{_MERGE}"
        )
    if not any(name is plain or (isinstance(name, str) and name == plain) for plain in PLAIN_INITS):
        names = ", ".join(repr(plain) for plain in PLAIN_INITS if isinstance(plain, str))
        raise UsageError(
            f"{folder}: init_lora_weights: {init!r} is not supported; supported: true, false, {names}; {_MERGE}"
        )


def _read_head(adapter: Adapter, arch: ArchConfig, used_names: set[str]) -> Params | None:
    """Read an adapter's scalar head; return None if it has none."""
    if _HEAD not in adapter.tensors:
        return None
    kernel, bias = adapter.tensors[_HEAD], adapter.tensors.get(_HEAD_BIAS_TENSOR)
    for name, tensor, shape in ((_HEAD, kernel, (1, arch.hidden_size)), (_HEAD_BIAS_TENSOR, bias, (1,))):
        if tensor is not None and tensor.shape != shape:
            raise UsageError(
                f"{adapter.folder}: {name} has shape {list(tensor.shape)}, a scalar head has {list(shape)}"
            )
    used_names.update({_HEAD, _HEAD_BIAS_TENSOR} & adapter.tensors.keys())
    offset = float(adapter.metadata.get(_HEAD_BIAS, 0.0)) if bias is None else float(bias[0])
    return {"kernel": jnp.asarray(kernel[0].astype(np.float32)), "bias": jnp.float32(offset)}


def _read_layer(adapter: Adapter, name: str, layer: int, used_names: set[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Read ``(a [in, r], scale · b [r, out])`` of a linear map, or return None if it has no adapter."""
    folder, config, tensors, _ = adapter
    module = name.removesuffix(".weight")
    names = [f"{_PREFIX}{module}.lora_{side}.weight" for side in "AB"]
    if not tensors.keys() & set(names) and not _is_targeted(config, module, layer):
        return None
    for n in names:
        if n not in tensors:
            raise UsageError(f"{folder}: missing tensor: {n}")  # the config says that this map has an adapter
    used_names.update(names)
    rank = _pattern_value(config, "rank_pattern", module, config["r"])
    a, b = (tensors[n] for n in names)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UsageError(
            f"{folder}: {names[0]} and lora_B have shapes {shapes}; by {ADAPTER_CONFIG} their rank is {rank}"
        )
    alpha = _pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
    scale = np.float32(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return a.astype(np.float32).T, b.astype(np.float32).T * scale


def _pattern_value(config: Mapping[str, Any], field: str, module: str, default: int | float) -> int | float:
    """Return the value of the field's first pattern that matches a module's name in PEFT's way, or ``default``."""
    patterns = config.get(field) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_targeted(config: Mapping[str, Any], module: str, layer: int) -> bool:
    """Tell whether the config requires an adapter at a linear map."""
    layers = config.get("layers_to_transform")
    if layers not in (None, []) and layer not in ([layers] if isinstance(layers, int) else layers):
        return False
    excluded = config.get("exclude_modules")
    return _matches(config.get("target_modules"), module) and not (excluded and _matches(excluded, module))


def _matches(targets: Any, module: str) -> bool:
    """Tell whether PEFT's ``targets`` select a module: a pattern for the whole name, or a list of name endings."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets or ())


def _stack_layers(
    layers_factors: list[tuple[np.ndarray, np.ndarray] | None], entry: Entry, shape: tuple[int, ...], *, where: str
) -> dict[str, Any]:
    """Stack the adapters of all layers; zeros stand for a missing adapter and pad one of a smaller rank."""
    layers, width, features = shape
    rank = max(a.shape[1] for a, _ in filter(None, layers_factors))
    a_stack, b_stack = np.zeros((layers, width, rank), np.float32), np.zeros((layers, rank, features), np.float32)
    for layer, factors in enumerate(layers_factors):
        if factors is None:
            continue
        a, b = factors
        b = b if entry.fused is None else split_fused(b, entry.fused)
        if a.shape[0] != width or b.shape != (a.shape[1], features):
            raise UsageError(
                f"{where}: an adapter of shapes {a.shape} and {b.shape} does not fit a map of {(width, features)}"
            )
        a_stack[layer, :, : a.shape[1]], b_stack[layer, : len(b)] = a, b
    return {
        "lora_a": jnp.asarray(a_stack),
        "lora_b": jnp.asarray(b_stack),
        "lora_scale": jnp.ones((layers,), jnp.float32),
    }
