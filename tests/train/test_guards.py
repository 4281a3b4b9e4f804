"""Guards on real PPO: a learning rate far too high, rewards that can be hacked, samplers that are not the policy."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import (
    CanaryConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SamplingConfig,
)
from jrlhf.config.gates import GatesFailed
from jrlhf.config.watch import GuardConfig, GuardsConfig
from jrlhf.data import load_tokenizer, stop_token_ids
from jrlhf.data.tokenizer_files import tokenizer_files
from jrlhf.models import load_pretrained, reward_from_pretrained, save_reward_model
from jrlhf.models.hf.folder_files import write_files
from jrlhf.rollout import evaluation as ppo_eval
from jrlhf.rollout.scores import Rewards, ScoredAnswers
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages import ppo
from jrlhf.stages.ppo import run_ppo
from jrlhf.train.guards import GuardStop
from jrlhf.types import Generation

MODEL = "asset:stories260k"
LIKELY_TOKEN = 261
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    source = assets.resolve(MODEL)
    save_reward_model(reward_from_pretrained(load_pretrained(source, dtype="float32"), jax.random.key(0)), folder)
    write_files(folder, tokenizer_files(load_tokenizer(source)))
    return folder


def small(
    folder: Path,
    reward: Path,
    *,
    iterations: int,
    lr: float = 3e-3,
    stop: tuple[str, ...] = (),
    save_every: int = 1000,
) -> Config:
    """A run of PPO; one that may go back to an earlier state saves each. One rate is one compiled update for all."""
    return Config(
        run=str(folder),
        ppo=PPOConfig(
            model=ModelConfig(path=MODEL),
            reward=ModelConfig(path=str(reward)),
            prompts=DataConfig(train="asset:prompts_train", max_length=12, buckets=1),
            sampling=SamplingConfig(max_new_tokens=16, stop=stop),
            optim=OptimConfig(lr=lr, schedule="constant", eps=1e-5, warmup=0.0),
            kl=KLConfig(coef=0.05, target=0.0),
            iterations=iterations,
            episodes=32,
            epochs=2,
            minibatches=2,
            log=LogConfig(every=1, progress=False, tensorboard=False),
            checkpoint=CheckpointConfig(every=save_every, keep=20),
        ),
    )


def guarded(config: Config, **guards: GuardConfig | int | float) -> Config:
    return replace(config, ppo=replace(config.ppo, guards=GuardsConfig(**guards)))


def told(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run) / "ppo" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def rewarded(monkeypatch: pytest.MonkeyPatch, reward: Callable[[Generation], jax.Array]) -> None:
    score = jax.jit(reward)

    def scored(generation: Generation, *_: Any) -> ScoredAnswers:
        return ScoredAnswers(generation, score(generation), {})

    rewards = Rewards(lambda *_: dict, scored)
    monkeypatch.setattr(ppo, "make_rewards", lambda *_, **__: rewards)
    monkeypatch.setattr(ppo_eval, "make_rewards", lambda *_, **__: rewards)


def length(generation: Generation) -> jax.Array:
    return jnp.sum(generation.response_mask, axis=-1, dtype=jnp.float32)


def lucky_token(generation: Generation) -> jax.Array:
    lucky = generation.response_mask & (generation.tokens == LIKELY_TOKEN)
    return jnp.sum(lucky, axis=-1, dtype=jnp.float32)


def test_a_learning_rate_a_thousand_times_too_high_is_rolled_back_before_any_nan(
    tmp_path: Path, reward_folder: Path
) -> None:
    config = small(tmp_path, reward_folder, lr=4.0, iterations=8, save_every=1)
    with pytest.raises(GuardStop, match="rolled back 2 times"):
        run_ppo(config)
    lines = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "kl" in line]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert sum(line["skipped"] for line in lines) == 0, "the guard came before any step that is not finite"
    # The state of the first step is what the second rollout has found bad: both times it is gone back to the start.
    assert [event["step"] for event in told(config, "guard")] == [2, 4, 6]
    first, second = told(config, "rollback")
    assert (first["to"], second["to"]) == (0, 2)
    assert (first["rate_factor"], second["rate_factor"]) == (0.5, 0.25)
    assert second["kl_coef"] == pytest.approx(0.2)
    lines = {line["step"]: line for line in lines}
    assert lines[3]["kl"] == 0.0, "the state that was gone back to is the SFT model itself"


def test_a_milder_rate_after_a_rollback_lets_the_run_end(tmp_path: Path, reward_folder: Path) -> None:
    config = small(tmp_path, reward_folder, lr=4.0, iterations=6, save_every=1)
    run_ppo(guarded(config, kl=GuardConfig(bound=100.0, action="rollback"), rollback_lr=1e-4))
    assert len(told(config, "rollback")) == 1
    lines = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "kl" in line]
    assert lines[1]["kl"] > 100.0 > 10.0 > lines[-1]["kl"]
    assert (tmp_path / "ppo" / "hf" / "model.safetensors").exists()


def test_a_reward_for_length_trips_the_length_guard_and_the_sampler_is_not_suspected(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded(monkeypatch, length)
    config = small(tmp_path, reward_folder, iterations=8, stop=(".",))
    with pytest.raises(GuardStop, match="the reward pays for length"):
        run_ppo(guarded(config, length=GuardConfig(bound=1.5, patience=2, action="stop")))
    lines = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "kl" in line]
    beyond = [line["length/mean"] > 1.5 * lines[0]["length/mean"] for line in lines]
    # The run ends at the second rollout in a row that is beyond the bound; that one has no line any more.
    assert told(config, "guard")[-1]["step"] == len(lines) + 1
    assert beyond[-1]
    assert not any(first and second for first, second in pairwise(beyond))
    assert {event["guard"] for event in told(config, "guard")} == {"length"}, "of a sound sampler nothing is said"


def test_a_reward_for_one_token_trips_repetition_and_entropy(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How soon and how far one token takes over is a matter of the draws: the bound lies well inside what all reach."""
    rewarded(monkeypatch, lucky_token)
    config = small(tmp_path, reward_folder, iterations=14)
    config = guarded(config, entropy=GuardConfig(bound=1.0, patience=2))
    run_ppo(config)
    lines = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "kl" in line]
    guards, usual = config.ppo.guards, lines[0]["repetition"]
    crossed = {
        "entropy": ([line["entropy"] < guards.entropy.bound for line in lines], guards.entropy.patience),
        "repetition": (
            [line["repetition"] - usual > guards.repetition.bound for line in lines],
            guards.repetition.patience,
        ),
    }
    for name, (beyond, patience) in crossed.items():
        full = [all(beyond[at - patience : at]) for at in range(patience, len(beyond) + 1)]
        fired = [event["step"] for event in told(config, "guard") if event["guard"] == name]
        assert fired[0] == full.index(True) + patience


def _masked_stop(inner: Any) -> Any:
    def sampler(decode_fns: Any, config: SamplingConfig, tokenizer: Any, mesh: Any, **named: Any) -> Any:
        masked = jnp.asarray(stop_token_ids(tokenizer, config.stop))

        def decode(*args: Any) -> Any:
            logits, cache = decode_fns.decode(*args)
            return logits.at[..., masked].set(-1e9), cache

        return inner(decode_fns._replace(decode=decode), config, tokenizer, mesh, **named)

    return sampler


def _narrow_top_p(inner: Any) -> Any:
    return lambda decode_fns, config, *rest, **named: inner(decode_fns, replace(config, top_p=0.5), *rest, **named)


def _old_weights(inner: Any) -> Any:
    def sampler(*args: Any, **named: Any) -> Any:
        generate, first = inner(*args, **named), []

        def stale(params: Any, *rest: Any) -> Generation:
            if not first:
                first.append(jax.tree.map(jnp.copy, params))
            return generate(first[0], *rest)

        return stale

    return sampler


@pytest.mark.parametrize(
    ("broken", "guard", "step"),
    [
        (_masked_stop, "sampler", 1),
        (_narrow_top_p, "sampler", 1),
        (_old_weights, "negative_kl", 3),
    ],
)
def test_a_sampler_that_is_not_the_policy_is_named_as_the_cause(
    broken: Callable[[Any], Any],
    guard: str,
    step: int,
    tmp_path: Path,
    reward_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ppo, "jit_generate", broken(ppo.jit_generate))
    config = small(tmp_path, reward_folder, iterations=step, stop=(".",))
    run_ppo(config)
    assert (guard, step) in {(event["guard"], event["step"]) for event in told(config, "guard")}
    assert "the sampler and the trained policy disagree" in caplog.text


def two_lucky_tokens(generation: Generation) -> jax.Array:
    """What is meant by the reward for the lucky token: some of it is good, more is not."""
    count = lucky_token(generation)
    return jnp.where(count <= 2.0, count, 4.0 - count)


@pytest.mark.parametrize(
    ("proxy", "seed"),
    [
        ("lucky token", 0),
        *(pytest.param("lucky token", seed, marks=pytest.mark.slow) for seed in range(1, 5)),
        *(pytest.param("length", seed, marks=pytest.mark.slow) for seed in range(5)),
    ],
)
def test_a_hacked_reward_is_caught_by_the_canary_and_the_best_model_comes_out(
    proxy: str, seed: int, tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge, which PPO is not trained on, likes some of what the reward pays for, and not much of it."""

    def ten_long(generation: Generation) -> jax.Array:
        return 4.0 - jnp.abs(length(generation) - 10.0)

    reward, gold, stop, lr = {
        "lucky token": (lucky_token, two_lucky_tokens, (), 2e-3),
        "length": (length, ten_long, (".",), 5e-4),
    }[proxy]
    rewarded(monkeypatch, reward)
    judge = jax.jit(gold)
    monkeypatch.setattr(ppo_eval, "make_scorer", lambda *_, **__: lambda generation, *_: judge(generation))
    config = small(tmp_path, reward_folder, lr=lr, iterations=30, stop=stop)
    settings = replace(
        config.ppo,
        # A rollback that changes nothing: the reward is hacked again, and the run is ended.
        guards=GuardsConfig(rollbacks=1, rollback_lr=1.0, rollback_beta=1.0),
        canary=CanaryConfig(action="rollback", judge=ModelConfig(path=str(reward_folder))),
        prompts=replace(config.ppo.prompts, eval="asset:prompts_heldout"),
        log=replace(config.ppo.log, eval_every=1),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )
    summary = run_ppo(replace(config, seed=seed, ppo=settings))
    assert len(told(config, "canary")) == 2, "caught each time"
    assert len(told(config, "rollback")) == 1
    [ended] = told(config, "ended")
    assert ended["step"] < 30
    lines = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "eval/judge_mean" in line]
    best = max(lines, key=lambda line: line["eval/judge_mean"])
    assert summary["after"]["eval/judge_mean"] == pytest.approx(best["eval/judge_mean"])
    # Of several that are equally good it is the newest.
    equal = [line["step"] for line in lines if line["eval/judge_mean"] == best["eval/judge_mean"]]
    assert summary["exported_step"] == equal[-1]
    # The first answers have the length that is wanted already, so that there the best may be the model of the start.
    if proxy == "lucky token":
        assert summary["after"]["eval/judge_mean"] > summary["before"]["eval/judge_mean"]


def test_a_model_that_breaks_a_gate_is_not_passed_on(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded(monkeypatch, length)
    config = small(tmp_path, reward_folder, iterations=2, stop=(".",))
    prompts = replace(config.ppo.prompts, eval="asset:prompts_heldout")
    log = replace(config.ppo.log, eval_every=1, eval_rows=16)
    strict = replace(config, ppo=replace(config.ppo, prompts=prompts, log=log, gates=("kl <= 100", "win_rate >= 1.0")))
    with pytest.raises(GatesFailed, match=r"ppo: 1 of 2 gates failed.*\n  win_rate >= 1  got 0\.\d+, missed by 0\."):
        run_ppo(strict)
    folder = tmp_path / "ppo"
    verdicts = json.loads((folder / "gates.json").read_text())["gates"]
    assert [verdict["passed"] for verdict in verdicts] == [True, False]
    assert not (folder / "hf").exists()
    assert not (folder / "summary.json").exists()
    # A gate that is taken back lets the finished run's model through, without a step more.
    summary = run_ppo(replace(strict, ppo=replace(strict.ppo, gates=("kl <= 100",))))
    assert summary["exported_step"] == 2
    assert (folder / "hf" / "model.safetensors").exists()
