"""Whole stages over several processes, started by the command itself: as over one, in numbers and in files."""

import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jrlhf.config import Config, to_yaml
from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.parallel import shard_batch
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.grpo import run_grpo
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.sft import run_sft
from jrlhf.types import SFTBatch
from tests.support.grpo_run import WORDS
from tests.support.grpo_run import config_of as grpo_config
from tests.support.processes import JRLHF, ROOT, WORKER, by_slurm, by_variables, running
from tests.support.runs import read_jsonl, small_config
from tests.support.saving import leaves, open_checkpoints, restored, sft_state

TIMING = ("time", "per_second", "seconds", "share/", "perf/", "compile/", "bandwidth")


def small_sft(folder: Path, run: str) -> Config:
    config = small_config(folder, run)
    data = replace(config.sft.data, cache=str(folder / f"{run}-cache"))
    log = replace(config.sft.log, samples=0)
    return replace(config, sft=replace(config.sft, data=data, log=log, candidate_prompts=""))


def rarely_saved(config: Config, *, epochs: float) -> Config:
    """After every fourth step at most, all of them kept, and evaluated at the ends alone."""
    checkpoint = replace(config.sft.checkpoint, every=4, keep=1000)
    log = replace(config.sft.log, eval_every=1000)
    return replace(config, sft=replace(config.sft, epochs=epochs, checkpoint=checkpoint, log=log))


def command(config: Config, stage: str, folder: Path) -> list[str]:
    path = folder / f"{Path(config.run).name}.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return [*JRLHF, stage, "--config", str(path), "--distributed.heartbeat_timeout", "20"]


def check_same_metrics(found: Path, expected: Path, *, within: float = 1e-5) -> None:
    """Line by line and name by name, but for what the clock says."""
    lines = [read_metrics(path / "metrics.jsonl") for path in (found, expected)]
    assert [row["step"] for row in lines[0]] == [row["step"] for row in lines[1]]
    for row, other in zip(*lines, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not any(part in name for part in TIMING):
                # How far rounding takes two probabilities apart is rounding itself.
                least = 1e-4 if "max_abs" in name else 1e-6
                assert row[name] == pytest.approx(other[name], rel=within, abs=least), (row["step"], name)


def no_step_twice(folder: Path) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    steps = Counter(row["step"] for row in rows if "loss" in row)
    assert set(steps.values()) == {1}
    assert [*steps] == list(range(1, int(max(steps)) + 1))


def test_two_processes_under_slurm_train_as_one_and_write_once(tmp_path):
    config, alone = small_sft(tmp_path, "two"), small_sft(tmp_path, "one")
    with running(
        command(config, "sft", tmp_path), processes=2, devices=4, engine=by_slurm, folder=tmp_path / "logs"
    ) as started:
        run_sft(alone)
        started.succeed(within=400)
    found, expected = Path(config.run) / "sft", Path(alone.run) / "sft"
    check_same_metrics(found, expected)
    no_step_twice(found)
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    assert len([*(found / "tensorboard").iterdir()]) == 1
    # Rows were tokenised once: a folder for each file, and nothing half-written.
    for run in ("two", "one"):
        kept = [path for path in (tmp_path / f"{run}-cache").iterdir() if path.suffix != ".lock"]
        assert len(kept) == 2
        assert not [path for path in kept if path.suffix == ".partial"]
    # The first process alone speaks.
    assert "sft done" in started.output(0)
    assert "sft done" not in started.output(1)

    # Rows that are others now are read by both, and both hear from the first that the stage is not what it was.
    train = Path(str(config.sft.data.train))
    train.write_text("\n".join(train.read_text(encoding="utf-8").splitlines()[1:]) + "\n", encoding="utf-8")
    with running(
        command(config, "sft", tmp_path), processes=2, devices=4, engine=by_slurm, folder=tmp_path / "again"
    ) as started:
        assert [started.code(process, within=200) for process in (0, 1)] == [2, 2]
        assert all("sft.data.train: " in started.output(process) for process in (0, 1))


def recipe_variables(port: int, processes: int, process: int) -> dict[str, str]:
    """What a pod of configs/launch/jobset.yaml has in its environment, on this machine."""
    recipe = yaml.safe_load((ROOT / "configs" / "launch" / "jobset.yaml").read_text())
    pod = recipe["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    told = {
        "metadata.annotations['jobset.sigs.k8s.io/coordinator']": "127.0.0.1",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(process),
    }
    found: dict[str, str] = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": str(process)}
    for variable in pod["containers"][0]["env"]:
        if "valueFrom" in variable:
            found[variable["name"]] = told[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            value = variable["value"]
            for name, text in found.items():
                value = value.replace(f"$({name})", text)
            found[variable["name"]] = value
    # The recipe's own port and number of pods are not free here.
    host = found["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0]
    return found | {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": str(processes)}


def ruled(config: Config, folder: Path) -> Config:
    """With a rule beside the reward model, and prompts that should be refused."""
    safety = folder / "safety.jsonl"
    rows = [{"prompt": "Once upon a", "refusal": True}, {"prompt": "There was a", "refusal": False}]
    safety.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = RewardsConfig(length=LengthRuleConfig(weight=0.5, min=2, max=6))
    return replace(
        config,
        safety=SafetyConfig(prompts=str(safety), patterns=("the",)),
        ppo=replace(config.ppo, rewards=rewards, gates=("rule/length > 0",)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_pipeline_in_the_pods_of_a_jobset_is_that_of_one_process(processes, tmp_path):
    config, alone = (ruled(small_config(tmp_path, run), tmp_path) for run in ("several", "one"))
    with running(
        command(config, "pipeline", tmp_path),
        processes=processes,
        devices=8 // processes,
        engine=recipe_variables,
        folder=tmp_path / "logs",
    ) as started:
        summary = run_pipeline(alone)
        started.succeed(within=550)
    # Sums over processes have another order; what PPO samples and the ratios it takes amplify their last bits.
    for stage, within in (("sft", 1e-5), ("reward", 1e-5), ("ppo", 1e-4)):
        check_same_metrics(Path(config.run) / stage, Path(alone.run) / stage, within=within)
        no_step_twice(Path(config.run) / stage)
        assert (Path(config.run) / stage / "hf" / "config.json").exists()
    for written in ("sft/samples.jsonl", "sft/candidates.jsonl", "ppo/evals/000003.jsonl", "ppo/safety/000003.jsonl"):
        texts = [(Path(run) / written).read_text().splitlines() for run in (config.run, alone.run)]
        completions = [[json.loads(row).get("completion") for row in rows] for rows in texts]
        assert completions[0] == completions[1]
    found = json.loads((Path(config.run) / "summary.json").read_text())
    assert found["ppo"]["after"] == pytest.approx(summary["ppo"]["after"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [{"samples": 4, "rollout_parts": 2}, {"samples": 16}])
def test_grpo_on_two_hosts_is_that_of_one(groups, tmp_path):
    """Groups within a host or one over both, with two rewards; groups of equal scores are drawn again."""
    rewards = replace(WORDS, length=LengthRuleConfig(weight=0.5, min=2, max=6))
    changes = {"rewards": rewards, "normalise": "each", "resample": 2, "iterations": 2, **groups}
    config, alone = (grpo_config(tmp_path, run, **changes) for run in ("two", "one"))
    with running(
        command(config, "grpo", tmp_path), processes=2, devices=4, engine=by_slurm, folder=tmp_path / "logs"
    ) as started:
        run_grpo(alone)
        started.succeed(within=550)
    found, expected = Path(config.run) / "grpo", Path(alone.run) / "grpo"
    check_same_metrics(found, expected, within=1e-4)
    no_step_twice(found)
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    answers = [[row["completion"] for row in read_jsonl(folder / "evals/000002.jsonl")] for folder in (found, expected)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_another_topology_goes_on(tmp_path):
    config = rarely_saved(small_sft(tmp_path, "stopped"), epochs=100.0)
    folder = Path(config.run) / "sft"

    def steps() -> int:
        return len(read_metrics(folder / "metrics.jsonl"))

    with running(
        command(config, "sft", tmp_path), processes=2, devices=1, engine=by_variables, folder=tmp_path / "logs"
    ) as started:
        started.wait_for(lambda: steps() > 8, within=400)
        started.send(1, signal.SIGTERM)
        assert [started.code(process, within=60) for process in (0, 1)] == [143, 143]
        stopped = [started.output(process).rpartition("stopped at ")[2].partition(",")[0] for process in (0, 1)]
    assert stopped[0] == stopped[1]
    assert "of 200" in stopped[0]
    last = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert stopped[0] == f"step {last:.0f} of 200"
    run_sft(config)
    no_step_twice(folder)


@pytest.mark.slow
def test_what_one_topology_saves_any_other_loads_bit_for_bit_and_goes_on_with(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, (60, 8, 16)).astype(np.int32)
    mask = np.ones((8, 16), np.bool_)

    def train(state, step, first: int, last: int):
        losses = []
        for number in range(first, last):
            mesh = jax.tree.leaves(state)[0].sharding.mesh
            batch = shard_batch(SFTBatch(tokens[number], mask, mask), mesh)
            train, metrics = step(state.train, batch, jax.random.fold_in(state.key, number))
            state, losses = state._replace(train=train), [*losses, float(metrics["loss"])]
        return state, losses

    state, step = sft_state(jax.devices()[:2])
    state, _ = train(state, step, 0, 3)
    saved = leaves(state)
    with open_checkpoints(tmp_path / "saved") as checkpoints:
        checkpoints.save(3, state, metadata={}, metrics=None)
    _, expected = train(state, step, 3, 53)
    with running(
        [*WORKER, "reload", str(tmp_path)], processes=2, devices=2, engine=by_variables, folder=tmp_path
    ) as started:
        started.succeed(within=400)
    with np.load(tmp_path / "loaded.npz") as loaded:
        on_two_processes = [loaded[name] for name in loaded.files]
    same(on_two_processes, saved)
    for source in ("saved", "again"):
        for devices in (1, 2, 4, 8):
            state, step = restored(tmp_path / source, jax.devices()[:devices])
            same(leaves(state), saved)
            if (source, devices) in {("saved", 1), ("saved", 4), ("saved", 8), ("again", 2)}:
                _, losses = train(state, step, 3, 53)
                np.testing.assert_allclose(losses, expected, rtol=1e-4)


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """0 ULP: byte for byte."""
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert [x.tobytes() for x in found] == [x.tobytes() for x in expected]


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_as_if_it_had_never_stopped(tmp_path):
    config, moved = (rarely_saved(small_sft(tmp_path, run), epochs=27.0) for run in ("whole", "moved"))
    run_sft(config)
    whole, folder = Path(config.run) / "sft", Path(moved.run) / "sft"
    shutil.copytree(whole / "checkpoints" / "4", folder / "checkpoints" / "4")
    shutil.copy(whole / "config.yaml", folder)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines if row["step"] <= 4))
    with running(
        command(moved, "sft", tmp_path), processes=2, devices=2, engine=by_slurm, folder=tmp_path / "logs"
    ) as started:
        started.succeed(within=300)
    no_step_twice(folder)
    losses = [
        [row["loss"] for row in read_metrics(path / "metrics.jsonl") if "loss" in row] for path in (folder, whole)
    ]
    assert len(losses[0]) == 54
    np.testing.assert_allclose(*losses, rtol=1e-4)
