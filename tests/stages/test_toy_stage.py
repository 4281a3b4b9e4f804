"""A new stage is one file in stages/, a line in the table and a section of the config: every command then has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.runs import first_rows
from tests.support.short_model import SHORT_MODEL

LINES = (
    ("jrlhf/stages/table.py", "from jrlhf.stages.stage import Stage\n", "from jrlhf.stages.toy import TOY\n"),
    ("jrlhf/stages/table.py", "    PPO,\n", "    TOY,\n"),
    (
        "jrlhf/config/stages.py",
        "    ppo: PPOConfig = field(default_factory=PPOConfig)\n",
        "    toy: SFTConfig = field(default_factory=SFTConfig)\n",
    ),
)
"""The file, a line of it, and the line that is put after it."""

COMMANDS = """
import contextlib, io, json, sys
from jrlhf.cli import main
for arguments in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    print(json.dumps([code, out.getvalue()]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the toy stage in it."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "jrlhf", folder / "jrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("toy.py"), folder / "jrlhf/stages/toy.py")
    for name, before, line in LINES:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, name
        path.write_text(text.replace(before, before + line), encoding="utf-8")
    return folder


def run(package: Path, folder: Path, *commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of each command, all in one process of that package."""
    environment = os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_command_knows_it(package: Path, tmp_path: Path) -> None:
    rows = first_rows("sft_train", 16, tmp_path)
    prompts = first_rows("prompts_train", 2, tmp_path)
    section = {
        "data": {"train": rows, "max_length": 32, "buckets": 1},
        "batch_size": 8,
        "log": {"progress": False, "samples": 0, "tensorboard": False},
    }
    sft = section | {"model": {"path": SHORT_MODEL}}
    (tmp_path / "toy.yaml").write_text(json.dumps({"run": str(tmp_path / "run"), "sft": sft, "toy": section}))
    config, folder = ["--config", "toy.yaml"], str(tmp_path / "run")
    results = run(
        package,
        tmp_path,
        ["--help"],
        ["toy", "--help"],
        ["toy"],
        ["pipeline", *config],
        ["toy", *config],
        ["export", "--run", folder, "--out", "out", "--stage", "toy", "--step", "2"],
        ["report", folder],
        ["generate", "--model", folder, "--prompts", prompts, "--sampling.max_new_tokens", "2"],
        ["data", "show", "--model", folder, "--data", rows, "--rows", "1"],
        ["plan", *config, "--topology", "cpu:8"],
    )
    help_text, own_help, without_data, pipeline, again, export, report, generate, show, plan = results
    assert "\n  toy " in help_text[1]
    assert "--toy.data.train" in own_help[1]
    assert "--sft.data.train" not in own_help[1]
    assert without_data[0] == 2
    assert [code for code, _ in (pipeline, again, export, report, generate, show, plan)] == [0] * 7
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["toy"]["steps"], summary["toy"]["rows"]) == (2, 16)
    exported, own = tmp_path / "out/model.safetensors", tmp_path / "run/toy/hf/model.safetensors"
    assert exported.read_bytes() == own.read_bytes()
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<h2>A toy</h2>" in page
    assert "Loss of a toy" in page
    assert len(generate[1].splitlines()) == 2
    assert "toy" in plan[1]
