"""What a run's folder holds, and what may change before it is gone on with."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import assets
from jrlhf.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    ModelConfig,
    PPOConfig,
    SFTConfig,
    stages_before,
)
from jrlhf.config.files import apply_flags
from jrlhf.config.tools import ExportConfig
from jrlhf.rollout.inputs import RolloutInputs
from jrlhf.runs.checkpoints import FORMAT_VERSION, CheckpointError
from jrlhf.runs.folder import last_export, model_source, open_stage, plain_floats, read_summary
from jrlhf.runs.manifest import write_manifest
from jrlhf.stages.sft import run_sft
from jrlhf.tools.export import run_export


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_goes_on_with_its_rows_in_another_cache_but_not_from_other_data(stage, tmp_path):
    config = replace(Config(), run=str(tmp_path))
    data = {"sft": ["sft.data"], "reward": ["reward.data"], "ppo": ["ppo.prompts", "ppo.ptx"]}[stage]
    with open_stage(config, stage) as folder:
        (folder / "checkpoints" / "1").mkdir(parents=True)
    for name in data:
        with open_stage(apply_flags(config, {f"{name}.cache": ["elsewhere"]}), stage):
            pass
        with (
            pytest.raises(ConfigError, match=rf"{name}\.train: '' -> {{'a': 2\.0}}"),
            open_stage(apply_flags(config, {f"{name}.train": ["{a: 2}"]}), stage),
        ):
            pass


CHANGES = {
    "seed": ("1", r"seed: 0 -> 1"),
    "sft.batch_size": ("7", r"sft\.batch_size: 32 -> 7"),
    "sft.model.path": ("other", r"sft\.model\.path: '' -> 'other'"),
    "sft.data.max_length": ("9", r"sft\.data\.max_length: 1024 -> 9"),
    "sft.optim.lr": ("1", r"sft\.optim\.lr: 1e-05 -> 1\.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_result_may_not_change_on_the_way(name: str, tmp_path: Path) -> None:
    config = Config(run=str(tmp_path))
    with open_stage(config, "sft") as folder:
        (folder / "checkpoints" / "1").mkdir(parents=True)
    value, difference = CHANGES[name]
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=difference), open_stage(apply_flags(config, {name: [value]}), "sft"):
        pass
    assert (folder / "config.yaml").read_text() == before


FREE = {
    "sft": ("sft.microbatch", "sft.max_skipped", "sft.data.buckets", "sft.model.remat", "sft.model.attention"),
    "reward": ("reward.microbatch", "reward.max_skipped", "reward.data.buckets", "reward.model.remat"),
    "ppo": (
        "ppo.microbatch", "ppo.max_skipped", "ppo.prompts.buckets", "ppo.ptx.buckets", "ppo.model.remat",
        "ppo.reward.remat", "ppo.reward.attention", "ppo.canary.judge.remat", "ppo.rewards.timeout",
        "ppo.rewards.required.match_timeout", "ppo.rewards.endpoint.retries",
    ),
}  # fmt: skip
VALUES = {"remat": "true", "attention": "cudnn"}


@pytest.mark.parametrize("stage", FREE)
def test_what_a_run_takes_at_a_time_and_how_it_computes_may_change_on_the_way(stage: str, tmp_path: Path) -> None:
    """As people do who ran out of memory, or of patience."""
    config = Config(run=str(tmp_path))
    with open_stage(config, stage) as folder:
        (folder / "checkpoints" / "1").mkdir(parents=True)
    flags = {name: [VALUES.get(name.rpartition(".")[2], "2")] for name in FREE[stage]}
    with open_stage(apply_flags(config, flags | {"accept_changes": ["true"]}), stage):
        pass
    for other in ("sampling.kv_cache", "rollout_parts") if stage == "ppo" else ("pack_length",):
        value = "int8" if other.endswith("kv_cache") else "3"
        changed = apply_flags(config, flags | {f"{stage}.{other}": [value]})
        with pytest.raises(ConfigError) as refused, open_stage(changed, stage):
            pass
        assert len(str(refused.value).splitlines()) == 3
        assert f"{stage}.{other}: " in str(refused.value)


def fewer_layers(model: Path) -> None:
    edit(model, lambda name, tensor: None if name.startswith("model.layers.4.") else tensor, num_hidden_layers=4)


def larger_vocabulary(model: Path) -> None:
    longer = lambda tensor: np.concatenate([tensor, tensor[:8]])  # noqa: E731
    edit(model, lambda name, tensor: longer(tensor) if name.endswith("embed_tokens.weight") else tensor, vocab_size=520)


def edit(model: Path, change: Callable[[str, np.ndarray], np.ndarray | None], **config: int) -> None:
    """A model folder with some tensors changed or left out, and the config that goes with them."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    old = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(old | config))


def test_another_model_under_the_same_name_is_refused_and_a_checkpoint_names_no_file_outside(tmp_path: Path) -> None:
    model = Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time"}\n' * 8)
    sft = SFTConfig(
        ModelConfig(str(model)),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=8, buckets=1, cache=""),
        batch_size=8,
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(samples=0, progress=False, tensorboard=False),
    )
    config = Config(run=str(tmp_path / "run"), sft=sft)
    run_sft(config)
    folder = tmp_path / "run" / "sft"
    (folder / "summary.json").unlink()
    whole = Path(shutil.copytree(model, tmp_path / "whole"))
    for change, named in ((fewer_layers, "layers/"), (larger_vocabulary, "embed is ")):
        shutil.rmtree(model)
        shutil.copytree(whole, model)
        change(model)
        with pytest.raises(ConfigError, match=r"model with other weights \(model\.safetensors\)"):
            run_sft(config)
        with pytest.raises(CheckpointError, match=rf"does not fit this run's state: .*{named}"):
            run_sft(replace(config, accept_changes=True))
    shutil.rmtree(model)
    shutil.copytree(whole, model)

    # What a checkpoint says of its tokenizer's files comes from whoever wrote it.
    notes = folder / "checkpoints" / "1" / "notes.json"
    said = json.loads(notes.read_text())
    said["metadata"]["tokenizer"] = {"../outside.json": "{}"}
    notes.write_text(json.dumps(said))
    write_manifest(notes.parent, form=FORMAT_VERSION)
    with pytest.raises(ValueError, match=r"'\.\./outside\.json' is not the name of a tokenizer's file"):
        run_export(ExportConfig(str(folder), str(tmp_path / "deep" / "out"), step=1))
    assert not (tmp_path / "deep" / "outside.json").exists()


def test_a_model_is_named_by_its_stage_or_by_the_run_it_came_from(tmp_path):
    for stage in ("sft", "reward"):
        (tmp_path / stage / "hf").mkdir(parents=True)
        (tmp_path / stage / "hf" / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "sft", tmp_path / "sft" / "hf"):
        assert model_source(Config(), str(path), key="ppo.model.path", before=("sft",)) == str(tmp_path / "sft" / "hf")
    assert model_source(Config(), str(tmp_path), key="k", before=("reward",)) == str(tmp_path / "reward" / "hf")


def test_a_run_or_a_stage_without_the_model_says_so(tmp_path: Path) -> None:
    for stage in ("sft", "dpo"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").write_text("", encoding="utf-8")
    run = re.escape(str(tmp_path))
    with pytest.raises(ConfigError, match=f"^{run}: this run has no exported model of reward; its stages: sft, dpo$"):
        last_export(str(tmp_path), "reward")
    with pytest.raises(ConfigError, match=f"^{run}: this run has more than one model; name a stage's folder; its"):
        model_source(Config(), str(tmp_path), key="k", before=())
    with pytest.raises(ConfigError, match=r"/dpo: this stage has not exported a model yet; start it again"):
        last_export(str(tmp_path / "dpo"), "language")


def exported(run: Path, *stages: str) -> Config:
    """A run whose stages have exported models."""
    for stage in stages:
        (run / stage / "hf").mkdir(parents=True)
        (run / stage / "hf" / "config.json").write_text("{}")
    return Config(run=str(run))


def test_an_empty_path_is_the_export_of_the_nearest_stage_before(tmp_path: Path) -> None:
    config = exported(tmp_path, "sft", "ppo", "reward")
    after_ppo = replace(config, stages=("ppo", "sft"), sft=SFTConfig(data=DataConfig(train="rows.jsonl")))

    def source(config: Config, stage: str, kind: Literal["language", "reward"]) -> str:
        before = stages_before(config, stage, kind)
        return Path(model_source(config, "", key="k", before=before)).parent.name

    assert source(config, "ppo", "language") == "sft"
    assert source(config, "ppo", "reward") == "reward"
    assert source(after_ppo, "sft", "language") == "ppo"
    with pytest.raises(ConfigError, match=r"^k: is empty; name"):
        source(config, "sft", "language")
    with pytest.raises(ConfigError, match=r"^k: is empty, and .*sft/hf does not exist; run the sft stage first"):
        source(Config(run=str(tmp_path / "new")), "ppo", "language")


def test_a_first_stage_without_a_model_names_the_order_and_no_stage_that_is_not_in_it(tmp_path: Path) -> None:
    config = Config(run=str(tmp_path), stages=("grpo", "sft"), sft=SFTConfig(data=DataConfig(train="rows.jsonl")))
    expected = (
        r"^grpo\.model\.path: is empty, and no stage before it in stages \(grpo, sft\) has such a model; "
        r"name a model or another order$"
    )
    with pytest.raises(ConfigError, match=expected):
        _ = RolloutInputs(config, config.grpo, "grpo").source


def test_a_missing_reward_model_is_not_needed_where_rules_score(tmp_path: Path) -> None:
    config = Config(run=str(tmp_path))
    sources = RolloutInputs(config, config.grpo, "grpo").models()
    alone = r"or name a model, or set grpo\.rewards\.model_weight to 0 to score by rules alone$"
    with pytest.raises(ConfigError, match=alone):
        sources["grpo.reward"]()


def test_tools_read_the_last_export_in_the_order_of_the_run(tmp_path: Path) -> None:
    config = exported(tmp_path, "sft", "ppo", "reward")
    assert Path(last_export(str(tmp_path), "language")).parent.name == "ppo"
    assert Path(last_export(str(tmp_path), "reward", "language")).parent.name == "reward"
    assert last_export("gpt2", "language") == "gpt2"
    data = DataConfig(train="rows.jsonl")
    config = replace(config, stages=("ppo", "sft"), sft=SFTConfig(data=data), ppo=PPOConfig(prompts=data))
    with open_stage(config, "sft"):
        assert Path(last_export(str(tmp_path), "language")).parent.name == "sft"


@pytest.mark.parametrize("content", [b'{"steps": 3', b"\xff", b"[]"])
def test_a_damaged_summary_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"summary\.json: damaged"):
        read_summary(tmp_path)


def test_a_summary_has_a_float32_as_its_shortest_decimal_and_every_digit_of_a_float() -> None:
    plain = {"third": 1 / 3, "rounded": float(np.float32(0.04)), "steps": 7, "ended": True, "skipped": {}}
    single = {name: np.float32(value) for name, value in (("kl_coef", 0.04), ("tiny", 1e-30), ("loss", 2 / 3))}
    found = plain_floats(plain | {"before": single})
    assert found == plain | {"before": {"kl_coef": 0.04, "tiny": 1e-30, "loss": 0.6666667}}
    assert {name: np.float32(value) for name, value in found["before"].items()} == single
    assert type(found["before"]["kl_coef"]) is float
    assert np.isnan(plain_floats(np.float32("nan")))
