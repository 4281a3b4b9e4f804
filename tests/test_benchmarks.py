"""Every benchmark of a step runs and says what it was made with; its figures are nobody's business here."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = ["--shape", "XS", "--layers", "1", "--vocab", "64", "--repeats", "1"]
SIZES = {
    "sft_step": ["--batch", "2", "--length", "16"],
    "reward_step": ["--batch", "2", "--completions", "3", "--length", "16"],
    "generate": ["--batch", "2", "--prompt", "8", "--new", "4"],
    "ppo_iteration": ["--episodes", "4", "--prompt", "8", "--new", "4", "--epochs", "2", "--minibatches", "2"],
    "load": [],
}


@pytest.mark.parametrize("name", SIZES)
def test_it_prints_a_line_with_its_figure(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *TINY, *SIZES[name]])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines
    for line in lines:
        assert line["value"] > 0.0
        assert line.keys() >= {"figure", "unit", "seconds", "device", "cpu", "python", "jax", "date", "command"}
