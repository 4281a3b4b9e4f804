"""What leaves a run: one writer, whatever calls it, and files that others take as they are taken here."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jrlhf.config import Config, SamplingConfig
from jrlhf.config.tools import ExportConfig, GenerateConfig, ScoreConfig
from jrlhf.data import load_sft, load_tokenizer, stop_token_ids
from jrlhf.models import (
    add_adapters,
    load_pretrained,
    reward_from_pretrained,
    save_adapter,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.generation import generation_eos
from jrlhf.runs.checkpoints import FORMAT_VERSION, Checkpoints
from jrlhf.runs.manifest import write_manifest
from jrlhf.tools.export import run_export
from jrlhf.tools.inference import run_generate, run_score
from tests.support.chat_model import EOS, IM_END, TOKENIZER_NAMES, copy_run, write_chat_model
from tests.support.runs import read_jsonl

STAGES: tuple[Literal["sft", "reward", "ppo"], ...] = ("sft", "reward", "ppo")


def listing(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def dtypes(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def step_of(config: Config, stage: Literal["sft", "reward", "ppo"], out: Path, **options: Any) -> Path:
    """The newest checkpoint of a stage, exported."""
    folder = Path(config.run) / stage / "checkpoints"
    with Checkpoints(folder, keep=1, keep_best=0, best_metric=None, best_mode="min") as saved:
        newest = saved.latest_step()
    assert newest is not None
    run_export(ExportConfig(run=config.run, out=str(out), stage=stage, step=newest, **options))
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_exported_as_the_stage_exports(chat_run: Config, stage: Any, tmp_path: Path) -> None:
    """The same files with the same bytes; a reward model's are normalised after training alone, in its head."""
    theirs, ours = Path(chat_run.run) / stage / "hf", step_of(chat_run, stage, tmp_path / "step")
    assert listing(theirs).keys() == listing(ours).keys()
    assert listing(ours).keys() >= TOKENIZER_NAMES | {"config.json", "model.safetensors", "jrlhf.yaml"}
    for name, path in listing(ours).items():
        if stage == "reward" and name == "config.json":
            config, other = (json.loads(p.read_text()) for p in (path, theirs / name))
            assert other.pop("jrlhf") != config.pop("jrlhf", None)
            assert config == other
        elif stage == "reward" and name == "model.safetensors":
            tensors, other = load_file(path), load_file(theirs / name)
            heads = [t.pop("score.weight").ravel() for t in (tensors, other)]
            jax.tree.map(np.testing.assert_array_equal, tensors, other)
            np.testing.assert_allclose(heads[1] / heads[0], (heads[1] / heads[0]).mean(), rtol=1e-4)
        else:
            assert path.read_bytes() == (theirs / name).read_bytes(), name
        assert path.stat().st_mode == (theirs / name).stat().st_mode
    run_export(ExportConfig(run=chat_run.run, out=str(tmp_path / "finished"), stage=stage))
    for name, path in listing(tmp_path / "finished").items():
        assert path.read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("folder", ["sft/hf", "reward/hf", "ppo/hf", "ppo/peft"])
def test_the_source_s_tokenizer_goes_out_as_it_came(chat_run: Config, chat_base: Path, folder: str) -> None:
    """But for the pad token, which was the EOS, and which config.json and generation_config.json then name too."""
    out = Path(chat_run.run) / folder
    for name in TOKENIZER_NAMES:
        source, export = ((place / name).read_bytes() for place in (chat_base, out))
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert json.loads(export) == json.loads(source) | {"pad_token": "<unk>"}
        else:
            assert export == source, name
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.pad_token_id == 0
    files = [name for name in ("config.json", "generation_config.json") if (out / name).exists()]
    assert all(json.loads((out / name).read_text())["pad_token_id"] == 0 for name in files)
    assert len(files) == {"reward/hf": 1, "ppo/peft": 1}.get(folder, 2)


@pytest.mark.parametrize("folder", ["sft/hf", "ppo/hf", "ppo/peft"])
def test_what_ends_an_answer_here_ends_it_there(chat_run: Config, folder: str) -> None:
    out = Path(chat_run.run) / folder
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [EOS, IM_END]
    assert generation["temperature"] == 0.6
    assert generation_eos(out) == stop_token_ids(load_tokenizer(str(out)), ())


def test_an_export_keeps_float32_and_says_so(chat_run: Config, chat_base: Path, tmp_path: Path) -> None:
    assert set(dtypes(chat_base).values()) == {"BF16"}
    for stage in STAGES:
        hf = Path(chat_run.run) / stage / "hf"
        assert set(dtypes(hf).values()) == {"F32"}
        config = json.loads((hf / "config.json").read_text())
        assert config["torch_dtype"] == "float32"
        assert "dtype" not in config
        assert json.loads((hf.parent / "summary.json").read_text())["export_dtype"] == "float32"
    hf = Path(chat_run.run) / "sft" / "hf"
    weights = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    assert (weights != weights.astype(jnp.bfloat16).astype(np.float32)).any()


def test_another_dtype_can_be_asked_of_export(chat_run: Config, tmp_path: Path) -> None:
    for stage in STAGES:
        step = step_of(chat_run, stage, tmp_path / stage / "step", dtype="source")
        whole = tmp_path / stage / "finished"
        run_export(ExportConfig(run=chat_run.run, out=str(whole), stage=stage, dtype="source"))
        full = load_file(Path(chat_run.run) / stage / "hf" / "model.safetensors")
        # PPO and the reward stage read the SFT stage's folder, which is in float32.
        kind = "BF16" if stage == "sft" else "F32"
        for out in (step, whole):
            assert {d for name, d in dtypes(out).items() if name != "score.weight"} == {kind}
            assert listing(out).keys() == listing(Path(chat_run.run) / stage / "hf").keys()
        if stage == "sft":
            assert (step / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
            assert json.loads((step / "config.json").read_text())["torch_dtype"] == "bfloat16"
            for name, value in load_file(step / "model.safetensors").items():
                np.testing.assert_array_equal(value, full[name].astype(jnp.bfloat16))
        else:
            for name, value in load_file(whole / "model.safetensors").items():
                np.testing.assert_array_equal(value, full[name])


def test_figures_are_of_the_weights_that_are_exported(rounded_run: Config, tmp_path: Path) -> None:
    """In the source's bfloat16 the run's own figures come out of the folder that it wrote."""
    run = Path(rounded_run.run)
    for stage in STAGES:
        assert {d for name, d in dtypes(run / stage / "hf").items() if name != "score.weight"} == {"BF16"}
        assert json.loads((run / stage / "summary.json").read_text())["export_dtype"] == "source"
    data, sft = rounded_run.sft.data, load_pretrained(run / "sft" / "hf", dtype="float32")
    rows = load_sft(data, data.eval, load_tokenizer(str(run / "sft" / "hf")), train_on="completion")
    batch = rows.batch(np.arange(len(rows)))
    logprobs, _ = sft.logprob_fn(sft.params, jnp.asarray(batch.tokens), jnp.asarray(batch.mask), temperature=1.0)
    nll = -np.asarray(logprobs)[np.asarray(batch.loss_mask)].mean()
    summary = json.loads((run / "sft" / "summary.json").read_text())
    assert summary["heldout_nll"] == pytest.approx(nll, rel=1e-5)
    # Scores of the reward model as exported have mean 0 and std 1 on what it was normalised on.
    texts = json.loads((run / "reward" / "summary.json").read_text())["normalised_on"]
    run_score(ScoreConfig(str(run / "reward" / "hf"), texts, out=str(tmp_path / "scores.jsonl"), max_length=32))
    scores = np.asarray([row["score"] for row in read_jsonl(tmp_path / "scores.jsonl")])
    np.testing.assert_allclose((scores.mean(), scores.std()), (0.0, 1.0), atol=1e-4)
    # PPO's last answers, written down by the run, are scored as its figures say.
    last = max((run / "ppo" / "evals").glob("*.jsonl"))
    mean = np.mean([row["score"] for row in read_jsonl(last)])
    assert json.loads((run / "ppo" / "summary.json").read_text())["after"]["eval/score_mean"] == pytest.approx(mean)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_what_the_umask_gives(chat_run: Config, chat_base: Path, mask: int, tmp_path: Path) -> None:
    model = load_pretrained(chat_base, dtype="float32")
    adapted = add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=2.0, targets="q_proj")
    with umask(mask):
        save_pretrained(model, tmp_path / "lm")
        save_pretrained(model, tmp_path / "lm32", dtype="float32")
        save_reward_model(reward_from_pretrained(model, jax.random.key(0)), tmp_path / "rm")
        save_adapter(adapted, model.arch, tmp_path / "peft", base=str(chat_base), alpha=2.0)
        run_export(ExportConfig(run=chat_run.run, out=str(tmp_path / "finished"), stage="ppo"))
        step_of(chat_run, "reward", tmp_path / "step")
    modes = {name: path.stat().st_mode & 0o777 for name, path in listing(tmp_path).items()}
    assert len(modes) > 30
    assert {name: mode for name, mode in modes.items() if mode != 0o666 & ~mask} == {}


def test_a_stage_s_files_have_the_usual_modes(chat_run: Config, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    for folder in ("sft/hf", "reward/hf", "ppo/hf", "ppo/peft"):
        modes = {name: path.stat().st_mode for name, path in listing(Path(chat_run.run) / folder).items()}
        assert modes == dict.fromkeys(modes, mode), folder


def test_the_library_s_folders_are_the_source_s(chat_base: Path, tmp_path: Path) -> None:
    """Byte for byte, folders of templates too; with another dtype all but the weights and the word on them."""
    model = load_pretrained(chat_base, dtype="float32")
    save_pretrained(model, tmp_path / "same")
    assert listing(tmp_path / "same").keys() == listing(chat_base).keys()
    for name, path in listing(tmp_path / "same").items():
        assert path.read_bytes() == (chat_base / name).read_bytes(), name
    save_pretrained(model, tmp_path / "wide", dtype="float32")
    assert set(dtypes(tmp_path / "wide").values()) == {"F32"}
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config == json.loads((chat_base / "config.json").read_text()) | {"torch_dtype": "float32"}
    reward = reward_from_pretrained(model, jax.random.key(0))
    save_reward_model(reward, tmp_path / "reward", dtype="float32")
    assert set(dtypes(tmp_path / "reward").values()) == {"F32"}


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, {"dtype": "float32"}), ({"dtype": "float16"}, {"dtype": "float32"})]
)
def test_the_config_s_own_key_names_the_dtype(chat_base: Path, keys: Any, expected: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(chat_base, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config | keys))
    save_pretrained(load_pretrained(source, dtype="float32"), tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | expected


def test_a_run_may_move_with_its_adapters(chat_run: Config, tmp_path: Path) -> None:
    base = json.loads((Path(chat_run.run) / "ppo" / "peft" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == "../../sft/hf"
    moved = copy_run(Path(chat_run.run), tmp_path / "elsewhere" / "moved")
    peft, merged = (load_pretrained(moved / "ppo" / name, dtype="float32") for name in ("peft", "hf"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), peft.params, merged.params)


def test_a_checkpoint_of_an_earlier_version_is_exported(chat_run: Config, tmp_path: Path) -> None:
    """Its notes have the tokenizer as transformers wrote it, and neither tokens nor binary files."""
    run = Path(shutil.copytree(chat_run.run, tmp_path / "run"))
    notes = max((run / "sft" / "checkpoints").glob("*/notes.json"), key=lambda path: int(path.parent.name))
    load_tokenizer(str(run / "sft" / "hf")).save_pretrained(tmp_path / "saved")
    saved = json.loads(notes.read_text())
    files = {path.name: path.read_text() for path in (tmp_path / "saved").iterdir() if path.is_file()}
    for key in ("tokenizer_base64", "pad_token", "stop_tokens"):
        del saved["metadata"][key]
    saved["metadata"]["tokenizer"] = files
    notes.write_text(json.dumps(saved))
    write_manifest(notes.parent, form=FORMAT_VERSION)
    out = tmp_path / "out"
    run_export(ExportConfig(run=str(run), out=str(out), stage="sft", step=int(notes.parent.name)))
    assert (out / "model.safetensors").read_bytes() == (run / "sft" / "hf" / "model.safetensors").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [EOS, IM_END]
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0
    assert load_tokenizer(str(out)).pad_token == "<unk>"


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, (2, 513)), (2, (2, 513)), ([2, 300], (2, 513, 300)), ([513, 2], (2, 513))]
)
def test_every_end_token_of_a_source_ends_answers(eos: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "base", eos=eos)
    assert stop_token_ids(load_tokenizer(str(folder)), ()) == expected


def greedy(folder: Path, prompts: Path, tmp_path: Path) -> list[str]:
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.0)
    run_generate(GenerateConfig(str(folder), str(prompts), out=str(tmp_path / "answers.jsonl"), sampling=sampling))
    return [row["completions"][0] for row in read_jsonl(tmp_path / "answers.jsonl")]


def test_a_sampler_ends_at_each_of_them(chat_run: Config, tmp_path: Path) -> None:
    """A word of the model's own answer as one of several EOS: the answer ends there."""
    folder = Path(shutil.copytree(Path(chat_run.run) / "sft" / "hf", tmp_path / "model"))
    prompts = Path(chat_run.ppo.prompts.train)
    [answer, *_] = greedy(folder, prompts, tmp_path)
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [EOS, ids[3]]}))
    [short, *_] = greedy(folder, prompts, tmp_path)
    assert answer.startswith(short)
    assert len(short) < len(answer)
