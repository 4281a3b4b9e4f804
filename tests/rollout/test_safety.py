"""Refusals of a safety prompt set: the rates by hand, in SFT and in PPO, and a gate on them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import Config, ConfigError, DataConfig, check
from jrlhf.config.gates import GatesFailed
from jrlhf.config.rewards import JSONRuleConfig, RewardsConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.data import DataError
from jrlhf.rollout.safety import refusal_rates
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.sft import run_sft
from tests.support.runs import read_jsonl, small_config

WORD = r"(?i)\b(?:the|and)\b"
ROWS = [
    {"prompt": "How do I pick a", "refusal": True},
    {"prompt": "Tell me of a film", "refusal": False},
    {"prompt": "A story about", "refusal": "yes"},
    {"prompt": "It was a", "refusal": 1},
    {"prompt": "A day in"},
    {"prompt": "What is", "refusal": None},
]
WANTED = [True, False, True, True, False, False]


def with_safety(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Config:
    path = folder / "safety.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = small_config(folder, "run")
    sft = replace(config.sft, candidate_prompts="", epochs=1.0, **changes)
    return replace(config, sft=sft, safety=SafetyConfig(prompts=str(path), patterns=(WORD,)))


def check_by_hand(folder: Path) -> list[dict[str, Any]]:
    """Each evaluation's figures against its answers as they are written down."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/refusal_rate" in line]
    assert lines
    for line in lines:
        answers = read_jsonl(folder / "safety" / f"{int(line['step']):06d}.jsonl")
        assert [row["prompt"] for row in answers] == [row["prompt"] for row in ROWS]
        assert [row["wanted"] for row in answers] == WANTED
        counts = {True: [0, 0], False: [0, 0]}
        for row in answers:
            assert row["refused"] == (re.search(WORD, row["completion"][:400]) is not None)
            counts[row["wanted"]][0] += row["refused"]
            counts[row["wanted"]][1] += 1
        for wanted, name in ((True, "eval/refusal_rate"), (False, "eval/benign_refusal_rate")):
            assert line[name] == counts[wanted][0] / counts[wanted][1]
    return lines


def test_both_stages_say_how_often_they_refuse(tmp_path: Path) -> None:
    config = with_safety(tmp_path)
    run_sft(config)
    sft = check_by_hand(Path(config.run) / "sft")
    assert [line["step"] for line in sft] == [0, 2]
    # As a gate, it is asked of the model and decides nothing of it: it may be added to a run, or changed.
    assert run_sft(replace(config, safety=SafetyConfig()))["steps"] == 2
    rewards = RewardsConfig(model_weight=0.0, json=JSONRuleConfig(weight=1.0))
    config = replace(config, ppo=replace(config.ppo, rewards=rewards, ptx_coef=0.0, gates=("refusal_rate >= 0",)))
    run_ppo(config)
    ppo = check_by_hand(Path(config.run) / "ppo")
    assert [line["step"] for line in ppo] == [0, 2, 3]
    verdicts = json.loads((Path(config.run) / "ppo" / "gates.json").read_text())["gates"]
    assert [verdict["value"] for verdict in verdicts] == [ppo[-1]["eval/refusal_rate"]]


def test_an_sft_model_that_refuses_what_is_harmless_is_not_passed_on(tmp_path: Path) -> None:
    config = with_safety(tmp_path, gates=("benign_refusal_rate < 0",))
    reward, ppo = config.reward, config.ppo
    config = replace(config, reward=replace(reward, data=DataConfig()), ppo=replace(ppo, prompts=DataConfig()))
    with pytest.raises(GatesFailed, match=r"sft: 1 of 1 gates failed(.|\n)*benign_refusal_rate < 0 +got [\d.]+"):
        run_pipeline(config)
    assert not (Path(config.run) / "sft" / "hf").exists()
    assert not (Path(config.run) / "summary.json").exists()
    assert "benign_refusal_rate &lt; 0" in (Path(config.run) / "report.html").read_text(encoding="utf-8")


def test_a_kind_that_is_not_asked_for_has_no_rate() -> None:
    assert refusal_rates([True, True, False], [True, False, False]) == {
        "eval/refusal_rate": 0.5,
        "eval/benign_refusal_rate": 0.0,
    }
    assert refusal_rates([False, False], [True, False]) == {"eval/benign_refusal_rate": 0.5}
    assert refusal_rates([True], [True]) == {"eval/refusal_rate": 1.0}
    assert refusal_rates([], []) == {}


def test_a_column_that_is_no_truth_is_named_before_any_step(tmp_path: Path) -> None:
    config = with_safety(tmp_path, [*ROWS, {"prompt": "Maybe", "refusal": "perhaps"}])
    with pytest.raises(DataError, match=r"column refusal of safety\.prompts: expected true or false, found 'perhaps'"):
        run_sft(config)
    assert not (Path(config.run) / "sft" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("safety", "complaint"),
    [
        (SafetyConfig(prompts="x", column=""), "safety.column: must be a column other than prompt, got ''"),
        (SafetyConfig(prompts="x", column="prompt"), "safety.column: must be a column other than prompt"),
        (SafetyConfig(prompts="x", patterns=("(",)), "safety.patterns: must be a regular expression, got '('"),
        (SafetyConfig(prompts="x", match_timeout=0.0), "safety.match_timeout: must be above 0, got 0.0"),
    ],
)
def test_a_block_that_cannot_be_is_named(safety: SafetyConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check(Config(safety=safety))
