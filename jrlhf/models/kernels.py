"""The choice of an attention kernel for a platform, an architecture and a compute dtype."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.parallel.platforms import platform
from jrlhf.system.errors import UsageError

SPLASH_HEAD_MULTIPLE = 64
"""Multiple of a head's width for which ``auto`` takes the splash kernel, whose blocks are 128 numbers wide."""

CUDNN_HEAD_MULTIPLE, CUDNN_MAX_HEAD = 8, 128
"""Multiple and maximum of a head's width for which ``auto`` takes cuDNN; every GPU from Ampere on supports these."""


def attention_kernel(name: AttentionKernel, arch: ArchConfig, dtype: jnp.dtype, mesh: Mesh | None) -> AttentionKernel:
    """Return the kernel that a model computes attention with; "auto" is replaced by the fastest that supports it.

    That is splash on a TPU v4 or newer and cuDNN on an NVIDIA GPU from Ampere on, both in bfloat16. Raises UsageError
    for "cudnn" with a soft cap on attention, which cuDNN lacks.
    """
    if name == "cudnn" and arch.attention_softcap is not None:
        raise UsageError(f"attention: {name!r} has no soft cap, which the model needs; use 'xla'")
    if name != "auto":
        return name
    match platform(mesh):
        case "tpu" if dtype == jnp.bfloat16 and has_splash(mesh) and arch.head_dim % SPLASH_HEAD_MULTIPLE == 0:
            return "splash"
        case "gpu" if dtype == jnp.bfloat16 and _has_cudnn(mesh) and _fits_cudnn(arch):
            return "cudnn"
        case _:
            return "xla"


def has_splash(mesh: Mesh | None) -> bool:
    """Tell whether the TPUs are new enough for the splash kernel."""
    kind = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).device_kind
    return kind not in ("TPU v2", "TPU v3")


def _has_cudnn(mesh: Mesh | None) -> bool:
    """Tell whether the GPUs are NVIDIA's and of compute capability 8.0 or more; a GPU that is only described may be."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    capability = re.match(r"(\d+)\.\d", str(getattr(device, "compute_capability", "8.0")))
    return capability is not None and int(capability[1]) >= 8


def _fits_cudnn(arch: ArchConfig) -> bool:
    width = arch.head_dim
    return arch.attention_softcap is None and width % CUDNN_HEAD_MULTIPLE == 0 and width <= CUDNN_MAX_HEAD
