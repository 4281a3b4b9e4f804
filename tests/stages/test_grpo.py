"""GRPO and its relatives on the shipped model: they learn a rule, repeat to the bit, and hold no critic."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    GroupKLConfig,
    GRPOConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PPOConfig,
    SamplingConfig,
    to_yaml,
)
from jrlhf.config.rewards import LengthRuleConfig
from jrlhf.config.tools import ExportConfig
from jrlhf.models import load_pretrained
from jrlhf.plan.run import planned_target
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.grpo import plan_grpo, run_grpo
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.tools.export import run_export
from jrlhf.train.attempt import Event
from jrlhf.train.programs import device_bytes
from jrlhf.train.signals import Interrupted
from jrlhf.types import PPOParams
from tests.support.grpo_run import MODEL, WORDS, config_of
from tests.support.processes import JRLHF, running
from tests.support.runs import compare_runs, read_jsonl
from tests.support.short_model import SHORT_MODEL

GRPO_LOG = {
    "reward/score_mean", "reward/rule/required", "groups/degenerate", "groups/score_std", "entropy", "length/mean",
    "loss", "loss/policy", "policy/approxkl", "policy/clipfrac", "policy/ratio_mean", "policy/ratio_max",
    "policy/updates", "policy/first_minibatch_max_abs_log_ratio", "grad_norm", "lr", "eos_fraction",
    "sampler/max_abs_logprob_diff", "share/rollout", "share/scoring", "share/update", "perf/rollout_tokens_per_second",
    "rollout/occupancy",
}  # fmt: skip
KL_LOG = {"kl", "kl_coef", "loss/kl"}


def lines_of(config: Config) -> list[dict[str, float]]:
    return [line for line in read_metrics(Path(config.run) / "grpo" / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any], list[Event]]:
    """A run, its summary, and what the loop told of it. On each device two answers share one slot."""
    config = config_of(tmp_path_factory.mktemp("grpo"), "whole", epochs=2, minibatches=2, ema_decay=0.5)
    config = replace(config, grpo=replace(config.grpo, sampling=replace(config.grpo.sampling, slots=1)))
    events: list[Event] = []
    return config, run_grpo(config, on_event=events.append), events


def test_it_logs_what_it_does_and_starts_on_policy(whole: tuple[Config, dict[str, Any], list[Event]]) -> None:
    config, summary, _ = whole
    lines = lines_of(config)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= GRPO_LOG | KL_LOG, (GRPO_LOG | KL_LOG) - line.keys()
        assert line["policy/first_minibatch_max_abs_log_ratio"] <= 5e-5
        assert line["policy/updates"] == 4
        assert 0.0 <= line["groups/degenerate"] < 1.0
        assert 0.2 < line["rollout/occupancy"] <= 1.0
    assert abs(lines[0]["kl"]) == 0.0
    assert lines[-1]["kl_coef"] == pytest.approx(0.04)
    assert summary["kl_coef"] == 0.04, "as in the config, although the state has it in float32"
    assert summary["before"]["eval/kl"] == 0.0
    assert summary["after"]["eval/kl"] != 0.0
    for name in ("config.yaml", "summary.json", "checkpoints", "hf/model.safetensors", "evals/000003.jsonl"):
        assert (Path(config.run) / "grpo" / name).exists(), name
    answers = read_jsonl(Path(config.run) / "grpo" / "evals" / "000003.jsonl")
    assert len(answers) == 16
    entropy, kl, length = (np.asarray([row[name] for row in answers]) for name in ("entropy", "kl", "length"))
    # The entropy of an answer is a mean over its tokens, its KL a sum.
    assert summary["after"]["eval/entropy"] == pytest.approx(np.average(entropy, weights=length))
    assert summary["after"]["eval/kl"] == pytest.approx(kl.mean())


def test_there_is_no_critic(whole: tuple[Config, dict[str, Any], list[Event]]) -> None:
    config, _, events = whole
    model = load_pretrained(SHORT_MODEL, dtype="float32")
    for event in events:
        assert not isinstance(event.state.train.params, PPOParams)
        assert jax.tree.structure(event.state.train.params) == jax.tree.structure(model.params)
    names = {name for line in read_metrics(Path(config.run) / "grpo" / "metrics.jsonl") for name in line}
    assert not [name for name in names if "value" in name]


def test_a_checkpoint_exports_to_the_model_of_the_run(
    whole: tuple[Config, dict[str, Any], list[Event]], tmp_path: Path
) -> None:
    config, _, _ = whole
    run_export(ExportConfig(run=config.run, out=str(tmp_path / "hf"), stage="grpo", step=3))
    finished = Path(config.run) / "grpo" / "hf" / "model.safetensors"
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == finished.read_bytes()


def test_an_interrupted_run_ends_as_the_unbroken_one(
    whole: tuple[Config, dict[str, Any], list[Event]], tmp_path: Path
) -> None:
    config = replace(whole[0], run=str(tmp_path / "run"))

    def interrupt(event: Event) -> None:
        if (event.kind, event.step) == ("step", 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step"):
        run_grpo(config, on_event=interrupt)
    run_grpo(config)
    compare_runs(Path(whole[0].run) / "grpo", tmp_path / "run" / "grpo")


def test_one_device_gives_the_run_of_eight(whole: tuple[Config, dict[str, Any], list[Event]], tmp_path: Path) -> None:
    """One reading of a prompt serves all its answers there, and two of them here; the draws are the same."""
    config = replace(whole[0], run=str(tmp_path / "run"))
    path = tmp_path / "grpo.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    at = {"processes": 1, "devices": 1, "engine": lambda port, processes, process: {}, "folder": tmp_path / "logs"}
    with running([*JRLHF, "grpo", "--config", str(path)], **at) as started:
        started.succeed(within=300)
    names = ("reward/score_mean", "kl", "loss", "entropy", "length/mean", "groups/degenerate", "policy/approxkl")
    for one, eight in zip(lines_of(config), lines_of(whole[0]), strict=True):
        for name in names:
            assert one[name] == pytest.approx(eight[name], rel=2e-3, abs=1e-5), name


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method", ["grpo", "rloo", "dr-grpo"])
def test_it_learns_a_rule(method: str, tmp_path: Path) -> None:
    how: dict[str, dict[str, Any]] = {
        "grpo": {},
        "rloo": {
            "baseline": "leave_one_out",
            "scale": False,
            "kl": GroupKLConfig(coef=0.02, target=4.0, horizon=1000, estimator="k1", place="reward"),
        },
        "dr-grpo": {
            "scale": False,
            "aggregation": "constant",
            "kl": GroupKLConfig(coef=0.0),
            "lora": LoRAConfig(rank=4),
        },
    }
    config = config_of(
        tmp_path,
        "run",
        model=ModelConfig(path="asset:stories260k"),
        iterations=14,
        episodes=64,
        samples=8,
        epochs=2,
        optim=OptimConfig(lr=2e-3, eps=1e-5, schedule="constant"),
        **how[method],
    )
    log = replace(config.grpo.log, eval_every=1000, tensorboard=False)
    summary = run_grpo(replace(config, grpo=replace(config.grpo, log=log)))
    assert summary["after"]["eval/score_mean"] > summary["before"]["eval/score_mean"] + 0.15
    coefs = [line.get("kl_coef") for line in lines_of(config)]
    match method:
        case "grpo":
            assert coefs == pytest.approx([0.04] * 14)
        case "rloo":
            assert coefs[1] == pytest.approx(0.02 * (1 - 0.2 * 64 / 1000))  # KL 0 is under the target
            assert "loss/kl" not in lines_of(config)[0]
        case _:
            names = {name for line in read_metrics(Path(config.run) / "grpo" / "metrics.jsonl") for name in line}
            assert not names & {*KL_LOG, "eval/kl"}
            assert "kl_coef" not in summary


def test_a_method_of_everything_runs(tmp_path: Path) -> None:
    """GSPO's ratio and GDPO's rewards, a soft limit of length, cut answers left out, parts, the sampler's log-probs."""
    rewards = replace(WORDS, length=LengthRuleConfig(weight=2.0, min=3, max=5))
    config = config_of(
        tmp_path,
        "run",
        rewards=rewards,
        normalise="each",
        ratio="sequence",
        clip=0.01,
        clip_high=0.02,
        old_logprobs="sampler",
        rollout_parts=2,
        iterations=2,
        kl=GroupKLConfig(coef=0.0),
    )
    run_grpo(config)
    first = lines_of(config)[0]
    assert first["policy/updates"] == 1
    assert {"reward/rule/required", "reward/rule/length"} <= first.keys()
    assert "sampler/mean_ratio" not in first


def test_adapters_off_are_the_reference_and_an_int8_cache_is_corrected(tmp_path: Path) -> None:
    """The base is in memory once; what the cache's rounding does to the sampler is in a weight of each token."""
    config = config_of(tmp_path, "run", lora=LoRAConfig(rank=2), iterations=2)
    sampling = replace(config.grpo.sampling, kv_cache="int8")
    frozen: list[set[int]] = []

    def note(event: Event) -> None:
        shards = [shard for leaf in jax.tree.leaves(event.state.train.frozen) for shard in leaf.addressable_shards]
        frozen.append({shard.data.unsafe_buffer_pointer() for shard in shards})

    run_grpo(replace(config, grpo=replace(config.grpo, sampling=sampling)), on_event=note)
    assert frozen[0] == frozen[-1], "an update copied the frozen weights"
    first, second = lines_of(config)
    assert abs(first["kl"]) < 1e-4 < abs(second["kl"])
    assert first["sampler/max_abs_logprob_diff"] > 1e-4
    assert first["sampler/weight_mean"] == pytest.approx(1.0, abs=0.05)
    assert first["sampler/weight_max"] > 1.0
    assert (Path(config.run) / "grpo" / "peft" / "adapter_config.json").exists()


def test_after_sft_and_the_reward_model_empty_paths_name_them(finished: tuple[Config, dict], tmp_path: Path) -> None:
    """Two reward models and a rule, each set against its group by itself; the pipeline skips what is done."""
    before, _ = finished
    for stage in ("sft", "reward"):
        shutil.copytree(Path(before.run) / stage, tmp_path / "run" / stage)
    rewards = replace(WORDS, model_weight=1.0, models=(str(tmp_path / "run" / "reward"),))
    config = config_of(
        tmp_path,
        "run",
        model=ModelConfig(),
        rewards=rewards,
        normalise="each",
        iterations=1,
        gates=("score_mean > -99",),
    )
    config = replace(before, run=config.run, ppo=PPOConfig(), grpo=config.grpo)
    summary = run_pipeline(config)
    assert summary["grpo"]["iterations"] == 1
    assert summary["grpo"]["before"]["eval/kl"] == 0.0
    [line] = lines_of(config)
    assert {"reward/model", "reward/rule/required"} <= line.keys()
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_without_a_reference_one_copy_of_the_policy_is_held(tmp_path: Path) -> None:
    """The state takes the loaded weights over: beside policy and optimizer, nothing of their size is there."""
    sizes: list[float] = []

    def note(event: Event) -> None:
        if event.kind == "step":
            jax.block_until_ready(event.state)
            sizes.append(sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted()))

    before = sum(x.nbytes for x in jax.live_arrays())
    # A checkpoint that is being written has arrays of its own.
    later = CheckpointConfig(every=1000)
    run_grpo(config_of(tmp_path, "run", iterations=2, kl=GroupKLConfig(coef=0.0), checkpoint=later), on_event=note)
    model = load_pretrained(SHORT_MODEL, dtype="float32")
    policy = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert sizes[-1] - before < 3.5 * policy  # weights and two moments


def test_it_is_planned_without_critic_and_without_reference() -> None:
    def planned(**changes: Any) -> tuple[list[str], dict[str, float]]:
        grpo = GRPOConfig(
            model=MODEL,
            prompts=DataConfig(max_length=16),
            sampling=SamplingConfig(max_new_tokens=8),
            episodes=64,
            samples=4,
            rewards=WORDS,
        )
        plan = PlanConfig(topology="cpu:8", grpo=replace(grpo, **changes))
        stage = plan_grpo(plan, planned_target(plan)).build(1)
        held = {name: device_bytes(tree) for name, tree in stage.held.items()}
        return [program.name for program in stage.programs], held

    names, held = planned()
    assert names == ["start", "rollout", "readings", "update"]
    assert held["loaded"] == held["trained"]
    none = GroupKLConfig(coef=0.0)
    names, held = planned(kl=none)
    assert names == ["start", "rollout", "readings", "update"]
    assert held["loaded"] == 0
    names, _ = planned(kl=none, old_logprobs="sampler")
    assert names == ["start", "rollout", "update"]


def test_episodes_that_do_not_divide_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grpo\.episodes: 12 rows do not divide over 8 devices"):
        run_grpo(config_of(tmp_path, "run", episodes=12))
