"""Low-rank adapters: W + scale · A · B with W frozen. Hu et al. 2021, arXiv 2106.09685.

An adapter is three leaves beside the kernel it belongs to: ``lora_a`` [L, in, r], ``lora_b`` [L, r, out] and
``lora_scale`` [L] = alpha / r. A tree without them is the same model with its adapters off.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.names import Entry, decoder_table
from jrlhf.system.errors import UsageError
from jrlhf.types import Key, Params

ADAPTER = ("lora_a", "lora_b", "lora_scale")


def module_name(entry: Entry) -> str:
    """Hugging Face's name of a linear map without its layer: ``self_attn.q_proj``."""
    return entry.name.split("{layer}.")[1].removesuffix(".weight")


def linear_maps(arch: ArchConfig) -> Iterator[Entry]:
    """The kernels of the decoder's blocks: what can have an adapter."""
    return (entry for entry in decoder_table(arch) if entry.stacked and entry.path[-1] == "kernel")


def add_adapters(params: Params, arch: ArchConfig, key: Key, *, rank: int, alpha: float, targets: str) -> Params:
    """``params`` with a fresh adapter at every linear map whose Hugging Face name ``targets`` is found in.

    A is uniform within ±1/√in as in PEFT, B is 0: the model is the same as before. UsageError, which names what there
    is, where ``targets`` finds nothing.
    """
    maps = list(linear_maps(arch))
    chosen = [entry for entry in maps if re.search(targets, module_name(entry))]
    if not chosen:
        names = ", ".join(dict.fromkeys(map(module_name, maps)))
        raise UsageError(f"targets: {targets!r} is found in none of {names}")
    return at_kernels(
        params, [entry.path for entry in chosen], lambda leaves, i: leaves | _fresh(leaves, key, i, rank, alpha)
    )


def _fresh(leaves: Params, key: Key, number: int, rank: int, alpha: float) -> Params:
    layers, width, features = leaves["kernel"].shape
    bound = width**-0.5
    draw = jax.random.uniform(jax.random.fold_in(key, number), (layers, width, rank), jnp.float32, -bound, bound)
    return {
        "lora_a": draw,
        "lora_b": jnp.zeros((layers, rank, features), jnp.float32),
        "lora_scale": jnp.full((layers,), alpha / rank, jnp.float32),
    }


def is_trained(path: str) -> bool:
    """With adapters: their two factors, and a reward model's head."""
    return path.endswith(("lora_a", "lora_b")) or re.search(r"(^|/)head/(kernel|bias)$", path) is not None


def merge_adapters(params: Params) -> Params:
    """W + scale · A · B in every kernel, and no adapters: the same model as an ordinary tree."""

    def merged(leaves: Params) -> Params:
        a, b, scale = (leaves[name] for name in ADAPTER)
        # Products of two float32 matrices lose bits on some accelerators unless told otherwise.
        delta = jnp.einsum("lir,lro->lio", a, b, precision="highest") * scale[:, None, None]
        kept = {name: leaf for name, leaf in leaves.items() if name not in ADAPTER}
        return kept | {"kernel": leaves["kernel"] + delta}

    def walk(tree: Params) -> Params:
        if not isinstance(tree, dict):
            return tree
        tree = merged(tree) if "lora_a" in tree else tree
        return {name: walk(leaf) for name, leaf in tree.items()}

    return walk(params)


def at_kernels(
    params: Params, paths: list[tuple[str, ...]], change: Callable[[dict[str, Any], int], dict[str, Any]]
) -> Params:
    """A tree with ``change(leaves, i)`` in place of what stands beside the i-th kernel; all else is shared.

    Paths are those of a decoder; a reward model has one under "decoder".
    """
    if "decoder" in params:
        return params | {"decoder": at_kernels(params["decoder"], paths, change)}

    def put(tree: Params, path: tuple[str, ...], number: int) -> Params:
        if len(path) == 1:
            return change(tree, number)
        return tree | {path[0]: put(tree[path[0]], path[1:], number)}

    for number, path in enumerate(paths):
        params = put(params, path, number)
    return params
