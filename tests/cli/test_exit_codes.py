"""Exit codes do not depend on how the package is installed: they are the same where there is no source to read."""

import compileall
import subprocess
import sys
from pathlib import Path

import pytest

import jrlhf
from jrlhf import assets
from jrlhf.config import ConfigError
from jrlhf.config.gates import GatesFailed
from jrlhf.data import DataError
from jrlhf.parallel.peers import PeerLost, PeerRefused
from jrlhf.rank.tasks import TaskError
from jrlhf.rules import EndpointError
from jrlhf.runs.checkpoints import CheckpointError
from jrlhf.runs.lock import RunLocked
from jrlhf.system.errors import USAGE_ERRORS, RunError, UsageError, reason_of
from jrlhf.train.guards import GuardStop


@pytest.fixture(scope="module")
def without_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as .pyc files alone, beside the data it ships."""
    folder, package = tmp_path_factory.mktemp("compiled"), Path(jrlhf.__file__).parent
    for source in package.rglob("*"):
        copy = folder / "jrlhf" / source.relative_to(package)
        if source.is_dir() and source.name != "__pycache__":
            copy.mkdir(parents=True, exist_ok=True)
        elif source.is_file() and "__pycache__" not in source.parts:
            copy.write_bytes(source.read_bytes())
    assert compileall.compile_dir(folder / "jrlhf", quiet=2, legacy=True, optimize=0)
    for source in (folder / "jrlhf").rglob("*.py"):
        source.unlink()
    return folder


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from jrlhf.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_a_users_mistake_is_exit_code_2_without_sources(without_sources: Path) -> None:
    done = run(without_sources, "score", "asset:no_such_model", "asset:prompts_heldout")
    assert (done.returncode, done.stderr.startswith("jrlhf: no asset 'no_such_model'")) == (2, True), done.stderr
    done = run(without_sources, "generate", "asset:stories260k", "asset:prompts_heldout", "--max_length", "x")
    assert done.returncode == 2, done.stderr
    broken = without_sources / "model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no_such_type"}', encoding="utf-8")
    done = run(without_sources, "plan", "--sft.model.path", str(broken))
    assert done.returncode == 2, done.stderr


def test_what_a_user_can_put_right_has_one_root_and_known_failures_another() -> None:
    for kind in (ConfigError, DataError, TaskError, RunLocked, PeerRefused):
        assert issubclass(kind, UsageError)
    for kind in (CheckpointError, EndpointError, GatesFailed, GuardStop, PeerLost):
        assert issubclass(kind, RunError)
    assert issubclass(UsageError, ValueError)
    assert ValueError not in USAGE_ERRORS
    with pytest.raises(UsageError, match="no asset"):
        assets.resolve("asset:nothing")


def test_a_reason_has_the_name_of_a_class_only_where_the_message_may_say_too_little() -> None:
    plain = (
        GuardStop("a"),
        UsageError("a"),
        FloatingPointError("a"),
        TimeoutError("a"),
        FileNotFoundError(2, "b", "a"),
    )
    assert [reason_of(error) for error in plain] == ["a"] * 4 + ["a: b"]
    others = (KeyError("a"), ValueError("a"), OSError(28, "No space left", "a"), ValueError())
    assert [reason_of(error) for error in others] == ["KeyError: 'a'", "ValueError: a", "OSError: a: No space left",
                                                      "ValueError"]  # fmt: skip


def test_no_part_of_the_package_is_read_back_to_choose_an_exit_code() -> None:
    source = (Path(jrlhf.__file__).parent / "cli" / "dispatch.py").read_text(encoding="utf-8")
    assert "extract_tb" not in source
