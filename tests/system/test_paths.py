"""``~`` in every path that a config names, however the config is made; and never a folder of that name."""

import json
import os
import pwd
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import pytest

from jrlhf import assets
from jrlhf.cli import main
from jrlhf.cli.flags import stage_flags, tool_config
from jrlhf.config import Config, ConfigError, DataConfig, ModelConfig, PlanConfig, load_config
from jrlhf.config.files import apply_flags, flag_types
from jrlhf.config.rewards import JSONRuleConfig, RewardsConfig
from jrlhf.config.tools import (
    ExportConfig,
    GenerateConfig,
    QuickstartConfig,
    RankConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ShowConfig,
    VerifyConfig,
)
from jrlhf.data import DataError, load_tokenizer
from jrlhf.data.sources import open_source
from jrlhf.models import load_pretrained
from jrlhf.system.paths import expanded, is_path, path_fields

CONFIGS = (
    *(PlanConfig, GenerateConfig, SampleConfig, RankConfig, ScoreConfig, ShowConfig),
    *(ExportConfig, VerifyConfig, ReportConfig, QuickstartConfig),
)
NO_PATHS = {
    *("attention", "dtype", "schedule", "targets", "on_bad_row", "project", "kv_cache", "train_on", "estimator"),
    *(
        "action",
        "value_from",
        "old_logprobs",
        "coordinator",
        "topology",
        "rater",
        "format",
        "host",
        "kind",
        "stage",
        "stages",
    ),
    *("preset", "combine", "unit", "column", "match", "url", "on_failure", "stop", "gates", "trackers", "patterns"),
}
"""Texts that are none. ``path`` is one of a model's, and a module's name in ppo.rewards.function."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    (tmp_path / "here").mkdir()
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "here")
    return folder


def all_fields(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    nested = [(prefix + f.name, hints[f.name]) for f in fields(cls)]
    inner = [field for name, hint in nested if is_dataclass(hint) for field in all_fields(hint, f"{name}.")]
    return [field for field in nested if not is_dataclass(field[1])] + inner


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_text_is_a_path_or_known_to_be_none(cls: type) -> None:
    for name, hint in all_fields(cls):
        plain = hint.__args__[0] if get_origin(hint) is Annotated else hint
        if not is_path(hint) and "str" in str(plain):
            assert name.rpartition(".")[2] in NO_PATHS or name.endswith("rewards.function.path"), name


@pytest.mark.parametrize("cls", CONFIGS)
def test_flags_expand_it(home: Path, cls: type) -> None:
    required = {f.name: "x" for f in fields(cls) if not isinstance(f.default, str | int | bool | float)}
    empty = cls() if issubclass(cls, Config) else cls(**{n: v for n, v in required.items() if n in path_fields(cls)})
    for name, hint in all_fields(cls):
        if is_path(hint):
            value: Any = apply_flags(empty, {name: ["~/a b/*.jsonl"]})
            for part in name.split("."):
                value = vars(value)[part]
            assert value in (f"{home}/a b/*.jsonl", (f"{home}/a b/*.jsonl",)), name
            with pytest.raises(ConfigError, match=f"--{name}: ~nobody-here/x: ~nobody-here is not known"):
                apply_flags(empty, {name: ["~nobody-here/x"]})


def test_python_expands_it(home: Path) -> None:
    assert Config(run="~/runs/a").run == f"{home}/runs/a"
    assert ModelConfig(path="~").path == str(home)
    assert DataConfig(train={"~/a.jsonl": 3.0, "b.jsonl": 1.0}).train == {f"{home}/a.jsonl": 3, "b.jsonl": 1}
    assert RewardsConfig(models=("~/a", "b")).models == (f"{home}/a", "b")
    assert JSONRuleConfig(schema="~/a.json").schema == f"{home}/a.json"
    assert ExportConfig("~/run", "~/out") == ExportConfig(f"{home}/run", f"{home}/out")
    root = pwd.getpwuid(0)
    assert expanded(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"
    # Only at the start, and only as a whole.
    for text in ("a/~/b", "./~", "a~", "", "-", "asset:sft_train", "name:split"):
        assert expanded(text) == text
    with pytest.raises(ValueError, match="same source"):
        DataConfig(train={"~/a.jsonl": 3.0, f"{home}/a.jsonl": 1.0})
    with pytest.raises(ValueError, match="no user 'nobody-here'"):
        Config(run="~nobody-here/x")


def test_yaml_expands_it_and_names_file_and_line(home: Path) -> None:
    (home / "a.yaml").write_text(
        "run: ~/runs\nsft:\n  model: {path: ~/m}\n  data: {train: {~/a.jsonl: 3, ~/b/*.jsonl: 1}, cache: ~/c}\n"
        "safety: {prompts: ~/s.jsonl}\nppo: {rewards: {models: [~/r], json: {schema: ~/s.json}}}\n"
    )
    config = load_config("~/a.yaml")
    assert (config.run, config.sft.model.path, config.sft.data.cache) == (f"{home}/runs", f"{home}/m", f"{home}/c")
    assert config.sft.data.train == {f"{home}/a.jsonl": 3, f"{home}/b/*.jsonl": 1}
    assert config.safety.prompts == f"{home}/s.jsonl"
    assert (config.ppo.rewards.models, config.ppo.rewards.json.schema) == ((f"{home}/r",), f"{home}/s.json")
    (home / "b.yaml").write_text("seed: 1\nsft:\n  model: {path: ~nobody-here/m}\n  data: {train: {~no-one/a: 1}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(home / "b.yaml")
    first, second = str(error.value).split("\n")
    assert first.startswith(f"{home}/b.yaml:3: sft.model.path: ~nobody-here/m: ~nobody-here is not known")
    assert second.startswith(f"{home}/b.yaml:4: sft.data.train: ~no-one/a: ~no-one is not known")


@pytest.mark.parametrize("value", ["", None])
def test_a_home_that_is_not_known_is_named(value: str | None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    if value is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", value)
    with pytest.raises(ConfigError, match=r"--out: ~/x: ~ is not known.*HOME"):
        tool_config("export", ExportConfig, ["run", "~/x"])
    with pytest.raises(ConfigError, match=r"~/x\.yaml: ~ is not known.*HOME"):
        load_config("~/x.yaml")
    with pytest.raises(ValueError, match="HOME"):
        Config(run="~/x")
    with pytest.raises((DataError, ValueError), match="HOME"):
        open_source("~/x.jsonl")


def test_types_of_flags_are_those_of_the_help() -> None:
    assert set(stage_flags(Config, ("run",))) == {"config", "run"}
    assert is_path(flag_types(Config)["run"])


def test_commands_work_below_it_and_make_no_folder_of_that_name(home: Path, capsys: pytest.CaptureFixture) -> None:
    model = Path(assets.resolve("asset:stories260k"))
    shutil.copytree(model, home / "model")
    rows = [{"prompt": "Once upon", "completion": f" a time {i}"} for i in range(8)]
    for name in ("rows", "more"):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # As a shell passes it on behind an equals sign.
    assert tool_config("generate", GenerateConfig, ["--model=~/m", "--prompts=~/p"]).model == f"{home}/m"
    stage = ["--run=~/run", "--sft.model.path=~/model", "--sft.data.train={~/rows.jsonl: 1, ~/mo*.jsonl: 2}"]
    stage += ["--sft.data.eval=~/rows.jsonl", "--sft.data.max_length=16", "--sft.data.cache=~/cache"]
    stage += ["--sft.candidate_prompts=~/rows.jsonl", "--sft.sampling.max_new_tokens=4", "--sft.log.progress=false"]
    assert main(["sft", *stage, "--sft.batch_size=8"]) == 0
    assert main(["report", "--run=~/run"]) == 0
    assert main(["export", "--run=~/run", "--out=~/out"]) == 0
    few = ["--sampling.max_new_tokens=4"]
    assert main(["generate", "--model=~/out", "--prompts=~/rows.jsonl", "--out=~/drawn/answers.jsonl", *few]) == 0
    assert main(["sample", "--model=~/run", "--prompts=~/rows.jsonl", "--out=~/tasks.jsonl", *few]) == 0
    assert main(["rank", "--tasks=~/tasks.jsonl", "--state=~/s/x.sqlite", "--export=~/r/ranked.jsonl"]) == 0
    assert main(["rank", "--tasks=~/tasks.jsonl", "--import_from=~/r/ranked.jsonl"]) == 0
    assert main(["data", "show", "--model=~/model", "--data=~/rows.jsonl"]) == 0
    assert main(["plan", *stage[:5], "--sft.batch_size=8", "--topology=cpu:1", "--out=~/plan.json"]) == 0
    assert load_tokenizer("~/model").eos_token_id is not None
    assert load_pretrained("~/model", dtype="float32").source == home / "model"
    names = {"run", "out", "drawn", "tasks.jsonl", "s", "r", "tasks.sqlite", "cache", "plan.json"}
    assert names <= {path.name for path in home.iterdir()}
    assert os.listdir() == []
    capsys.readouterr()
    assert main(["export", "--run=~nobody-here/run", "--out=~/o"]) == 2
    assert "--run: ~nobody-here/run: ~nobody-here is not known" in capsys.readouterr().err
