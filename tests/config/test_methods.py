"""Methods that users know by name but that are settings of a stage: each entrance says which stage that is."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jrlhf.cli import main
from jrlhf.config import Config, ConfigError, check, load_config
from jrlhf.config.methods import GROUP_METHODS, method_advice
from jrlhf.config.stages import stage_sections
from tests.support import ROOT

KTO = "kto is the stage dpo with loss: kto (docs/dpo.md)"


def test_every_method_of_the_pages_has_its_stage():
    page = (ROOT / "docs/grpo.md").read_text(encoding="utf-8")
    _, *rest = re.findall(r"^\| \[([^\]]+)\]\(https://arxiv", page, re.MULTILINE)
    assert [name.lower().replace(". ", "_") for name in rest] == [*GROUP_METHODS]
    assert all(method_advice(name) == f"{name} is the stage grpo with other settings (docs/grpo.md)" for name in rest)
    assert all(f"loss: {name} " in method_advice(name) for name in ("kto", "ipo", "simpo"))
    assert not any(map(method_advice, [*stage_sections(), "sigmoid", "sftt", ""]))


def test_a_command_a_section_and_a_stage_of_that_name_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["kto", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == f"jrlhf: kto: unknown command; {KTO}\n"
    (tmp_path / "run.yaml").write_text("kto: {beta: 0.1}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"run.yaml:1: kto: unknown key; {KTO}")):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=re.escape(f"ppo, grpo; {KTO}, got ('sft', 'kto')")):
        check(replace(Config(), stages=("sft", "kto")))
