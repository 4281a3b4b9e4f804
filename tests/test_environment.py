"""What is set before JAX starts: each only where the user has not set it, and a second start compiles nothing again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrlhf import environment
from jrlhf.environment import keep_compiled_programs, restart_with_huge_pages, set_compiler_flags

START = """
from jrlhf.environment import keep_compiled_programs
keep_compiled_programs()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
# Compiles for longer than what is not kept.
def slow(x):
    for i in range(100):
        x = jnp.sin(x) @ x + i
    return x
print(jax.jit(slow)(jnp.full((3, 3), 0.1)).sum().item().hex())
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def start(cache: Path) -> list[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    variables = own | {"JRLHF_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", START]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.split()


def test_a_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    (result, hits), (again, found) = start(tmp_path), start(tmp_path)
    assert hits == "0"
    # The small programs around this one are kept too.
    assert int(found) > 1
    assert result == again
    assert any((tmp_path / "compiled").iterdir())


SPOILT = {"empty": lambda data: b"", "cut": lambda data: data[: len(data) // 2], "noise": lambda data: data[::-1]}


def test_a_poisoned_or_unwritable_cache_is_gone_without(tmp_path: Path) -> None:
    result, _ = start(tmp_path)
    programs = sorted((tmp_path / "compiled").glob("*-cache"))
    assert len(programs) >= len(SPOILT)
    for number, program in enumerate(programs):
        program.write_bytes([*SPOILT.values()][number % len(SPOILT)](program.read_bytes()))
    assert start(tmp_path) == [result, "0"]
    (tmp_path / "file").touch()
    assert start(tmp_path / "file") == [result, "0"]


def test_a_cache_of_the_user_s_own_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("JAX_COMPILATION_CACHE_DIR", *environment.COMPILATION_CACHE)
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    keep_compiled_programs()
    assert [os.environ.get(name) for name in names] == ["/elsewhere", None, None]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JRLHF_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    keep_compiled_programs()
    assert [os.environ[name] for name in names] == [str(tmp_path / "compiled"), "0", "7"]


def test_a_process_restarts_once_with_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on Linux, and never over a setting of the user's own."""
    started = []
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append((path, argv)))
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back as it was
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "platform", "darwin")
    restart_with_huge_pages()
    assert started == []
    monkeypatch.setattr(sys, "platform", "linux")
    restart_with_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    restart_with_huge_pages()
    assert len(started) == 1


def test_flags_are_set_where_there_is_a_gpu_and_the_user_s_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    (name, value), *_ = environment.GPU_FLAGS.items()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    monkeypatch.setattr(environment, "glob", lambda _: [])
    set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
    monkeypatch.setattr(environment, "glob", lambda _: ["/dev/nvidia0"])
    set_compiler_flags()
    set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=here {name}={value}"
    monkeypatch.setenv("XLA_FLAGS", f"{name}=false")
    set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == f"{name}=false"
    monkeypatch.delenv("XLA_FLAGS")
    set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == f"{name}={value}"


def test_the_compiler_knows_every_flag() -> None:
    """It ends a process that names one it does not know, and knows those of a GPU on a CPU too."""

    def started(flags: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    known = started(" ".join(f"{name}={value}" for name, value in environment.GPU_FLAGS.items()))
    assert known.returncode == 0, known.stderr
    assert started("--xla_gpu_is_no_flag=true").returncode != 0
