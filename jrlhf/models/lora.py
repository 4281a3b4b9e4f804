"""Low-rank adapters: W + scale · A · B with W frozen (Hu et al. 2021, arXiv 2106.09685).

An adapter is three leaves beside its kernel: ``lora_a`` [L, in, r], ``lora_b`` [L, r, out] and ``lora_scale`` [L] =
alpha / r. Without these leaves the tree is the model without adapters.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jrlhf.models.arch import ArchConfig
from jrlhf.models.frozen import ExactFn, as_it_is
from jrlhf.models.hf.names import Entry, decoder_table
from jrlhf.system.errors import UsageError
from jrlhf.types import Key, Params

ADAPTER = ("lora_a", "lora_b", "lora_scale")


def module_name(entry: Entry) -> str:
    """Return Hugging Face's name of a linear map within its layer, such as ``self_attn.q_proj``."""
    return entry.name.split("{layer}.")[1].removesuffix(".weight")


def linear_maps(arch: ArchConfig) -> Iterator[Entry]:
    """Return the kernels of the decoder's blocks, which can have adapters."""
    return (entry for entry in decoder_table(arch) if entry.stacked and entry.path[-1] == "kernel")


def add_adapters(params: Params, arch: ArchConfig, key: Key, *, rank: int, alpha: float, targets: str) -> Params:
    """Return ``params`` with a new adapter at every linear map whose Hugging Face name matches the regex ``targets``.

    A is uniform within ±1/√in as in PEFT and B is 0, so the model's outputs do not change. Raises UsageError with the
    available names if nothing matches.
    """
    maps = list(linear_maps(arch))
    entries = [entry for entry in maps if re.search(targets, module_name(entry))]
    if not entries:
        names = ", ".join(dict.fromkeys(map(module_name, maps)))
        raise UsageError(f"targets: {targets!r} matches none of {names}")
    return at_kernels(
        params, [entry.path for entry in entries], lambda leaves, i: leaves | _new_adapter(leaves, key, i, rank, alpha)
    )


def _new_adapter(leaves: Params, key: Key, number: int, rank: int, alpha: float) -> Params:
    layers, width, features = leaves["kernel"].shape
    bound = width**-0.5
    factor = jax.random.uniform(jax.random.fold_in(key, number), (layers, width, rank), jnp.float32, -bound, bound)
    return {
        "lora_a": factor,
        "lora_b": jnp.zeros((layers, rank, features), jnp.float32),
        "lora_scale": jnp.full((layers,), alpha / rank, jnp.float32),
    }


def is_trained(path: str) -> bool:
    """Tell whether LoRA trains the leaf at ``path``: the factors of adapters and a reward model's head."""
    return path.endswith(("lora_a", "lora_b")) or re.search(r"(^|/)head/(kernel|bias)$", path) is not None


def merged_kernel(kernel: jax.Array, leaves: Params) -> jax.Array:
    """Return W + scale · A · B of a float32 kernel and the adapter in ``leaves``."""
    a, b, scale = (leaves[name] for name in ADAPTER)
    # The default precision of float32 products loses bits on some accelerators.
    delta = jnp.einsum("lir,lro->lio", a, b, precision="highest") * scale[:, None, None]
    return kernel + delta


def merge_adapters(params: Params, exact: ExactFn = as_it_is) -> Params:
    """Merge every adapter into its kernel, W + scale · A · B, and return a tree without adapters.

    ``exact`` returns the leaf at a path in float32, for a base that is rounded, such as ``Pretrained.exact``.
    """

    def walk(tree: Params, path: tuple[str, ...]) -> Params:
        if not isinstance(tree, dict):
            return exact(path, tree)
        merged = {name: walk(leaf, (*path, name)) for name, leaf in tree.items() if name not in ADAPTER}
        return merged | ({"kernel": merged_kernel(merged["kernel"], tree)} if "lora_a" in tree else {})

    return walk(params, ())


def at_kernels(
    params: Params, paths: list[tuple[str, ...]], change: Callable[[dict[str, Any], int], dict[str, Any]]
) -> Params:
    """Return a tree in which ``change(leaves, i)`` replaces the leaves beside the i-th kernel; the rest is shared.

    Paths are relative to the decoder, which a reward model has under "decoder".
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
