"""What a stage was made from: where any of it has changed, it refuses to go on or to be taken as done."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import assets
from jrlhf.cli import main
from jrlhf.config import CanaryConfig, Config, ConfigError, LoRAConfig, ModelConfig, to_yaml
from jrlhf.config.rewards import FunctionRuleConfig, RewardsConfig
from jrlhf.config.tools import ExportConfig, ReportConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.report import run_report
from jrlhf.runs.folder import open_stage
from jrlhf.runs.origin import file_input
from jrlhf.runs.origin_check import check_origin
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.ppo import PPOInputs, run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.stages.table import STAGES as TABLE
from jrlhf.stages.table import stage_named
from jrlhf.tools.export import run_export
from tests.support.runs import read_jsonl, small_config

RUN: dict[str, Callable[[Config], dict[str, Any]]] = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
STAGES: list[str] = [*RUN]


def other_weights(model: Path) -> None:
    """The same shapes; every weight is moved by little, as by training."""
    tensors = load_file(model / "model.safetensors")
    moved = {name: tensor + np.float32(1e-3) for name, tensor in tensors.items()}
    save_file(moved, model / "model.safetensors", {"format": "pt"})


def other_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def other_tokenizer(model: Path) -> None:
    path = model / "special_tokens_map.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"sep_token": "<s>"}))


def another_row(path: Path) -> None:
    """The first text of the last row begins with other letters; what max_length cuts off changes no row."""
    rows = read_jsonl(path)
    name = next(iter(rows[-1]))
    text = rows[-1][name]
    rows[-1][name] = ["qx" + text[0], *text[1:]] if isinstance(text, list) else "qx" + text
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def another_line(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "# other\n", encoding="utf-8")


@contextmanager
def changed(path: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """A file or folder while it is changed; then it is as it was, but for its times."""
    kept = path.with_name(path.name + ".kept")
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, kept)
    try:
        change(path)
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        kept.rename(path)


def make_config(folder: Path) -> Config:
    """A pipeline that reads every kind of input. Its models are copies of the shipped one, which nothing here runs."""
    config = small_config(folder, "run", save_every=1)
    for model in ("base", "second", "judge", "run/sft/hf", "run/reward/hf"):
        shutil.copytree(assets.resolve("asset:stories260k"), folder / model)
    write_rows(folder / "run" / "sft" / "candidates.jsonl", [{"prompt": "Once", "completions": [" upon", " more"]}] * 4)
    write_rows(folder / "safety.jsonl", [{"prompt": f"How {i}", "refusal": i == 1} for i in range(3)])
    (folder / "own_rule.py").write_text("def reward(prompts, completions):\n    return [0.0 for _ in prompts]\n")
    more = Path(config.sft.data.eval).with_name("more.jsonl")
    shutil.copyfile(config.sft.data.eval, more)
    mixed = {str(config.sft.data.train): 3.0, str(more): 1.0}
    rewards = RewardsConfig(
        models=(str(folder / "second"),), function=FunctionRuleConfig(weight=1.0, path="own_rule:reward")
    )
    canary = CanaryConfig(action="warn", judge=ModelConfig(str(folder / "judge")))
    return replace(
        config,
        safety=SafetyConfig(prompts=str(folder / "safety.jsonl")),
        sft=replace(config.sft, model=ModelConfig(str(folder / "base")), data=replace(config.sft.data, train=mixed)),
        ppo=replace(config.ppo, rewards=rewards, canary=canary),
    )


def begin(config: Config, stage: str) -> None:
    """What a stage notes before its first step, and a checkpoint that nobody looks into."""
    with open_stage(config, stage) as folder:
        check_origin(stage_named(stage).inputs(config), folder)
        (folder / "checkpoints" / "1").mkdir(parents=True)


def end(config: Config, stage: str) -> dict[str, Any]:
    """What makes a stage that has begun one that is done."""
    summary = {"seconds": 1.0}
    (Path(config.run) / stage / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Stages that have begun. Tests change their inputs, and put them back."""
    folder = tmp_path_factory.mktemp("origin")
    config = make_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for stage in STAGES:
            begin(config, stage)
        yield config


def inputs_of(config: Config) -> dict[str, tuple[str, Path, Callable[[Path], None], str]]:
    """The stage that reads an input, where it is, how it is changed, and what is said of it."""
    run, data, folder = Path(config.run), Path(config.sft.data.eval).parent, Path(config.run).parent
    rows = "has other rows than when the run began"
    weights = r"with other weights \(model\.safetensors\)"

    def prompts(name: str) -> Path:
        return data / f"prompts_{name}.jsonl"

    return {
        "sft weights": ("sft", folder / "base", other_weights, f"sft was made from .*base {weights}"),
        "sft tokenizer": ("sft", folder / "base", other_tokenizer, r"another tokenizer \(special_tokens_map\.json\)"),
        "sft template": ("sft", folder / "base", other_template, r"another chat template \(chat_template\.jinja\)"),
        "sft train": ("sft", data / "sft_train.jsonl", another_row, rf"sft\.data\.train: .*sft_train\.jsonl {rows}"),
        "sft second source": ("sft", data / "more.jsonl", another_row, rf"sft\.data\.train: .*more\.jsonl {rows}"),
        "sft eval": ("sft", data / "sft_heldout.jsonl", another_row, rf"sft\.data\.eval: .* {rows}"),
        "sft candidates": ("sft", prompts("heldout"), another_row, rf"sft\.candidate_prompts: .* {rows}"),
        "sft safety": ("sft", folder / "safety.jsonl", another_row, rf"safety\.prompts: .* {rows}"),
        "reward weights": ("reward", run / "sft" / "hf", other_weights, f"reward was made from .*sft/hf {weights}"),
        "reward template": ("reward", run / "sft" / "hf", other_template, r"another chat template"),
        "reward train": ("reward", data / "rankings_train.jsonl", another_row, rf"reward\.data\.train: .* {rows}"),
        "reward eval": ("reward", data / "rankings_heldout.jsonl", another_row, rf"reward\.data\.eval: .* {rows}"),
        "reward texts": ("reward", run / "sft" / "candidates.jsonl", another_row, rf"reward\.normalise: .* {rows}"),
        "ppo policy": ("ppo", run / "sft" / "hf", other_weights, f"ppo was made from .*sft/hf {weights}"),
        "ppo reward": ("ppo", run / "reward" / "hf", other_weights, f"ppo was made from .*reward/hf {weights}"),
        "ppo second reward": ("ppo", folder / "second", other_weights, f"ppo was made from .*second {weights}"),
        "ppo judge": ("ppo", folder / "judge", other_weights, f"ppo was made from .*judge {weights}"),
        "ppo train": ("ppo", prompts("train"), another_row, rf"ppo\.prompts\.train: .* {rows}"),
        "ppo eval": ("ppo", prompts("heldout"), another_row, rf"ppo\.prompts\.eval: .* {rows}"),
        "ppo ptx": ("ppo", data / "sft_train.jsonl", another_row, rf"ppo\.ptx\.train: .* {rows}"),
        "ppo safety": ("ppo", folder / "safety.jsonl", another_row, rf"safety\.prompts: .* {rows}"),
        "ppo rule": (
            "ppo",
            folder / "own_rule.py",
            another_line,
            r"ppo\.rewards\.function\.path: .*own_rule\.py has changed since the run",
        ),
    }  # fmt: skip


INPUTS = [*inputs_of(Config(run="/run"))]


@pytest.mark.parametrize("done", [True, False], ids=["done", "broken off"])
@pytest.mark.parametrize("name", INPUTS)
def test_another_input_is_named_and_refused(name: str, done: bool, made: Config) -> None:
    stage, path, change, said = inputs_of(made)[name]
    folder = Path(made.run) / stage
    before = (folder / "origin.json").read_bytes()
    if done:
        end(made, stage)
    try:
        with changed(path, change), pytest.raises(ConfigError, match=said) as refused:
            RUN[stage](made)
    finally:
        (folder / "summary.json").unlink(missing_ok=True)
    assert f"remove {folder} to start over" in str(refused.value)
    assert "--accept_changes" in str(refused.value)
    # One thing was changed, and one is named.
    assert len(str(refused.value).splitlines()) == 3
    assert (folder / "origin.json").read_bytes() == before


@pytest.mark.parametrize("done", [True, False], ids=["done", "broken off"])
def test_what_is_touched_moved_or_written_again_is_no_other_input(
    done: bool, made: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(made.sft.data.eval).parent
    for path in (*data.iterdir(), *(data.parent / "base").iterdir()):
        if path.is_file():
            os.utime(path)
    moved = replace(made, run=str(shutil.copytree(made.run, tmp_path / "moved")))
    rows = read_jsonl(data / "sft_heldout.jsonl")
    again = "".join(json.dumps(row, indent=None, separators=(" ,", " : ")) + "\n\n" for row in rows)
    with changed(data / "sft_heldout.jsonl", lambda path: write_text(path, again)):
        for config in (made, moved):
            for stage in STAGES:
                if done:
                    summary = end(config, stage)
                    assert RUN[stage](config) == summary
                    (Path(config.run) / stage / "summary.json").unlink()
                else:
                    assert not check_origin(stage_named(stage).inputs(config), Path(config.run) / stage).changed
    assert not said_of_origin(caplog)


def said_of_origin(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jrlhf.origin"]


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def test_what_is_done_reads_nothing_again_whose_files_are_as_they_were(made: Config, tmp_path: Path) -> None:
    """Digests of another day are taken over as they stand, until a file is touched."""
    config = replace(made, run=str(shutil.copytree(made.run, tmp_path / "run")))
    summary, path = end(config, "sft"), Path(config.run) / "sft" / "origin.json"
    run_sft(config)
    origin = json.loads(path.read_text())
    for of in origin["inputs"]:
        stat = [Path(file).stat() for file in of["files"]]
        assert [*of["files"].values()] == [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stat]
        of["digest"] = "of another day"
    path.write_text(json.dumps(origin))
    assert run_sft(config) == summary
    for touched, said in ((Path(made.sft.data.eval), r"sft\.data\.eval"), (Path(made.sft.model.path), "weights")):
        os.utime(touched / "model.safetensors" if touched.is_dir() else touched)
        with pytest.raises(ConfigError, match=said):
            run_sft(config)


def test_a_version_that_makes_other_rows_of_the_same_file_is_named(made: Config, tmp_path: Path) -> None:
    config = replace(made, run=str(shutil.copytree(made.run, tmp_path / "run")))
    path = Path(config.run) / "reward" / "origin.json"
    origin = json.loads(path.read_text())
    next(of for of in origin["inputs"] if of["key"] == "reward.data.train")["digest"] = "of another version"
    path.write_text(json.dumps(origin))
    with pytest.raises(ConfigError, match=r"reward\.data\.train: .* gives other rows .* another version of jrlhf"):
        run_reward(config)
    # One that is done is done: nothing is made again.
    summary = end(config, "reward")
    assert run_reward(config) == summary


def test_rows_that_are_none_any_more_are_other_rows(made: Config) -> None:
    end(made, "sft")
    try:
        with (
            changed(Path(made.sft.data.eval), lambda path: write_text(path, "{")),
            pytest.raises(ConfigError, match=r"sft\.data\.eval: .* has other rows"),
        ):
            run_sft(made)
    finally:
        (Path(made.run) / "sft" / "summary.json").unlink()


def test_safety_prompts_of_another_name_are_no_change(made: Config, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    write_rows(other, [{"prompt": "Why", "refusal": True}])
    config = replace(
        made, run=str(shutil.copytree(made.run, tmp_path / "run")), safety=SafetyConfig(prompts=str(other))
    )
    for safety in (config.safety, SafetyConfig(), config.safety):
        now = replace(config, safety=safety)
        assert not check_origin(stage_named("sft").inputs(now), Path(config.run) / "sft").changed
    another_row(other)
    with pytest.raises(ConfigError, match=r"safety\.prompts: .*other\.jsonl has other rows"):
        check_origin(stage_named("sft").inputs(config), Path(config.run) / "sft")


def test_texts_that_come_later_are_a_change(made: Config, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    config = replace(made, run=str(run))
    # Without them the held-out rows are what scores are normalised on.
    with (
        changed(run / "sft" / "candidates.jsonl", lambda path: path.unlink()),
        pytest.raises(ConfigError, match=r"reward\.normalise: .*rankings_heldout\.jsonl has other rows"),
    ):
        run_reward(config)


def test_sft_made_anew_ends_the_pipeline_at_the_reward_model(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As users do it: the stage's folder is removed, and the same command given with another learning rate."""
    whole, _ = finished
    run = Path(shutil.copytree(whole.run, tmp_path / "run"))
    shutil.rmtree(run / "sft")
    config = replace(whole, run=str(run), sft=replace(whole.sft, optim=replace(whole.sft.optim, lr=2e-3)))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    before = (run / "summary.json").read_bytes()
    line = f"reward was made from {run}/sft/hf with other weights (model.safetensors)"
    assert main(["pipeline", "--config", str(tmp_path / "run.yaml")]) == 2
    assert line in capsys.readouterr().err
    assert (run / "summary.json").read_bytes() == before

    summary = run_pipeline(replace(config, accept_changes=True))
    lines = summary["reward"]["changed_inputs"]
    assert line in lines
    assert lines == json.loads((run / "reward" / "summary.json").read_text())["changed_inputs"]
    assert "changed_inputs" not in summary["sft"]
    events = read_jsonl(run / "reward" / "events.jsonl")
    assert [event["event"] for event in events] == ["changed inputs"]
    assert line in events[0]["accepted"]
    page = run_report(ReportConfig(str(run)), TABLE).read_text(encoding="utf-8")
    assert "Accepted changes of inputs" in page
    assert line in page
    # What was accepted once is what it is made from now; the report still says so.
    assert run_pipeline(config)["reward"]["changed_inputs"] == lines


def test_what_is_accepted_on_the_way_stands_in_checkpoints_and_summary(tmp_path: Path) -> None:
    # A run of its own, since others read the rows of ``finished`` at the same time.
    config = small_config(tmp_path, "run", save_every=1)
    run_sft(config)
    folder = Path(config.run) / "sft"
    (folder / "summary.json").unlink()
    with changed(Path(config.sft.data.eval), another_row):
        with pytest.raises(ConfigError, match=r"sft\.data\.eval"):
            run_sft(config)
        assert len(run_sft(replace(config, accept_changes=True))["changed_inputs"]) == 1
        assert "changed inputs" in [event["event"] for event in read_jsonl(folder / "events.jsonl")]
        # Where the stage's folder lost what it was made from, its checkpoints know what they were.
        (folder / "origin.json").unlink()
        with pytest.raises(ConfigError, match=r"sft\.data\.eval"):
            run_sft(config)


def test_a_run_of_a_version_that_noted_nothing_goes_on_with_a_warning(
    made: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    config = replace(made, run=str(run))
    end(config, "reward")
    for stage in STAGES:
        (run / stage / "origin.json").unlink()
    with changed(Path(made.reward.data.eval), another_row), caplog.at_level(logging.WARNING, "jrlhf.origin"):
        run_reward(config)
        check_origin(stage_named("sft").inputs(config), run / "sft")
    assert ["did not record them" in line for line in said_of_origin(caplog)] == [True, True]
    # From now on it is known.
    assert not (run / "reward" / "origin.json").exists()
    assert (run / "sft" / "origin.json").exists()


def test_what_is_gone_is_not_missed_by_a_stage_that_is_done(
    made: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    shutil.rmtree(run / "sft")
    config = replace(made, run=str(run))
    summary = end(config, "reward")
    with changed(Path(made.reward.data.eval), lambda path: path.unlink()), caplog.at_level(logging.WARNING):
        assert run_reward(config) == summary
    assert "reward is finished, and an input cannot be compared: reward.model.path" in caplog.text


def test_a_damaged_record_is_named(made: Config, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    for text in (b"{", b'{"inputs": [{}], "changed": []}', b"[]", b"\xff"):
        (run / "sft" / "origin.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"origin\.json: damaged"):
            run_sft(replace(made, run=str(run)))


def test_a_pattern_that_fits_more_files_makes_other_rows(tmp_path: Path) -> None:
    base = shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "base")
    config = small_config(tmp_path, "run")
    parts = tmp_path / "parts"
    parts.mkdir()
    first = Path(shutil.copyfile(config.sft.data.eval, parts / "a.jsonl"))
    data = replace(config.sft.data, train=str(parts / "*.jsonl"), eval="", cache=str(tmp_path / "cache"))
    log, model = replace(config.sft.log, samples=0, tensorboard=False), ModelConfig(str(base))
    sft = replace(config.sft, model=model, data=data, log=log, candidate_prompts="", lora=LoRAConfig(rank=2))
    config = replace(config, sft=replace(sft, epochs=1.0))
    run_sft(config)
    first.rename(parts / "b.jsonl")
    run_sft(config)
    shutil.copyfile(parts / "b.jsonl", parts / "c.jsonl")
    for _ in range(2):  # from the cache, the second time
        with pytest.raises(ConfigError, match=r"sft\.data\.train: .*parts/\*\.jsonl has other rows"):
            run_sft(config)
    (parts / "c.jsonl").unlink()

    # A checkpoint's adapters are exported with the weights that they were trained on, and no others.
    with changed(tmp_path / "base", other_weights), pytest.raises(ConfigError, match="need the old weights"):
        run_export(ExportConfig(config.run, str(tmp_path / "out"), stage="sft", step=1))
    run_export(ExportConfig(config.run, str(tmp_path / "out"), stage="sft", step=1))


def test_the_schema_of_a_rule_is_an_input(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    rewards = RewardsConfig(function=FunctionRuleConfig(weight=1.0, path="no_such_module:reward"))
    config = Config()
    config = replace(config, ppo=replace(config.ppo, rewards=rewards))
    assert PPOInputs(config).files()["ppo.rewards.function.path"]() is None
    json_rule = replace(rewards.json, weight=1.0, schema=str(schema))
    config = replace(config, ppo=replace(config.ppo, rewards=RewardsConfig(json=json_rule)))
    [(key, path)] = PPOInputs(config).files().items()
    found = path()
    assert found is not None
    first = file_input(key, found, records=())
    schema.write_text('{"type": "array"}')
    assert file_input(key, found, records=(first,)).digest != first.digest
