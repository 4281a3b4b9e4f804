"""SFT and the reward model on packed rows, on all eight devices."""

from dataclasses import replace

import pytest

from jrlhf.config import ConfigError
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from tests.support.runs import small_config
from tests.support.short_model import SHORT_MODEL


def first_loss(folder):
    return next(line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line)


def test_both_stages_run_on_packed_rows(tmp_path):
    config = small_config(tmp_path, "run")
    config = replace(
        config,
        sft=replace(config.sft, candidate_prompts="", pack_length=64, batch_size=8, epochs=2.0),
        reward=replace(config.reward, pack_length=512, batch_size=16, epochs=1.0, microbatch=1),
    )
    summary = run_sft(config)
    # 32 rows of at most 32 tokens are at most 16 packed ones: no more steps than of 16 rows a batch.
    assert summary["steps"] <= 4
    assert summary["heldout_nll"] < summary["base_nll"]
    assert run_reward(config)["rows"] == 16
    model = replace(config.reward.model, path=str(tmp_path / "run" / "sft"))
    plain = replace(config.reward, model=model, pack_length=0)
    run_reward(replace(config, run=str(tmp_path / "plain"), reward=plain))
    # All sixteen rankings are in the first batch of either run.
    losses = [first_loss(tmp_path / run / "reward") for run in ("run", "plain")]
    assert abs(losses[0] - losses[1]) < 1e-5


def test_a_ranking_that_fits_no_row_is_named(tmp_path):
    config = small_config(tmp_path, "run")
    model = replace(config.reward.model, path=SHORT_MODEL)
    config = replace(config, reward=replace(config.reward, model=model, pack_length=32))
    with pytest.raises(ConfigError, match=r"reward\.pack_length: all completions of a prompt stand in one row: a seq"):
        run_reward(config)
