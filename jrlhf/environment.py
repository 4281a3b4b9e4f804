"""What must be set before Python or JAX starts: flags of the compiler, a cache of what it made, and huge pages.

Imports no JAX.
"""

import os
import sys
from glob import glob
from pathlib import Path

COMPILATION_CACHE = {
    # A start compiles some thirty programs, all but one or two of them in less than JAX's own second.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Programs that have not been used for longest make room.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 * 2**30),
}

GPU_FLAGS = {
    # Gradients and weights travel between devices while others are computed. NVIDIA's own JAX images set it
    # (docs.nvidia.com/jax-toolbox, "Environment variables"); not measured by us.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
}
"""XLA's flags for NVIDIA GPUs. They change when things are computed, not what.

There are none for other platforms. TPU: libtpu's defaults are made for training, and a flag that its version does not
know ends the process. CPU: oneDNN's products were measured, and gained nothing (benchmarks/results/compare.md).
"""


def cache_home() -> Path:
    """The folder of all that can be made again: $JRLHF_CACHE, else ~/.cache/jrlhf."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jrlhf"
    return Path(os.environ.get("JRLHF_CACHE") or usual).expanduser()


def keep_compiled_programs() -> None:
    """JAX is told to keep what it compiles, so that a second start need not wait; a cache of the user's own stays."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_home() / "compiled")
        for name, value in COMPILATION_CACHE.items():
            os.environ.setdefault(name, value)


def set_compiler_flags() -> None:
    """``GPU_FLAGS`` where there is a GPU, each unless the user's own ``XLA_FLAGS`` name it."""
    own = os.environ.get("XLA_FLAGS", "")
    flags = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in own]
    if flags and glob("/dev/nvidia[0-9]*"):
        os.environ["XLA_FLAGS"] = " ".join([own, *flags]).strip()


def quiet_compiler() -> None:
    """XLA's warnings are left out: planning shows what they lead to, and tries again what XLA says it cannot do."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def restart_with_huge_pages() -> None:
    """Training on a CPU spends a fifth of its time on page faults; malloc avoids them if told so before it starts.

    So the process replaces itself, once, with the tunable set. That changes no result, and nothing happens where the
    user has tunables of their own, or on other systems.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
