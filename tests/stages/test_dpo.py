"""The DPO stage on a tiny model: it learns, it comes back, and how rows are laid out changes nothing."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import (
    Config,
    ConfigError,
    DataConfig,
    DPOConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    SamplingConfig,
    check,
    to_yaml,
)
from jrlhf.config.dpo_check import dpo_advice
from jrlhf.config.gates import GatesFailed
from jrlhf.config.rewards import RequiredRuleConfig, RewardsConfig
from jrlhf.config.tools import ExportConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.data import load_rankings, load_tokenizer
from jrlhf.models import load_pretrained
from jrlhf.plan.run import planned_target
from jrlhf.runs.folder import exported_folder
from jrlhf.stages.dpo import check_dpo, plan_dpo, run_dpo
from jrlhf.stages.dpo_reference import REFERENCE_FILE
from jrlhf.steps import answer_logprobs
from jrlhf.tools.export import run_export
from jrlhf.train.attempt import Event
from jrlhf.train.programs import device_bytes
from jrlhf.train.signals import Interrupted
from jrlhf.train.start import mesh_of
from tests.support.dpo import MODEL, NAMES, compare_interrupted, config_of, lines_of, write_rankings
from tests.support.processes import JRLHF, by_variables, running
from tests.support.runs import compare_runs, deterministic, first_rows, read_jsonl
from tests.support.short_model import LAYERS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A finished run; tests read it."""
    config = config_of(tmp_path_factory.mktemp("dpo"), "whole")
    return config, run_dpo(config)


@pytest.fixture(scope="module")
def simpo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A finished run with the loss simpo; tests read it."""
    config = config_of(tmp_path_factory.mktemp("simpo"), "whole", loss="simpo", beta=2.0, gamma=1.0)
    return config, run_dpo(config)


def test_it_learns_what_people_like(whole: tuple[Config, dict[str, Any]]) -> None:
    config, summary = whole
    lines, evaluations = lines_of(config, "loss"), lines_of(config, "eval/loss")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    # The first step is from the reference itself: every implicit reward is 0 up to rounding.
    assert abs(lines[0]["margin"]) < 1e-4
    first, last = evaluations[0], evaluations[-1]
    assert first["eval/margin"] == 0.0, "the same program has read the same rows with the same weights"
    assert last["eval/accuracy"] == 1.0
    assert last["eval/margin"] > 0.01
    assert last["eval/loss"] < first["eval/loss"]
    # Of two answers and of three with a tie: the pairs of the three held-out rankings.
    assert last["eval/pairs"] == 2 + 1 + 1
    chosen, rejected = ([line[f"eval/logprobs/{kind}"] for line in evaluations] for kind in ("chosen", "rejected"))
    assert chosen[-1] - rejected[-1] > chosen[0] - rejected[0]
    assert all(line.keys() >= {"accuracy", "logprobs/chosen", "logprobs/rejected", "grad_norm", "pairs_per_second",
                               "tokens_per_second", "perf/model_flops_per_second"} for line in lines)  # fmt: skip
    assert summary["accuracy"] == 1.0
    assert (summary["steps"], summary["rows"], summary["skipped"]) == (4, len(NAMES), {})


def test_it_leaves_what_every_stage_leaves(whole: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    config, summary = whole
    folder = Path(config.run) / "dpo"
    for name in ("config.yaml", "origin.json", "metrics.jsonl", "summary.json", "hf/model.safetensors", REFERENCE_FILE):
        assert (folder / name).exists(), name
    samples = read_jsonl(folder / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 2, 2, 4, 4]
    assert samples[0]["prompt"].endswith("a horse. It was big")
    assert load_pretrained(folder / "hf", dtype="float32").arch.num_layers == LAYERS
    assert exported_folder(config.run, stages=("ppo", "dpo", "sft")) == str(folder / "hf")
    run_export(ExportConfig(run=config.run, out=str(tmp_path / "out"), stage="dpo", step=4))
    weights = [place / "model.safetensors" for place in (tmp_path / "out", folder / "hf")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # What is done is skipped.
    assert run_dpo(config) == summary


def test_the_reference_is_the_initial_policy_on_every_answer(whole: tuple[Config, dict[str, Any]]) -> None:
    config, _ = whole
    tokenizer = load_tokenizer(exported_folder(str(Path(config.run) / "dpo")))
    model = load_pretrained(assets.resolve(MODEL.path), dtype="float32")
    rows = load_rankings(config.dpo.data, config.dpo.data.train, tokenizer)
    with np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as file:
        found = file["train"]
    everything = range(len(rows))
    batch = rows.batch(everything)._replace(loss_mask=rows.batch_loss_mask(everything))
    expected = answer_logprobs(model.logprob_fn, model.params, jax.tree.map(jnp.asarray, batch)).total
    places = rows.places(everything)
    assert len(found) == len(rows.tokens) == (places >= 0).sum()
    np.testing.assert_allclose(found[places[places >= 0]], np.asarray(expected)[places >= 0], atol=1e-3)
    assert (found < -1.0).all()


@pytest.mark.parametrize("pack_length", [0, 80])
def test_rows_that_no_step_draws_are_not_read(pack_length: int, tmp_path: Path) -> None:
    """In the only step every log-ratio is 0: it has the reference's log-probs of all its rows."""
    config = config_of(tmp_path, "run", epochs=0.1, pack_length=pack_length)
    run_dpo(replace(config, dpo=replace(config.dpo, data=replace(config.dpo.data, eval=""))))
    [line] = lines_of(config, "loss")
    assert abs(line["margin"]) < 1e-4
    with np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as file:
        read = file["train"] != 0.0
    assert 0 < read.sum() < len(read)


@pytest.mark.parametrize("run", ["whole", "simpo"])
def test_an_interrupted_run_ends_as_the_unbroken_one(run: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    unbroken, _ = request.getfixturevalue(run)
    compare_interrupted(unbroken, tmp_path / "run", has_reference=run == "whole")


def test_a_reference_that_is_lost_damaged_or_another_s_is_read_again(
    whole: tuple[Config, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a stop at the first step; then the file is gone, cut, or of other rows. The run ends the same."""
    unbroken = whole[0]
    expected = (Path(unbroken.run) / "dpo" / REFERENCE_FILE).read_bytes()

    def stop(event: Event) -> None:
        if event.kind == "step":
            signal.raise_signal(signal.SIGINT)

    other = config_of(tmp_path / "other", "run", epochs=0.5)
    other = replace(other, dpo=replace(other.dpo, data=replace(other.dpo.data, eval="")))
    run_dpo(other)
    foreign = (Path(other.run) / "dpo" / REFERENCE_FILE).read_bytes()
    for content in (b"", expected[:-100], foreign):
        config = replace(unbroken, run=str(tmp_path / f"run-{len(content)}"))
        reference = Path(config.run) / "dpo" / REFERENCE_FILE
        with pytest.raises(Interrupted):
            run_dpo(config, on_event=stop)
        reference.write_bytes(content)
        if not content:
            reference.unlink()
        caplog.clear()
        run_dpo(config)
        assert ("damaged" in caplog.text) == (content == expected[:-100])
        compare_runs(Path(unbroken.run) / "dpo", Path(config.run) / "dpo")
        with np.load(reference) as again, np.load(Path(unbroken.run) / "dpo" / REFERENCE_FILE) as first:
            assert {name: again[name].tolist() for name in again} == {name: first[name].tolist() for name in first}


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 4)])
def test_one_device_and_several_processes_give_the_same_run(
    processes: int, devices: int, whole: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    """As eight devices of one process."""
    config = replace(whole[0], run=str(tmp_path / "run"))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [*JRLHF, "dpo", "--config", str(path)]
    with running(
        command, processes=processes, devices=devices, engine=by_variables, folder=tmp_path / "logs"
    ) as started:
        started.succeed(within=400)
    pairs = zip(*(lines_of(c, "loss") for c in (whole[0], config)), strict=True)
    for line, other in pairs:
        for name, value in deterministic(line).items():
            # Which of two equal rewards is larger is rounding, as long as the policy is still the reference.
            if line["step"] > 1 or name not in ("accuracy", "margin"):
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (line["step"], name)


def test_packed_rankings_are_the_same_step(whole: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    """All sixteen rankings are in the first batch of either run; one held-out ranking is read, with three answers."""
    log = replace(config_of(tmp_path, "plain").dpo.log, eval_rows=1)
    plain = config_of(tmp_path, "plain", batch_size=16, epochs=1.0, log=log)
    packed = config_of(tmp_path, "packed", batch_size=8, epochs=1.0, pack_length=256, log=log)
    for config in (plain, packed):
        run_dpo(config)
    first, other = (lines_of(config, "loss")[0] for config in (plain, packed))
    for name in ("loss", "logprobs/chosen", "logprobs/rejected", "grad_norm"):
        assert other[name] == pytest.approx(first[name], rel=1e-4), name
    references = []
    for config in (plain, packed):
        with np.load(Path(config.run) / "dpo" / REFERENCE_FILE) as file:
            references.append(file["train"])
            assert np.flatnonzero(file["eval"]).tolist() == [0, 1, 2]
    np.testing.assert_allclose(*references, atol=1e-4)
    narrow = config_of(tmp_path, "narrow", data=replace(plain.dpo.data, max_length=32), pack_length=32)
    with pytest.raises(ConfigError, match=r"dpo\.pack_length: all completions of a prompt stand in one row: a seq"):
        run_dpo(narrow)


def test_simpo_keeps_no_reference(simpo: tuple[Config, dict[str, Any]]) -> None:
    config, summary = simpo
    assert not (Path(config.run) / "dpo" / REFERENCE_FILE).exists()
    assert summary["accuracy"] == 1.0
    losses = [line["eval/loss"] for line in lines_of(config, "eval/loss")]
    assert losses[-1] < losses[0]


def test_simpo_with_the_beta_of_dpo_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, "run", loss="simpo")
    check_dpo(config, mesh_of(config))
    [message] = caplog.messages
    assert message == dpo_advice("dpo", config.dpo) != ""


def test_ipo_runs_on_mean_log_probs(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", loss="ipo")
    run_dpo(config)
    first, *_, last = lines_of(config, "eval/loss")
    # (0 - 1/(2β))² for two rankings, and for the third one with its margin of 0.5, which counts as 0.5/β.
    assert first["eval/loss"] == pytest.approx((5.0**2 + 5.0**2 + 10.0**2) / 3, rel=1e-3)
    assert last["eval/loss"] < first["eval/loss"]
    # A few nats a token, not a whole answer's.
    assert -10.0 < last["eval/logprobs/chosen"] < 0.0


def test_with_adapters_the_reference_is_the_base(whole: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8.0)
    config = config_of(tmp_path, "run", lora=lora, optim=OptimConfig(lr=1e-2, warmup=0.0))
    frozen: list[Any] = []
    summary = run_dpo(config, on_event=lambda event: frozen.append(event.state.train.frozen))
    folder = Path(config.run) / "dpo"
    with np.load(folder / REFERENCE_FILE) as file, np.load(Path(whole[0].run) / "dpo" / REFERENCE_FILE) as other:
        np.testing.assert_allclose(file["train"], other["train"], atol=1e-4)
    assert lines_of(config, "eval/loss")[0]["eval/margin"] == pytest.approx(0.0, abs=1e-5)
    assert summary["accuracy"] == 1.0
    assert (folder / "peft" / "adapter_model.safetensors").exists()
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (frozen[0], frozen[-1])), strict=True))


def test_a_model_that_misses_a_gate_is_not_passed_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", gates=("margin >= 1000",), epochs=0.5)
    with pytest.raises(GatesFailed, match="margin >= 1000"):
        run_dpo(config)
    assert not (Path(config.run) / "dpo" / "hf").exists()


def test_refusals_are_counted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", epochs=0.5)
    config = replace(config, safety=SafetyConfig(prompts=first_rows("prompts_heldout", 4, tmp_path)))
    prompts = [row | {"refusal": i % 2 == 0} for i, row in enumerate(read_jsonl(Path(config.safety.prompts)))]
    Path(config.safety.prompts).write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    assert 0.0 <= run_dpo(config)["refusal_rate"] <= 1.0


def test_other_rows_are_noticed(whole: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", epochs=0.5)
    run_dpo(config)
    write_rankings(Path(str(config.dpo.data.train)), NAMES[:-1])
    os.utime(str(config.dpo.data.train))
    with pytest.raises(ConfigError, match=r"dpo\.data\.train: .* has other rows than when the run began"):
        run_dpo(config)


def test_an_empty_path_is_the_sft_stage_s_model(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", model=ModelConfig())
    with pytest.raises(ConfigError, match=r"dpo\.model\.path: is empty, and .*run/sft/hf does not exist; run the sft"):
        run_dpo(config)


def test_it_is_planned(tmp_path: Path) -> None:
    def names(**changes: Any) -> list[str]:
        dpo = replace(config_of(tmp_path, "run").dpo, **changes)
        plan = PlanConfig(topology="cpu:8", compile="simulated", completions=3, dpo=dpo)
        sized = plan_dpo(plan, planned_target(plan))
        stage = sized.build(sized.rows)
        assert device_bytes(stage.held["loaded"]) == 0.0, "no reference model is in memory"
        assert all(program.flops > 0 for program in stage.programs if program.timed)
        return [program.name for program in stage.programs]

    assert names() == ["reference", "start", "update", "evaluation", "answers"]
    assert names(pack_length=256) == ["reference", "start", "update", "evaluation", "answers"]
    assert names(loss="simpo") == ["start", "update", "evaluation", "answers"]
    assert names(data=DataConfig(max_length=64)) == ["reference", "start", "update"]


def test_held_out_prompts_are_answered_and_scored_as_by_ppo(tmp_path: Path) -> None:
    """The first answers are the reference's: no KL, as many wins as losses, and scores that the rule gives."""
    prompts = DataConfig(eval=first_rows("prompts_heldout", 8, tmp_path), max_length=12, buckets=1)
    rules = RewardsConfig(model_weight=0.0, required=RequiredRuleConfig(weight=1.0, patterns=("a", "b", "c")))
    config = config_of(tmp_path, "answers", prompts=prompts, rewards=rules)
    run_dpo(config)
    first, *_, last = lines_of(config, "eval/score_mean")
    assert abs(first["eval/kl"]) < 1e-4
    assert first["eval/win_rate"] == 0.5
    assert abs(last["eval/kl"]) > 1e-4
    rows = read_jsonl(Path(config.run) / "dpo" / "evals" / "000004.jsonl")
    assert len(rows) == 8
    scores = [sum(letter in row["completion"] for letter in "abc") / 3 for row in rows]
    np.testing.assert_allclose([row["score"] for row in rows], scores, rtol=1e-6)
    assert last["eval/score_mean"] == pytest.approx(np.mean(scores), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompts": DataConfig(train="p.jsonl")},
            r"dpo.prompts.train: must be empty, because dpo learns from rankings",
        ),
        ({"reward": ModelConfig("r")}, r"dpo.reward: must be as by default, because dpo.prompts.eval is empty, got"),
        (
            {"rewards": RewardsConfig(model_weight=0.5)},
            r"dpo.rewards: must be as by default, because dpo.prompts.eval is empty, got",
        ),
        (
            {"prompts": DataConfig(eval="p.jsonl"), "sampling": SamplingConfig(temperature=0.0)},
            r"dpo.sampling.temperature: must be above 0, because",
        ),
    ],
)
def test_settings_of_an_evaluation_that_is_not_there_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check(Config(dpo=DPOConfig(**settings)))
