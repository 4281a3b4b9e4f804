"""The quick start as a user starts it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jrlhf.cli import main

KEYS = {
    "sft": {"base_nll", "heldout_nll"},
    "reward": {"heldout_accuracy", "bag_of_words_accuracy", "longer_wins_accuracy", "ece"},
    "ppo": {
        "reward_before", "reward_after", "gold_before", "gold_after", "gold_stderr", "kl", "entropy_after",
        "distinct2_before", "distinct2_after", "max_abs_logprob_diff", "first_minibatch_max_abs_log_ratio",
    },
    "seconds": {"sft", "reward", "ppo", "total"},
}  # fmt: skip


def quick_start(out: Path, *flags: str) -> None:
    """As a user starts it: the tests' eight devices and weak optimisation make it several times as slow."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jrlhf", "quickstart", "--out", str(out), *flags]
    subprocess.run(command, env=environment, cwd=out, check=True, timeout=3000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smoke preset with seed 5: the one that SMOKE_RUN names, or one made here."""
    if "SMOKE_RUN" in os.environ:
        return Path(os.environ["SMOKE_RUN"])
    out = tmp_path_factory.mktemp("smoke")
    quick_start(out, "--preset", "smoke", "--seed", "5")
    return out


def copy_run(run: Path, out: Path) -> None:
    """Copy the stages of a run without what the quick start makes of them."""
    shutil.copytree(run, out, dirs_exist_ok=True)
    (out / "summary.json").unlink()
    (out / "report.html").unlink()


def test_smoke_writes_every_figure(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages are done by then: what is made of them is made here, where the types of everything are checked."""
    copy_run(finished, tmp_path)
    trained = (tmp_path / "ppo" / "metrics.jsonl").read_bytes()
    assert main(["quickstart", "--out", str(tmp_path), "--preset", "smoke", "--seed", "5"]) == 0
    assert (tmp_path / "ppo" / "metrics.jsonl").read_bytes() == trained, "a stage that is done is not run again"
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    for part, names in KEYS.items():
        assert names <= summary[part].keys()
        assert all(math.isfinite(value) for value in summary[part].values())
    assert summary["seed"] == 5
    assert {"python", "jax", "jrlhf"} <= summary["versions"].keys()
    assert summary["sft"]["heldout_nll"] < summary["sft"]["base_nll"]
    assert 0.75 < summary["reward"]["bag_of_words_accuracy"] < 0.87
    # Attention scores reach 170 here, where one unit in the last place of a float32 is 1.5e-5.
    assert summary["ppo"]["first_minibatch_max_abs_log_ratio"] <= 5e-5
    assert "gold" in capsys.readouterr().out
    gold = summary["curves"]["ppo"]["eval/gold"]
    assert [step for step, _ in gold] == [0, 2]
    assert [value for _, value in gold] == [summary["ppo"]["gold_before"], summary["ppo"]["gold_after"]]
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "eval/gold" in report


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_smoke_ends_in_another_algorithm(
    algorithm: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the same SFT and reward model; its figures, answers and report are those of PPO's quick start."""
    copy_run(finished, tmp_path)
    shutil.rmtree(tmp_path / "ppo")
    command = ["quickstart", "--out", str(tmp_path), "--preset", "smoke", "--seed", "5", "--algorithm", algorithm]
    assert main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    sampler = {"max_abs_logprob_diff", "first_minibatch_max_abs_log_ratio"}
    assert KEYS["ppo"] - (sampler if algorithm == "dpo" else set()) <= summary[algorithm].keys()
    assert all(math.isfinite(value) for value in summary[algorithm].values())
    assert "ppo" not in summary
    assert "gold" in capsys.readouterr().out
    assert "eval/gold" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_reaches_its_targets(tmp_path: Path, seed: int) -> None:
    """The figures that the README promises, for three seeds in a row."""
    quick_start(tmp_path, "--seed", str(seed))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    sft, reward, ppo = summary["sft"], summary["reward"], summary["ppo"]
    assert sft["heldout_nll"] <= 0.6 * sft["base_nll"]
    assert reward["heldout_accuracy"] >= 0.77
    assert ppo["reward_after"] - ppo["reward_before"] >= 1.0  # scores have standard deviation 1
    assert ppo["gold_after"] - ppo["gold_before"] > 4 * ppo["gold_stderr"]
    assert ppo["distinct2_after"] >= 0.6 * ppo["distinct2_before"]
    assert ppo["kl"] <= 20.0
    assert ppo["first_minibatch_max_abs_log_ratio"] <= 5e-5
    # Enough evaluations that reward and gold over √KL can be fitted.
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("fit of eval/") >= 2
