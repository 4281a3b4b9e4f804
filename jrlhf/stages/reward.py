"""Stage 2: a reward model from people's rankings."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, Shaped

from jrlhf.config import Config, ConfigError, RewardConfig, to_yaml
from jrlhf.core import combine
from jrlhf.data import (
    Order,
    PackedRankingRows,
    RankingRows,
    TextRows,
    pack_rankings,
)
from jrlhf.models import (
    STOP_TOKEN,
    RewardModel,
    load_reward_start,
    normalise_reward,
)
from jrlhf.parallel import device_peaks, fetch, is_first, shard_batch
from jrlhf.rollout.reward_models import score_texts
from jrlhf.runs.exports import as_metadata, companions, exported_form, write_adapter, write_export
from jrlhf.runs.folder import open_stage, pass_gates, write_json
from jrlhf.runs.origin_check import changed_inputs, check_origin, finished_summary
from jrlhf.stages.inputs import RewardInputs
from jrlhf.stages.reward_figures import (
    accuracy_by_length_difference,
    expected_calibration_error,
    longer_wins_accuracy,
    pair_accuracy,
    reliability_curve,
)
from jrlhf.steps import make_reward_step, score_completions
from jrlhf.train.batches import covering_batches, device_multiple, device_share, reading_slices
from jrlhf.train.loop import Loop, run_loop
from jrlhf.train.lora import trainable
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import rates, timed, training_flops
from jrlhf.train.positions import Positions
from jrlhf.train.start import computed, mesh_of, start_training
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import PackedRankingBatch, Params


def run_reward(config: Config) -> dict[str, Any]:
    """Train, evaluate, normalise and export; returns the summary. Goes on where an earlier call left, if it did.

    Writes ``<run>/reward/{config.yaml, metrics.jsonl, evals/<step>.json, checkpoints/, hf/, peft/, summary.json}``.
    """
    reward = config.reward
    with open_stage(config, "reward") as folder:
        inputs = RewardInputs(config)
        if summary := finished_summary(inputs, folder):
            return summary
        mesh = mesh_of(config)
        share = device_share(reward.batch_size, mesh, key="reward.batch_size")
        source, tokenizer, rows, heldout = inputs.source, inputs.tokenizer, inputs.train, inputs.heldout
        texts_source, texts = inputs.texts_source, inputs.texts
        origin = check_origin(inputs, folder)
        how = computed(reward.model, mesh, key="reward.model")
        model = load_reward_start(source, jax.random.key(config.seed), mesh=mesh, **how)
        positions = Positions(model.arch, "reward.data.max_length")
        normalise = "reward.normalise" if reward.normalise else f"reward.normalise (empty: {texts_source})"
        positions.check({"reward.data.train": rows, "reward.data.eval": heldout, normalise: texts})

        batches = _packed(rows, reward) if reward.pack_length else rows
        order = Order(config.seed, batch_size=reward.batch_size, lengths=batches.lengths, parts=batches.parts)
        total = math.ceil(reward.epochs * order.steps_per_epoch)
        tx, schedule = make_optimizer(reward.optim, updates=total)
        platform = mesh.devices.flat[0].platform
        tokens = float(reward.pack_length or rows.max_completions * rows.lengths.mean())
        slices = reading_slices(share, microbatch=reward.microbatch, tokens=tokens, platform=platform)
        step = make_reward_step(model.score_fn, tx, center_coef=reward.center_coef, accumulation=slices)
        trained, frozen = trainable(model, reward.lora, jax.random.key(config.seed), mesh=mesh, path="reward.lora")
        state, update = start_training(step, tx, trained, mesh=mesh, rules=model.rules, seed=config.seed, frozen=frozen)

        flops = training_flops(model.arch, frozen=frozen is not None)

        def advance(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
            seconds: dict[str, Any] = {}
            with timed(seconds, "seconds/input"):
                batch = shard_batch(batches.batch(order[number]), mesh)
            train, metrics = update(state.train, batch, jax.random.fold_in(state.key, number))
            mask = batch.segments if isinstance(batch, PackedRankingBatch) else batch.mask
            metrics |= seconds | {"flops": flops(mask, 0.0)}
            return state._replace(train=train, cursor=state.cursor + 1), metrics

        score = _evaluator(reward, model, heldout, folder, mesh)
        beside = companions(tokenizer, to_yaml(config), stop=None)
        exported = exported_form(model, reward.export_dtype)
        loop = Loop(
            title="Reward model",
            total=total,
            advance=advance,
            evaluate=lambda state, number: score(exported(combine(state.train.params, frozen)), number),
            batch_of=lambda state, number: batches.batch(order[number])._asdict(),
            max_skipped=reward.max_skipped,
            guards=None,
            canary=None,
            gates=reward.gates,
            learning_rate=schedule,
            rates=(Rate("pairs", "pairs_per_second"), *rates(device_peaks(reward.model.dtype))),
            best_metric="eval/accuracy",
            best_mode="max",
            shown=("loss", "accuracy", "pairs_per_second"),
        )
        outcome = run_loop(
            loop,
            state,
            folder=folder,
            log=reward.log,
            checkpoint=reward.checkpoint,
            metadata=as_metadata(beside) | {"origin": origin.as_json()},
        )
        pass_gates("reward", reward.gates, outcome.last, folder)
        learnt = combine(outcome.state.train.params, frozen)
        model = replace(model, params=exported(learnt))
        if texts is not None:
            model = _normalise(reward, model, texts, texts_source, mesh)
        adapted = learnt | {"head": model.params["head"]}
        write_adapter(model, adapted, reward.lora, folder / "peft", base=source, beside=beside)
        write_export(model, model.params, folder / "hf", beside=beside, dtype=reward.export_dtype)
        summary = {
            **{name.removeprefix("eval/"): value for name, value in outcome.last.items()},
            "gain": model.gain,
            "bias": model.bias,
            "normalised_on": texts_source,
            "steps": total,
            "exported_step": outcome.step,
            "export_dtype": reward.export_dtype,
            "rows": len(rows),
            "skipped": rows.skipped,
            "cut": rows.cut,
            "seconds": outcome.seconds,
            **changed_inputs(origin),
        }
        write_json(folder / "summary.json", summary)
        return summary


def _packed(rows: RankingRows, reward: RewardConfig) -> PackedRankingRows:
    try:
        return pack_rankings(rows, reward.pack_length)
    except ValueError as error:
        raise ConfigError(f"reward.pack_length: all completions of a prompt stand in one row: {error}") from error


def _evaluator(
    reward: RewardConfig, model: RewardModel, heldout: RankingRows | None, folder: Path, mesh: Mesh
) -> Callable[[Params, int], dict[str, float]]:
    """Accuracy, loss, margin and calibration over all held-out pairs, with the "longer wins" baseline beside them.

    ``evals/<step>.json`` gets the calibration bin by bin.
    """
    if heldout is None:
        return lambda params, number: {}
    score = jax.jit(lambda params, batch: score_completions(model.score_fn, params, batch))
    rows, batch_size = heldout, device_multiple(reward.batch_size, mesh)

    def evaluate(params: Params, number: int) -> dict[str, float]:
        parts = []
        for indices, real in covering_batches(rows.lengths, batch_size=batch_size, limit=reward.log.eval_rows):
            batch = rows.batch(indices)
            scores = fetch(score(params, shard_batch(batch, mesh)))
            ranks, valid, lengths = (np.asarray(x) for x in (batch.ranks, batch.valid, batch.mask.sum(axis=-1)))
            parts.append(ordered_differences(ranks, valid & real[:, None], scores, lengths))
        margins, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        if is_first():
            (folder / "evals").mkdir(exist_ok=True)
        write_json(folder / "evals" / f"{number:06d}.json", {"calibration": calibration_bins(margins)})
        return {f"eval/{name}": value for name, value in pair_metrics(margins, lengths).items()}

    return evaluate


def ordered_differences(
    ranks: Int[np.ndarray, "B K"], valid: Bool[np.ndarray, "B K"], *columns: Shaped[np.ndarray, "B K"]
) -> tuple[np.ndarray, ...]:
    """For each column its value at the better completion minus that at the worse, over all strictly ordered pairs."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    row, winner, loser = np.nonzero(better)
    return tuple(column[row, winner] - column[row, loser] for column in columns)


def pair_metrics(margins: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How well scores order pairs, given the differences in score and in length (better minus worse)."""
    by_length = accuracy_by_length_difference(margins, lengths, edges=(0, 1))
    names = {-np.inf: "shorter", 0.0: "as_long", 1.0: "longer"}
    return {
        "accuracy": pair_accuracy(margins),
        "loss": float(np.mean(np.logaddexp(0.0, -margins))),
        "margin": float(np.mean(margins)),
        "ece": expected_calibration_error(margins, bins=10),
        "longer_wins_accuracy": longer_wins_accuracy(lengths),
        "pairs": float(len(margins)),
    } | {f"accuracy_better_is_{names[part.low]}": part.accuracy for part in by_length}


def calibration_bins(margins: np.ndarray) -> list[dict[str, float]]:
    """``reliability_curve`` as JSON, in the ten bins of the calibration error."""
    curve = reliability_curve(margins, bins=10)
    return [
        {"confidence": float(confidence), "accuracy": float(accuracy), "pairs": int(pairs)}
        for confidence, accuracy, pairs in zip(*curve, strict=True)
    ]


def _normalise(reward: RewardConfig, model: RewardModel, texts: TextRows, source: str, mesh: Mesh) -> RewardModel:
    """Mean 0 and standard deviation 1 on those texts, so that beta means the same in every run."""
    batch_size, show_progress = reward.batch_size, reward.log.progress
    model = replace(model, reading=STOP_TOKEN)
    scores = score_texts(model, texts, mesh=mesh, batch_size=batch_size, show_progress=show_progress)
    spread = float(scores.std())
    if not spread > 0:
        raise ValueError(f"reward.normalise: all {len(scores)} texts of {source} have the same score")
    return normalise_reward(model, gain=1.0 / spread, bias=-float(scores.mean()) / spread)
