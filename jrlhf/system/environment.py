"""Every environment variable and every setting of Python that jrlhf changes for the whole process.

Most of them must be set before Python or JAX starts: flags of the compiler, a cache of what it made, and huge pages.
Imports no JAX; JAX's own settings are in ``jrlhf.parallel.settings``.
"""

import os
import sys
from contextlib import suppress

from jrlhf.system.errors import UsageError
from jrlhf.system.interrupts import held

# As in typing, whose import takes longer than all of this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
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


def cache_home() -> "Path":
    """The folder of all that can be made again: $JRLHF_CACHE, else ~/.cache/jrlhf.

    ValueError, which names that variable, where there is no home folder.
    """
    return _below_home("JRLHF_CACHE", "jrlhf")


def usable_cache() -> "tuple[Path | None, str]":
    """``cache_home``, made if it was not there; or None, and why nothing can be kept there."""
    try:
        folder = cache_home()
    except ValueError as error:
        return None, str(error)
    trouble = _trouble(folder)
    return (None, f"{trouble}; JRLHF_CACHE names another folder") if trouble else (folder, "")


def keep_compiled_programs() -> str:
    """JAX is told to keep what it compiles, so that a second start need not wait; a cache of the user's own stays.

    Returns what is wrong where there is no place for it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    folder, trouble = usable_cache()
    if folder is None:
        return f"compiled programs are not kept: {trouble}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    for name, value in COMPILATION_CACHE.items():
        os.environ.setdefault(name, value)
    return ""


def keep_hub_files() -> str:
    """Libraries of Hugging Face get a folder for this process where their own cannot be written to: some write even
    to read a local file. Returns what that means; a folder that the user names, or whose models are there, stays."""
    try:
        home, trouble = _below_home("HF_HOME", "huggingface"), ""
    except ValueError as error:
        home, trouble = None, str(error)
    if home is not None:
        trouble = _trouble(home)
    if not trouble:
        return ""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="jrlhf-hub-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(folder, "datasets"))
    if "HF_HOME" not in os.environ and (home is None or not home.is_dir()):
        os.environ["HF_HOME"] = folder
    where = "" if home is None else "; HF_HOME names another folder"
    return f"what comes from the hub is kept in {folder} until the end: {trouble}{where}"


def _below_home(variable: str, name: str) -> "Path":
    """What a variable says, else a folder in that of the user's caches."""
    # Not at the top: the command line is ready for signals before it is there.
    from pathlib import Path

    from jrlhf.system.paths import expanded

    try:
        folder = os.environ.get(variable) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", name)
        return Path(expanded(folder))
    except ValueError as error:
        raise UsageError(f"there is no home folder; set HOME or {variable}") from error


def _trouble(folder: "Path") -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder}: cannot be written to"


def glob(pattern: str) -> list[str]:
    """The files whose paths fit."""
    import glob

    return glob.glob(pattern)


def set_compiler_flags() -> None:
    """``GPU_FLAGS`` where there is a GPU, each unless the user's own ``XLA_FLAGS`` name it."""
    own = os.environ.get("XLA_FLAGS", "")
    flags = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in own]
    if flags and glob("/dev/nvidia[0-9]*"):
        os.environ["XLA_FLAGS"] = " ".join([own, *flags]).strip()


def quiet_compiler() -> None:
    """XLA's warnings are left out: planning shows what they lead to, and tries again what XLA says it cannot do."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_transformers() -> None:
    """Transformers does not advise to install PyTorch: only its tokenizers are used."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def allow_wide_cells(characters: int) -> None:
    """The csv module reads cells of so many characters; its own bound is 131,072, which long chats exceed."""
    import csv

    csv.field_size_limit(characters)


def restart_in_utf8() -> None:
    """The process replaces itself, once, with one in UTF-8, where the locale has another encoding, or none.

    Else names of files that it cannot spell are not found, and libraries read and write files in it. What stdin, stdout
    and stderr are encoded in stays; a character that they lack is written as ``\\u2028``.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        if sys.stdout is not None:
            os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        _restart()


def restart_with_huge_pages() -> None:
    """Training on a CPU spends a fifth of its time on page faults; malloc avoids them if told so before it starts.

    So the process replaces itself, once, with the tunable set. That changes no result, and nothing happens where the
    user has tunables of their own, or on other systems.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        _restart()


def _restart() -> None:
    # A signal on the way finds the handlers of the process that follows, not an interpreter that has none yet. Where
    # the interpreter may not be started a second time all goes on as it is.
    with held(), suppress(OSError):
        os.execv(sys.executable, sys.orig_argv)
