"""Settings that depend on the platform of a program: one record per platform, with the reason of each entry."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh

Tree = TypeVar("Tree")


class PlatformSettings(NamedTuple):
    """Settings of a platform that change the speed or memory of a program, but no result beyond rounding."""

    logits_at_once: int
    """Number of logits that log-probs hold on a device at a time, in float32."""
    remat: bool
    """Whether the backward pass recomputes whole layers by default."""
    rotary_products: bool
    """Whether rotary positions exchange the halves of a head by a product in bfloat16."""
    slots: int
    """Answers that a sampler decodes at once on a device by default; the prompts of further ones wait."""
    compiler_options: Mapping[str, str | bool | int]
    """Options that XLA compiles training steps, samplers and readings with."""


CPU = PlatformSettings(
    # 256 MB. More falls out of the caches of a CPU and is no faster.
    logits_at_once=2**26,
    # A step takes as long as its rows are many, so that rows which have ended cost as much as others.
    slots=64,
    rotary_products=False,
    # It takes about a third more time.
    remat=False,
    compiler_options={},
)
GPU = PlatformSettings(
    # 1 GB. Small products leave a GPU's multiprocessors idle, and each slice reads and writes the LM head's gradient.
    logits_at_once=2**28,
    # Up to about 300 rows a step takes as long as reading the weights (H100 in bfloat16: 989 TFLOP/s, 3.35 TB/s).
    slots=256,
    rotary_products=False,
    # It takes about a third more time.
    remat=False,
    compiler_options={},
)
TPU = PlatformSettings(
    # 1 GB, for the reasons of a GPU.
    logits_at_once=2**28,
    # As on a GPU: up to 166 rows (v5p, 459 TFLOP/s, 2.77 TB/s), 240 (v5e) and 560 (v6e).
    slots=256,
    # Halves of a head are 32 or 64 of a register's 128 lanes: to cut and join them takes the compiler three passes.
    rotary_products=True,
    # What a layer would store takes as long to write and read as to compute again (benchmarks/results/aot.md).
    remat=True,
    # XLA cuts a product with a gathered operand into a loop of small products and permutations ("collective matmul"),
    # which on v5e it estimates at 1.7 times the time of one gather and one product (benchmarks/results/aot.md). The
    # threshold, in MiB, is above every weight.
    compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
)


def platform(mesh: Mesh | None) -> str:
    """Return JAX's name of the platform of a mesh: "cpu", "gpu" or "tpu"; None is the default device."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def platform_settings(mesh: Mesh | None) -> PlatformSettings:
    """Return the settings of a mesh's platform."""
    return settings_of(platform(mesh))


def settings_of(platform: str) -> PlatformSettings:
    """Return the settings of a platform by its name; an unknown accelerator gets those of a GPU."""
    return {"cpu": CPU, "tpu": TPU}.get(platform, GPU)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Return what ``jax.jit`` takes as ``compiler_options`` for programs on the mesh; None if there are none."""
    return dict(platform_settings(mesh).compiler_options) or None


def barrier_on_cpu(tree: Tree) -> Tree:
    """Keep XLA from computing ``tree`` again inside what reads it, on a CPU; other platforms get no barrier.

    XLA for CPU fuses too much: it may compute an input of a product again for every column. XLA for TPUs and GPUs
    decides well by itself, and a barrier costs it the fusions that it would choose.
    """
    return lax.platform_dependent(tree, cpu=lax.optimization_barrier, default=lambda same: same)
