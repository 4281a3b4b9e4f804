"""All three stages on the shipped model: what they write, that they repeat to the bit, and that they come back."""

import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import Config, ConfigError, DataConfig, SamplingConfig, to_yaml
from jrlhf.config.rewards import BannedRuleConfig, RewardsConfig
from jrlhf.config.tools import ExportConfig, GenerateConfig, SampleConfig, ScoreConfig
from jrlhf.data import DataError, load_prompts, load_rankings, load_sft, load_tokenizer
from jrlhf.models import load_pretrained, load_reward_model
from jrlhf.rank import distinct
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.folder import open_stage
from jrlhf.runs.lock import RunLocked, run_lock
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.tools.export import run_export
from jrlhf.tools.inference import run_generate, run_sample, run_score
from jrlhf.train.attempt import Event
from jrlhf.train.signals import Interrupted
from tests.support.runs import compare_runs, read_jsonl, small_config
from tests.support.short_model import LAYERS

Finished = tuple[Config, dict[str, Any]]

PPO_LOG = {
    "reward/score_mean", "reward/score_std", "reward/total", "kl", "kl_coef", "entropy", "policy/approxkl",
    "policy/clipfrac", "policy/ratio_mean", "policy/ratio_max", "loss/policy", "loss/value", "value/explained_variance",
    "value/clipfrac", "length/mean", "eos_fraction", "lr", "grad_norm", "tokens_per_second", "seconds/rollout",
    "seconds/scoring", "seconds/update", "sampler/max_abs_logprob_diff", "policy/first_minibatch_max_abs_log_ratio",
}  # fmt: skip
USE_LOG = {
    "seconds/input",
    "share/input",
    "perf/model_flops_per_second",
    "perf/mfu",
    "compile/programs",
    "compile/seconds",
}
PPO_USE_LOG = {"perf/rollout_bandwidth_share"} | {
    name.format(phase)
    for name in ("share/{}", "perf/{}_mfu", "perf/{}_tokens_per_second")
    for phase in ("rollout", "scoring", "update")
}


def test_every_stage_leaves_its_folder_and_figures(finished: Finished) -> None:
    config, summary = finished
    run = Path(config.run)
    for stage in ("sft", "reward", "ppo"):
        for name in (
            "config.yaml",
            "metrics.jsonl",
            "summary.json",
            "checkpoints",
            "hf/model.safetensors",
            "tensorboard",
        ):
            assert (run / stage / name).exists(), (stage, name)
    assert (run / "report.html").stat().st_size > 0
    assert summary["sft"]["heldout_nll"] < summary["sft"]["base_nll"]
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["seconds"]["total"] >= max(summary["seconds"][stage] for stage in ("sft", "reward", "ppo"))
    candidates = read_jsonl(run / "sft" / "candidates.jsonl")
    assert len(candidates) == 16
    assert all(len(row["completions"]) == 2 for row in candidates)


def test_ppo_logs_the_whole_list_and_starts_on_policy(finished: Finished) -> None:
    config, summary = finished
    lines = [line for line in read_metrics(Path(config.run) / "ppo" / "metrics.jsonl") if "kl" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= PPO_LOG | USE_LOG | PPO_USE_LOG, (PPO_LOG | USE_LOG | PPO_USE_LOG) - line.keys()
        # No part of a line's time is counted twice; how large each is, is the machine's affair (test_performance.py).
        shares = [value for name, value in line.items() if name.startswith("share/")]
        assert sum(shares) <= 1.0
        assert all(line[f"share/{phase}"] > 0.0 for phase in ("rollout", "scoring", "update"))
        # Rounding alone: attention scores of this model reach 170, whose last bit is 1.5e-5 (tests/steps: 1e-5).
        assert line["policy/first_minibatch_max_abs_log_ratio"] <= 5e-5
        assert line["sampler/max_abs_logprob_diff"] <= 1e-4
        assert line["entropy"] >= 0
    for stage in ("sft", "reward"):
        for line in read_metrics(Path(config.run) / stage / "metrics.jsonl"):
            assert "loss" not in line or line.keys() >= USE_LOG, USE_LOG - line.keys()
    assert abs(lines[0]["kl"]) == 0.0
    assert summary["ppo"]["before"]["eval/kl"] == 0.0
    assert lines[1]["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 16 / 100), rel=1e-6)  # KL 0 is under the target


def test_every_stage_counts_the_rows_that_it_cut(finished: Finished) -> None:
    config, summary = finished
    tokenizer = load_tokenizer(assets.resolve("asset:stories260k"))
    sft, reward, prompts = config.sft.data, config.reward.data, config.ppo.prompts
    uncut = DataConfig(max_length=4096)
    lengths = {
        "sft": (load_sft(uncut, sft.train, tokenizer, train_on="completion").lengths, sft.max_length),
        "reward": (load_rankings(uncut, reward.train, tokenizer).lengths, reward.max_length),
        "ppo": (load_prompts(uncut, prompts.train, tokenizer).lengths, prompts.max_length),
    }
    cut = {stage: int((lengths_of > limit).sum()) for stage, (lengths_of, limit) in lengths.items()}
    assert {stage: summary[stage]["cut"] for stage in cut} == cut
    assert sum(cut.values()) > 0


def test_scores_are_normalised_on_the_sft_policy_s_answers(finished: Finished, tmp_path: Path) -> None:
    config, summary = finished
    out = tmp_path / "scores.jsonl"
    run_score(ScoreConfig(model=config.run, data=summary["reward"]["normalised_on"], out=str(out), max_length=32))
    scores = np.asarray([row["score"] for row in read_jsonl(out)])
    assert len(scores) > 16
    np.testing.assert_allclose((scores.mean(), scores.std()), (0.0, 1.0), atol=1e-3)


def test_what_is_done_is_skipped(finished: Finished) -> None:
    config, summary = finished
    before = (Path(config.run) / "ppo" / "metrics.jsonl").stat().st_mtime_ns
    again = run_pipeline(config)
    assert (Path(config.run) / "ppo" / "metrics.jsonl").stat().st_mtime_ns == before
    assert again["ppo"] == summary["ppo"]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_an_interrupted_run_ends_as_the_unbroken_one(name: str, finished: Finished, tmp_path: Path) -> None:
    """SIGINT in the second step: it is finished and saved; the same call goes on, to the same metrics and weights.

    The unbroken run in another folder is also what shows that the same seed gives the same run.
    """
    whole, _ = finished
    config = replace(whole, run=str(tmp_path / "run"))
    if name == "ppo":
        for before in ("sft", "reward"):
            shutil.copytree(Path(whole.run) / before, tmp_path / "run" / before)
    run: Callable[..., Any] = {"sft": run_sft, "ppo": run_ppo}[name]

    def interrupt(event: Event) -> None:
        if (event.kind, event.step) == ("step", 2 if name == "sft" else 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step"):
        run(config, on_event=interrupt)
    assert not (tmp_path / "run" / name / "summary.json").exists()
    run(config)
    compare_runs(Path(whole.run) / name, tmp_path / "run" / name)


def test_another_config_is_refused_by_name(finished: Finished) -> None:
    config, _ = finished
    other = replace(config, sft=replace(config.sft, epochs=5.0), seed=4)
    with pytest.raises(ConfigError, match=r"(?s)seed: 3 -> 4.*sft\.epochs: 2\S* -> 5\.0"):
        run_sft(other)
    # What only says where and how it is watched may change.
    run_sft(replace(config, sft=replace(config.sft, log=replace(config.sft.log, every=7))))


def test_a_run_that_failed_before_its_first_checkpoint_may_start_anew(tmp_path: Path) -> None:
    with open_stage(Config(run=str(tmp_path)), "sft") as folder:
        pass
    with open_stage(Config(run=str(tmp_path), seed=7), "sft"):
        assert "seed: 7" in (folder / "config.yaml").read_text()


def test_texts_that_cannot_be_scored_are_named_before_the_first_step(tmp_path: Path) -> None:
    config = small_config(tmp_path, "run")
    prompts = config.ppo.prompts.eval
    reward = replace(config.reward, model=config.sft.model, normalise=prompts)
    with pytest.raises(DataError, match=r"no rows; all 16 were skipped, most for: text: no such column"):
        run_reward(replace(config, reward=reward))
    assert not (Path(config.run) / "reward" / "metrics.jsonl").exists()


def test_a_folder_in_use_is_refused(finished: Finished) -> None:
    config, _ = finished
    with run_lock(Path(config.run) / "sft"), pytest.raises(RunLocked, match="in use by process"):
        run_sft(config)


def test_a_checkpoint_exports_to_what_the_stage_exported(finished: Finished, tmp_path: Path) -> None:
    config, _ = finished
    for stage in ("sft", "ppo"):
        run_export(ExportConfig(run=config.run, out=str(tmp_path / stage), stage=stage, step=-1))
        with Checkpoints(
            Path(config.run) / stage / "checkpoints", keep=1, keep_best=0, best_metric=None, best_mode="min"
        ) as saved:
            newest = saved.latest_step()
        run_export(ExportConfig(run=config.run, out=str(tmp_path / f"{stage}-step"), stage=stage, step=newest))
        weights = [tmp_path / name / "model.safetensors" for name in (stage, f"{stage}-step")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert load_pretrained(tmp_path / f"{stage}-step", dtype="float32").arch.num_layers == LAYERS
        assert load_tokenizer(str(tmp_path / f"{stage}-step")).eos_token == "</s>"
        # The first line says where it was run, from where it has been copied.
        _, *lines = (tmp_path / f"{stage}-step" / "jrlhf.yaml").read_text().splitlines()
        assert lines == to_yaml(config).splitlines()[1:]
    with pytest.raises(ConfigError, match="is not empty"):
        run_export(ExportConfig(run=config.run, out=str(tmp_path / "sft")))


def test_answers_can_be_generated_and_scored(finished: Finished, tmp_path: Path) -> None:
    config, _ = finished
    prompts = config.ppo.prompts.eval
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.8, top_k=50, top_p=0.9)
    run_generate(GenerateConfig(config.run, prompts, out=str(answers), samples=2, sampling=sampling))
    rows = read_jsonl(answers)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_jsonl(Path(prompts))]
    assert all(len(row["completions"]) == 2 for row in rows)
    run_score(ScoreConfig(config.run, str(answers), out=str(scores)))
    scored = read_jsonl(scores)
    assert [row["completion"] for row in scored] == [answer for row in rows for answer in row["completions"]]
    assert all(math.isfinite(row["score"]) for row in scored)


def test_answers_are_sampled_as_tasks_to_rank(finished: Finished, tmp_path: Path, capsys) -> None:
    """Each prompt's different answers, by an id that is theirs; what was drawn twice is counted."""
    config, _ = finished
    prompts, out = config.ppo.prompts.eval, tmp_path / "tasks.jsonl"
    # One token of the three likeliest: nine draws cannot all differ.
    sampling = SamplingConfig(max_new_tokens=1, temperature=0.7, top_k=3)
    args = SampleConfig(config.run, prompts, out=str(out), samples=9, seed=5, sampling=sampling)
    run_sample(args)
    said = capsys.readouterr().err
    tasks = read_jsonl(out)
    assert all(2 <= len(set(task["completions"])) == len(task["completions"]) <= 3 for task in tasks)
    assert all((task["model"], task["seed"], task["temperature"]) == (config.run, 5, 0.7) for task in tasks)
    assert len({task["id"] for task in tasks}) == len(tasks)
    assert "answers left out: blank, or the same as another answer to their prompt" in said
    drawn = tmp_path / "answers.jsonl"
    run_generate(GenerateConfig(config.run, prompts, out=str(drawn), samples=9, seed=5, sampling=sampling))
    expected = {row["prompt"]: distinct(row["completions"]) for row in read_jsonl(drawn)}
    assert {task["prompt"]: task["completions"] for task in tasks} == {
        prompt: answers for prompt, answers in expected.items() if len(answers) > 1
    }
    first = out.read_bytes()
    run_sample(args)
    assert out.read_bytes() == first
    with pytest.raises(DataError, match=r"no prompt has two different answers; raise sampling\.temperature"):
        run_sample(replace(args, sampling=replace(sampling, top_k=1)))


def test_the_best_of_the_sampled_answers_becomes_rows_of_the_stages(finished: Finished, tmp_path: Path, capsys) -> None:
    """A rule's best is that of all drawn texts; a reward model's best and worst are a preference."""
    config, _ = finished
    prompts, out, drawn = config.ppo.prompts.eval, tmp_path / "best.jsonl", tmp_path / "answers.jsonl"
    sampling = SamplingConfig(max_new_tokens=6)
    banned = RewardsConfig(banned=BannedRuleConfig(weight=1.0, patterns=("a", "e", "i", "o", "u", "t", "n", "s")))
    args = SampleConfig(config.run, prompts, str(out), samples=12, sampling=sampling, keep="best", rewards=banned)
    run_sample(args)
    said = capsys.readouterr().err
    run_generate(GenerateConfig(config.run, prompts, out=str(drawn), samples=12, sampling=sampling))
    completions = {row["prompt"]: row["completions"] for row in read_jsonl(drawn)}

    def score(text: str) -> float:
        return -sum(letter in text for letter in banned.banned.patterns) / len(banned.banned.patterns)

    able = {prompt: [text for text in texts if text.strip()] for prompt, texts in completions.items()}
    best = {prompt: max(texts, key=score) for prompt, texts in able.items() if texts}
    assert {row["prompt"]: row["completion"] for row in read_jsonl(out)} == best
    means = [float(mean) for mean in re.findall(r"best of \d+: mean score (\S+),", said)]
    assert means[0] == pytest.approx(np.mean([score(t) for texts in completions.values() for t in texts]), abs=1e-3)
    assert means == sorted(means)
    assert "best of 8:" in said
    assert "best of 12:" in said

    run_sample(replace(args, keep="best-worst", score=config.run, rewards=RewardsConfig()))
    pairs = read_jsonl(out)
    assert pairs
    for row in pairs:
        assert row["chosen"] != row["rejected"]
        assert {row["chosen"], row["rejected"]} <= {*completions[row["prompt"]]}
    tokenizer = load_tokenizer(str(Path(config.run) / "sft" / "hf"))
    data = DataConfig(max_length=128, cache="")
    assert len(load_rankings(data, str(out), tokenizer)) == len(pairs)
    with pytest.raises(DataError, match=r"every prompt is left out: no two answers to it have different scores"):
        run_sample(replace(args, keep="best-worst", sampling=replace(sampling, top_k=1)))


def test_the_exports_load_and_the_policy_has_moved(finished: Finished) -> None:
    config, _ = finished
    run = Path(config.run)
    before = load_pretrained(run / "sft" / "hf", dtype="float32")
    after = load_pretrained(run / "ppo" / "hf", dtype="float32")
    gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(gaps)) > 1e-4
    assert load_reward_model(run / "reward" / "hf", dtype="float32").gain > 0


def test_a_tracker_that_is_missing_is_named_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small_config(tmp_path, "tracked")
    log = replace(config.ppo.log, trackers=("wandb",))
    with pytest.raises(ConfigError, match=r"log\.trackers: wandb cannot be imported"):
        run_pipeline(replace(config, ppo=replace(config.ppo, log=log)))
    assert not Path(config.run).exists()
