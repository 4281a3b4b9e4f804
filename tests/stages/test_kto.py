"""The DPO stage with the loss kto, on labelled answers: it learns, packed or not, and it is planned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import Config, LoRAConfig, OptimConfig, PlanConfig
from jrlhf.data import DataError, load_tokenizer, load_unpaired
from jrlhf.models import load_pretrained
from jrlhf.plan.run import planned_target
from jrlhf.stages.dpo import plan_dpo, run_dpo
from jrlhf.stages.dpo_reference import REFERENCE_FILE
from jrlhf.steps import answer_logprobs
from tests.support.dpo import MODEL, NAMES, compare_interrupted, config_of, lines_of

ENDS = (" and happy.", " and sad.", " and blue.")


def write_answers(path: Path, names: tuple[str, ...]) -> str:
    """One answer to each prompt, a happy one to every second; and of the last prompt a pair."""
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        prompt = f"Once upon a time there was a {name}. It was big"
        rows.append({"prompt": prompt, "completion": ENDS[i % 4 % 3], "label": i % 4 % 3 == 0})
    rows[-1] = {"prompt": rows[-1]["prompt"], "chosen": ENDS[0], "rejected": ENDS[1]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def kto_config(folder: Path, run: str, **changes: Any) -> Config:
    config = config_of(folder, run, loss="kto", optim=OptimConfig(lr=2e-3, warmup=0.0))
    data = replace(
        config.dpo.data,
        train=write_answers(folder / "answers.jsonl", NAMES[:15]),
        eval=write_answers(folder / "heldout-answers.jsonl", ("horse", "rat", "duck", "wolf", "boat")),
        max_length=44,
    )
    return replace(config, dpo=replace(config.dpo, data=data, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A finished run of 16 answers, two steps an epoch; tests read it."""
    config = kto_config(tmp_path_factory.mktemp("kto"), "whole")
    return config, run_dpo(config)


def test_answers_that_no_step_draws_are_not_read(tmp_path: Path) -> None:
    """Nor are their mismatched pairs. In the only step every log-ratio is 0: what it draws has been read."""
    config = kto_config(tmp_path, "run", epochs=0.1)
    run_dpo(config)
    [line] = lines_of(config, "loss")
    assert line["loss"] == pytest.approx(0.5, abs=1e-4)
    with np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as file:
        read, mismatched = file["train"] != 0.0, file["train_mismatched"] != 0.0
    assert read.sum() == 8 < len(read)
    np.testing.assert_array_equal(read, mismatched)


def test_it_learns_what_people_find_desirable(whole: tuple[Config, dict[str, Any]]) -> None:
    config, summary = whole
    lines, evaluations = lines_of(config, "loss"), lines_of(config, "eval/loss")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # The first step is from the reference itself: all rewards and z₀ are 0 up to rounding.
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert lines[0]["reference_point"] < 1e-3
    first, last = evaluations[0], evaluations[-1]
    assert first["eval/loss"] == 0.5, "the same program has read the same rows with the same weights"
    assert first["eval/reference_point"] == first["eval/rewards/chosen"] == first["eval/rewards/rejected"] == 0.0
    assert last["eval/accuracy"] == 1.0
    assert last["eval/margin"] > 0.01
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/reference_point"] >= 0.0
    assert (last["eval/answers/desirable"], last["eval/answers/undesirable"]) == (3.0, 3.0)
    assert all(line.keys() >= {"accuracy", "margin", "rewards/chosen", "rewards/rejected", "logprobs/chosen",
                               "answers/desirable", "answers/undesirable", "answers_per_second", "grad_norm",
                               "perf/model_flops_per_second"} for line in lines)  # fmt: skip
    assert all(line["answers/desirable"] + line["answers/undesirable"] == 8 for line in lines)
    assert summary["accuracy"] == 1.0
    assert (summary["steps"], summary["rows"], summary["skipped"]) == (4, 16, {})


def test_an_interrupted_run_ends_as_the_unbroken_one(whole: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    compare_interrupted(whole[0], tmp_path / "run", has_reference=True)


def test_the_reference_has_read_every_answer_and_every_mismatched_pair(whole: tuple[Config, dict[str, Any]]) -> None:
    config, _ = whole
    path = assets.resolve(MODEL.path)
    model = load_pretrained(path, dtype="float32")
    rows = load_unpaired(config.dpo.data, config.dpo.data.train, load_tokenizer(path))
    with np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as file:
        assert {*file} == {"key", "train", "train_mismatched", "eval", "eval_mismatched"}
        for name, part in (("train", rows.answers), ("train_mismatched", rows.mismatched)):
            batch = part.batch(range(16))._replace(loss_mask=part.batch_loss_mask(range(16)))
            expected = answer_logprobs(model.logprob_fn, model.params, jax.tree.map(jnp.asarray, batch)).total[:, 0]
            np.testing.assert_allclose(file[name], expected, atol=1e-3)


def test_packed_answers_with_adapters_are_the_same_first_step(
    whole: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    """All sixteen answers are in the first batch, two to a row: its figures are those of the reference's log-probs."""
    changes: dict[str, Any] = {"lora": LoRAConfig(rank=4, alpha=8.0), "epochs": 1.0, "pack_length": 44}
    config = kto_config(tmp_path, "packed", **changes)
    run_dpo(replace(config, dpo=replace(config.dpo, data=replace(config.dpo.data, eval=""))))
    [line] = lines_of(config, "loss")
    with (
        np.load(Path(whole[0].run) / "dpo" / REFERENCE_FILE) as one,
        np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as packed,
    ):
        for name in ("train", "train_mismatched"):
            np.testing.assert_allclose(packed[name], one[name], atol=1e-4)
        desirable = np.asarray([*(i % 4 % 3 == 0 for i in range(14)), True, False])
        logprobs = one["train"][desirable], one["train"][~desirable]
    assert line["loss"] == pytest.approx(0.5, abs=1e-4)
    assert (line["answers/desirable"], line["answers/undesirable"]) == (desirable.sum(), 16 - desirable.sum())
    assert line["logprobs/chosen"] == pytest.approx(logprobs[0].mean(), rel=1e-4)
    assert line["logprobs/rejected"] == pytest.approx(logprobs[1].mean(), rel=1e-4)


def test_labels_of_one_kind_alone_name_the_file(tmp_path: Path) -> None:
    config = kto_config(tmp_path, "run")
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": "A", "label": True}) + "\n" for p in "QR"))
    for name in ("train", "eval"):
        alike = replace(config, dpo=replace(config.dpo, data=replace(config.dpo.data, **{name: str(path)})))
        with pytest.raises(DataError, match=r"alike.jsonl: label: all 2 answers are labelled true"):
            run_dpo(alike)


def test_it_is_planned(tmp_path: Path) -> None:
    """One answer a row, whatever ``completions`` says; the mismatched pairs cost a third of the answers' work."""

    def update_of(**changes: Any) -> tuple[list[str], float]:
        plan = PlanConfig(
            topology="cpu:8", compile="simulated", dpo=replace(kto_config(tmp_path, "run").dpo, **changes)
        )
        stage = plan_dpo(plan, planned_target(plan)).build(1)
        [update] = [program for program in stage.programs if program.name == "update"]
        return [program.name for program in stage.programs], update.flops / stage.batch

    names, flops = update_of()
    assert names == ["reference", "start", "update", "evaluation", "answers"]
    _, of_pairs = update_of(loss="sigmoid")
    assert flops == pytest.approx(of_pairs / 2 * 4 / 3, rel=1e-6)
    assert update_of(pack_length=256)[0] == names
