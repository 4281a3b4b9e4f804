"""Eight CPU devices and JAX at its strictest, set before anything imports JAX."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from itertools import compress

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Programs run for milliseconds here and compile for seconds: LLVM's optimiser is not worth its time.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # As many modules as threads could compile at once cost nearly twice the work of one, and the cores are busy.
        "--xla_cpu_parallel_codegen_split_count=1",
        # Half of what is left of compiling is MLIR's, for each fused loop. Later versions know no other way: with the
        # second Python the tests run what users run, as the quick start and the examples do with both.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)
# What commands keep for a second start is kept for the tests alone.
os.environ["JRLHF_CACHE"] = tempfile.mkdtemp(prefix="jrlhf-tests-")
# Half of the tests' time is compiling, and most of that is what another test, or another process, has compiled before:
# the first process of all makes one folder for what each of them finds. Beside it is what tests.support.once keeps.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JRLHF_TESTS"] = os.path.join(os.environ["JRLHF_CACHE"], "of-all-tests")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["JRLHF_TESTS"], "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.support import signatures
from tests.support.second_python import further_cases, read_list

# From here on every signature of the package is checked at run time.
signatures.install("jrlhf")

LONGEST = ("test_guards.py", "test_loop.py", "test_tpu_programs.py")
"""Files whose tests take half a minute each, or more."""

# Small runs that the tests of several folders read.
pytest_plugins = ["tests.support.runs"]

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A deadline would make a test's result depend on the machine's speed.
settings.register_profile("jrlhf", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jrlhf")

atexit.register(shutil.rmtree, os.environ["JRLHF_CACHE"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--second-python",
        action="store_true",
        help="test one case where tests/second_python.txt says that it is enough",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests come first: at the end of the run, one process alone would be busy with them."""
    if config.getoption("--second-python"):
        tests = [(item.path, item.nodeid.partition("[")[0]) for item in items]
        further = further_cases(tests, read_list())
        config.hook.pytest_deselected(items=list(compress(items, further)))
        items[:] = [item for item, left_out in zip(items, further, strict=True) if not left_out]
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What imports and collecting have made stays to the end: the garbage collector need not look at it each time.

    Nor need it come after every 700 objects: tracing makes many, and keeps most of them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
