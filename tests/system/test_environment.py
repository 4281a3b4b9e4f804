"""What is set before JAX starts: each only where the user has not set it, and a second start compiles nothing again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jrlhf.data.cache import MIN_CACHED_BYTES, cache_folder
from jrlhf.system import environment
from jrlhf.system.environment import keep_compiled_programs, restart_with_huge_pages, set_compiler_flags
from tests.support import WITHOUT_TORCH
from tests.support.processes import compiler_flags

START = """
from jrlhf.system.environment import keep_compiled_programs
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


PARQUET = """
import sys, pyarrow, pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Once upon"]}), sys.argv[1])
"""


QUICK = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": compiler_flags()}


def command(folder: Path, *arguments: str, user: int | None = None, **variables: str) -> subprocess.CompletedProcess:
    """A command in an environment of its own, as in a container."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    source = str(Path(environment.__file__).parents[2])
    another = [] if user is None else ["setpriv", "--reuid", str(user), "--clear-groups"]
    paths = os.pathsep.join(filter(None, (source, str(WITHOUT_TORCH), kept.pop("PYTHONPATH", ""))))
    return subprocess.run(
        [*another, sys.executable, "-m", "jrlhf", *arguments],
        cwd=folder,
        env=kept | {"PYTHONPATH": paths} | QUICK | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=300,
    )


def can_run_as(user: int, folder: Path) -> bool:
    """Whether a process of that user can be had, and may read the interpreter, its libraries and the package."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    # A virtual environment's libraries may be closed to them though its interpreter is not.
    libraries = "import jrlhf.cli.dispatch, jax, flax, transformers, orbax.checkpoint"
    program = ["setpriv", "--reuid", str(user), "--clear-groups", sys.executable, "-c", libraries]
    with tempfile.TemporaryDirectory() as home:
        kept = {"PATH": os.environ["PATH"], "HOME": home, "PYTHONPATH": str(Path(environment.__file__).parents[2])}
        return subprocess.run(program, cwd=folder, env=kept, capture_output=True, check=False).returncode == 0


HOMES: dict[str, dict[str, str]] = {
    "no home": {},
    "an empty one": {"HOME": ""},
    "one that is not there": {"HOME": "/proc/nowhere"},
    "a file": {"HOME": "/etc/hostname"},
}


@pytest.mark.parametrize("name", HOMES)
def test_a_home_that_is_missing_costs_caches_and_not_the_command(name: str) -> None:
    """One line says what is not kept and what to set; a local file is read all the same."""
    user = None if HOMES[name] else 54321
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o777)
        subprocess.run([sys.executable, "-c", PARQUET, str(folder / "rows.parquet")], check=True)
        if user is not None and not can_run_as(user, folder):
            pytest.skip("no other user can run this interpreter and this package here")
        few = ["--sampling.max_new_tokens", "2"]
        done = command(folder, "generate", "asset:stories260k", "rows.parquet", *few, user=user, **HOMES[name])
        said = done.stderr.decode()
        assert done.returncode == 0, said
        assert done.stdout.startswith(b'{"prompt": "Once upon"')
        [line] = [line for line in said.split("\n") if line.startswith("jrlhf: ")]
        assert "compiled programs are not cached" in line
        assert "JRLHF_CACHE" in line
        assert "HF_HOME" in line
        assert [path.name for path in folder.iterdir()] == ["rows.parquet"]


def test_caches_that_are_named_are_used_without_a_home(tmp_path: Path) -> None:
    named = {"JRLHF_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub"), "HOME": "/proc/nowhere"}
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n')
    few = ["--sampling.max_new_tokens", "2"]
    done = command(tmp_path, "generate", "asset:stories260k", "p.jsonl", *few, **named)
    assert (done.returncode, done.stderr) == (0, b"")
    assert any((tmp_path / "cache" / "compiled").iterdir())


def test_a_cache_of_rows_without_a_place_is_gone_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no folder is named; one that is named and cannot be used is an error."""
    big = tmp_path / "rows.jsonl"
    big.write_bytes(b" " * (MIN_CACHED_BYTES + 1))
    monkeypatch.setenv("JRLHF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    for home in ("", "/proc/nowhere"):
        monkeypatch.setenv("HOME", home)
        caplog.clear()
        assert cache_folder("auto", [big]) is None
        [record] = caplog.records
        assert "tokenised rows are kept in memory: " in record.message
        assert "JRLHF_CACHE" in record.message
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="no home folder; set HOME or JRLHF_CACHE"):
        environment.cache_home()
    monkeypatch.setenv("JRLHF_CACHE", str(tmp_path / "kept"))
    assert cache_folder("auto", [big]) == tmp_path / "kept"


LOCALES: dict[str, dict[str, str]] = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 output": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_files_are_utf8_and_results_are_printed_in_any_locale(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Once é 語 🙂", "completion": " a\u2028dög"}] * 4
    (tmp_path / "é").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "é" / "rows.jsonl").write_text(lines, encoding="utf-8")
    own = LOCALES[name] | {"JRLHF_CACHE": os.environ["JRLHF_CACHE"], "HOME": str(tmp_path)}
    few = ["--sampling.max_new_tokens", "2"]
    encode_example = command(tmp_path, "generate", "asset:stories260k", "é/rows.jsonl", *few, **own)
    assert encode_example.returncode == 0, encode_example.stderr
    for encoding in ("utf-8", "latin-1"):
        printed = [json.loads(line)["prompt"] for line in encode_example.stdout.decode(encoding).splitlines()]
        assert printed == [rows[0]["prompt"]] * 4
    shown = command(tmp_path, "data", "show", "asset:stories260k", "é/rows.jsonl", "--rows", "1", **own)
    assert shown.returncode == 0, shown.stderr
    assert b"rows 4" in shown.stdout
    missing = command(tmp_path, "data", "show", "asset:stories260k", "é/gone.jsonl", **own)
    assert missing.returncode == 2
    assert b"no such file; did you mean rows.jsonl?" in missing.stderr
