"""A token in the environment or in a URL is in nothing that a run writes, however the run ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrlhf.cli import main
from jrlhf.config import Config, ConfigError, check
from tests.support import ROOT, WITHOUT_TORCH
from tests.support.processes import compiler_flags

SECRET = "hf_0123456789secret"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")

RECIPE = """
run: run
sft:
  model: {path: "asset:stories260k"}
  data: {train: rows.jsonl, eval: rows.jsonl, max_length: 16, buckets: 1, cache: cache/rows}
  batch_size: 4
  epochs: 2
  checkpoint: {every: 1}
  log: {every: 1, eval_every: 1, samples: 1}
  sampling: {max_new_tokens: 2}
"""
CRASHING = """
import sys
import jrlhf.stages.run
from jrlhf.cli import main

def crash(*given, **named):
    raise RuntimeError("no more")

jrlhf.stages.run.write_export = crash
sys.argv[1:] = ["sft", "--config", "recipe.yaml", "--run", "crashed"]
sys.exit(main())
"""


def start(folder: Path, *command: str) -> int:
    """In a process whose home, caches and temporary files are all below ``folder``; what it says is kept there too."""
    own = {name: os.environ[name] for name in ("PATH", "JAX_PLATFORMS", "HF_HUB_OFFLINE", "LANG") if name in os.environ}
    places = {name: str(folder / name) for name in ("HOME", "TMPDIR", "JRLHF_CACHE", "HF_HOME", "XDG_CACHE_HOME")}
    for place in places.values():
        Path(place).mkdir(exist_ok=True)
    quick = {"XLA_FLAGS": compiler_flags()}
    secrets = {name: f"{SECRET}-{name}" for name in VARIABLES}
    path = os.pathsep.join(map(str, (ROOT, WITHOUT_TORCH)))
    environment = own | places | quick | secrets | {"PYTHONPATH": path, "JRLHF_DEBUG": "1"}
    with (folder / "said.txt").open("ab") as said:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, stdout=said, stderr=said, timeout=300, check=False
        )
    return done.returncode


def test_a_token_in_the_environment_is_written_nowhere(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time"}\n{"text": "there was a film."}\n' * 2)
    assert start(tmp_path, "-m", "jrlhf", "sft", "--config", "recipe.yaml") == 0
    assert start(tmp_path, "-c", CRASHING) == 1
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # All kinds of files are looked at: each of these holds what it should.
    assert b"RuntimeError: no more" in files["said.txt"]
    for run in ("run/sft", "crashed/sft"):
        assert b"stories260k" in files[f"{run}/config.yaml"]
        assert b"eval/nll" in files[f"{run}/metrics.jsonl"]
        assert any(name.startswith(f"{run}/tensorboard/") and b"eval/nll" in data for name, data in files.items())
        assert any(name.startswith(f"{run}/checkpoints/2/") and b"stories260k" in data for name, data in files.items())
    assert any(name.startswith("JRLHF_CACHE/compiled/") for name in files)
    assert any(name.startswith("cache/rows/") for name in files)
    assert [name for name, data in files.items() if SECRET.encode() in data] == []


@pytest.mark.parametrize("flag", ["--sft.model.path", "--sft.data.train", "--sft.sampling.stop", "--seed"])
def test_a_password_in_a_url_is_refused_and_not_repeated(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = () if flag == "--sft.data.train" else ("--sft.data.train", "rows.jsonl")
    assert main(["sft", *train, flag, f"https://user:{SECRET}@host/rows.jsonl"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert SECRET not in line
    assert "https://***@host" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_s_name_is_not_repeated_with_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        check(Config(run=f"gs://user:{SECRET}@host/run"))
    assert str(caught.value).count("'gs://***@host/run'") == 2
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("command", ["generate URL rows.jsonl", "score model URL", "export URL out", "verify URL"])
def test_no_tool_takes_one_either(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.replace("URL", f"https://{SECRET}@host/model").split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "must be without a user and password" in line
    assert SECRET not in line
