"""Every environment variable and every setting of Python that jrlhf changes for the whole process.

Most of them must be set before Python or JAX starts: flags of the compiler, a cache of what it made, and huge pages.
Imports no JAX; JAX's own settings are in ``jrlhf.parallel.settings``.
"""

import logging
import os
import sys
from contextlib import suppress

from jrlhf.system.errors import UsageError
from jrlhf.system.interrupts import hold_signals

# The import of typing would take longer than all of this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

COMPILATION_CACHE = {
    # A start compiles some thirty programs, most of them in less than JAX's own minimum of one second.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # The least recently used programs make room.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 * 2**30),
}

GPU_FLAGS = {
    # Overlaps communication between devices with computation. NVIDIA's own JAX images set it
    # (docs.nvidia.com/jax-toolbox, "Environment variables"); not measured by us.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
}
"""XLA flags for NVIDIA GPUs, which change the order of operations but no result.

Other platforms have none. TPU: libtpu's defaults suit training, and a flag that its version does not know ends the
process. CPU: oneDNN's matrix products gained nothing in our measurements (benchmarks/results/compare.md).
"""


TPU_COMPILER = {
    # A second process that loads libtpu would end at the first one's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Otherwise the metadata server of a cloud is asked about this machine, for minutes where there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
"""Variables that libtpu reads when it starts. Any type of accelerator will do: each compilation names its own."""


def cache_home() -> "Path":
    """Return the folder for files that can be recomputed: $JRLHF_CACHE, else ~/.cache/jrlhf.

    Without a home folder it raises ValueError, which names that variable.
    """
    return _below_home("JRLHF_CACHE", "jrlhf")


def usable_cache() -> "tuple[Path | None, str]":
    """Create ``cache_home`` if necessary and return it; or return None and why nothing can be stored there."""
    try:
        folder = cache_home()
    except ValueError as error:
        return None, str(error)
    trouble = _trouble(folder)
    return (None, f"{trouble}; JRLHF_CACHE names another folder") if trouble else (folder, "")


def keep_compiled_programs() -> str:
    """Make JAX cache its compiled programs, so that the next start is fast, unless the user has set a cache.

    Returns a warning if there is no place for the cache, else an empty text.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    folder, trouble = usable_cache()
    if folder is None:
        return f"compiled programs are not cached: {trouble}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    for name, value in COMPILATION_CACHE.items():
        os.environ.setdefault(name, value)
    return ""


def keep_hub_files() -> str:
    """Give the Hugging Face libraries a temporary folder if their own is not writable, since some write even to read a
    local file. A folder that the user names, or that already has models, stays in use.

    Returns a warning in that case, else an empty text.
    """
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
    return f"files from the hub go to the temporary folder {folder}: {trouble}{where}"


def _below_home(variable: str, name: str) -> "Path":
    """Return the folder that a variable names, else a folder in the user's cache folder."""
    # Imported here, so that the command line handles signals early.
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
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder}: not writable"


def glob(pattern: str) -> list[str]:
    """Return the files whose paths match."""
    import glob

    return glob.glob(pattern)


def set_compiler_flags() -> None:
    """Set each of ``GPU_FLAGS`` on a machine with a GPU, unless the user's own ``XLA_FLAGS`` name it."""
    own = os.environ.get("XLA_FLAGS", "")
    flags = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in own]
    if flags and glob("/dev/nvidia[0-9]*"):
        os.environ["XLA_FLAGS"] = " ".join([own, *flags]).strip()


def allow_tpu_compiler() -> None:
    """Let libtpu compile in this process without a TPU: it asks no cloud for one, and shares the machine."""
    for name, value in TPU_COMPILER.items():
        os.environ.setdefault(name, value)


def quiet_compiler() -> None:
    """Hide XLA's warnings: planning shows their effects itself, and retries what XLA reports as impossible."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_transformers() -> None:
    """Transformers does not advise to install PyTorch, since only its tokenizers are used, and does not foretell
    "indexing errors" from a long row, which jrlhf cuts to max_length and counts."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_no_warning_of_length)


def _is_no_warning_of_length(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token indices sequence length is longer than")


def allow_wide_cells(characters: int) -> None:
    """The csv module reads cells of so many characters; its own bound is 131,072, which long chats exceed."""
    import csv

    csv.field_size_limit(characters)


def restart_in_utf8() -> None:
    """Restart the process once in UTF-8 mode if the locale has another encoding or none.

    Otherwise it could not open files whose names the encoding lacks, and libraries would read and write files in that
    encoding. stdin, stdout and stderr keep their encoding; a character that it lacks is written as ``\\u2028``.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        if sys.stdout is not None:
            os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        _restart()


def restart_with_huge_pages() -> None:
    """Restart the process once with huge pages in malloc, since page faults take a fifth of training time on a CPU.

    malloc reads the setting only at the start of a process. It changes no result. Nothing happens on other systems, or
    if the user has set GLIBC_TUNABLES.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        _restart()


def _restart() -> None:
    # Signals wait until the new process has its handlers. If the interpreter cannot be restarted, this process
    # continues unchanged.
    with hold_signals(), suppress(OSError):
        os.execv(sys.executable, sys.orig_argv)
