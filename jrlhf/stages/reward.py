"""Stage 2 trains a reward model on people's rankings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, PlanConfig, RewardConfig, stages_before
from jrlhf.core import combine
from jrlhf.data import Order, RankingRows, TextRows, load_rankings, load_texts
from jrlhf.models import RewardModel
from jrlhf.models.abstract import abstract_reward
from jrlhf.models.reading import STOP_TOKEN
from jrlhf.models.reward import load_reward_start, normalise_reward
from jrlhf.parallel import fetch, is_first, shard_batch
from jrlhf.parallel.devices.peaks import device_peaks
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.reward_models import score_texts
from jrlhf.runs.exports import exported_form
from jrlhf.runs.folder import model_source, stage_folder, write_json
from jrlhf.runs.inputs import RowsInput, StageInputs, with_sources
from jrlhf.stages.rankings import packed_or_plain, planned_rankings, rankings, row_tokens
from jrlhf.stages.reward_figures import calibration_bins, ordered_differences, pair_metrics
from jrlhf.stages.run import run_stage
from jrlhf.stages.stage import Export, Prepared, Stage
from jrlhf.steps import make_reward_step, score_completions
from jrlhf.system.errors import UsageError
from jrlhf.train.attempt import Loop, OnEvent, Outcome, no_event
from jrlhf.train.batches import covering_batches, device_multiple, device_share, reading_slices
from jrlhf.train.keys import stream_key
from jrlhf.train.lora import trainable
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import rates, training_flops
from jrlhf.train.positions import Positions
from jrlhf.train.programs import (
    PLANNED_UPDATES,
    Program,
    Sized,
    StagePlan,
    Target,
    device_bytes,
    planned_model,
    planned_source,
    planned_training,
)
from jrlhf.train.rows import row_steps
from jrlhf.train.site import Site
from jrlhf.train.start import Training, begin, build_training, compute_options
from jrlhf.train.window import Rate
from jrlhf.types import PackedRankingBatch, Params


def run_reward(config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate, normalise and export a reward model; return the stage's summary. See ``run_stage``.

    The stage also writes the calibration on held-out pairs, bin by bin, to ``evals/<step>.json``.
    """
    return run_stage(REWARD, config, on_event=on_event)


class RewardInputs(StageInputs):
    """The base model, the rankings and the normalisation texts of the reward stage."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "reward")
        self._reward = config.reward

    @cached_property
    def source(self) -> str:
        before = stages_before(self.config, self.stage, "language")
        return model_source(self.config, self._reward.model.path, key="reward.model.path", before=before)

    @cached_property
    def train(self) -> RankingRows:
        return load_rankings(self._reward.data, self._reward.data.train, self.tokenizer)

    @cached_property
    def heldout(self) -> RankingRows | None:
        data = self._reward.data
        return load_rankings(data, data.eval, self.tokenizer) if data.eval else None

    @cached_property
    def texts_source(self) -> str:
        """Source of texts that normalise scores: ``reward.normalise``, else SFT's candidates, else ``data.eval``."""
        candidates = stage_folder(self.config, "sft") / "candidates.jsonl"
        return self._reward.normalise or (str(candidates) if candidates.exists() else self._reward.data.eval)

    @cached_property
    def texts(self) -> TextRows | None:
        # A sampled answer may be empty or no valid text, so such rows are counted and skipped.
        data, source = replace(self._reward.data, on_bad_row="skip"), self.texts_source
        return load_texts(data, source, self.tokenizer) if source else None

    def rows(self) -> Mapping[str, RowsInput]:
        data = self._reward.data
        return with_sources(
            {
                "reward.data.train": RowsInput(data.train, lambda: self.train),
                "reward.data.eval": RowsInput(data.eval, lambda: self.heldout),
                "reward.normalise": RowsInput(self.texts_source, lambda: self.texts),
            }
        )


class RewardPrograms(NamedTuple):
    """The jitted functions of the stage."""

    training: Training
    score: Any
    """``(params, batch) -> scores [B, K]`` for held-out rankings."""
    schedule: optax.Schedule


def build_reward(config: Config, model: RewardModel, mesh: Mesh, *, slices: int, updates: int) -> RewardPrograms:
    """Build the programs that a run executes and a plan compiles; a device reads its prompts in ``slices`` slices."""
    reward = config.reward
    tx, schedule = make_optimizer(reward.optim, updates=updates)
    step = make_reward_step(model.score_fn, tx, center_coef=reward.center_coef, accumulation=slices)
    trained, frozen = trainable(
        model, reward.lora, stream_key(config.seed, "reward", "lora"), mesh=mesh, path="reward.lora"
    )
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=model.rules)
    score = jit_for(mesh, lambda params, batch: score_completions(model.score_fn, params, batch))
    return RewardPrograms(training, score, schedule)


def check_reward(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if the batch does not divide over the devices."""
    device_share(config.reward.batch_size, mesh, key="reward.batch_size")


def prepare_reward(site: Site, inputs: RewardInputs) -> Prepared:
    """Load the initial reward model, and build the programs and the loop."""
    config, mesh = site.config, site.mesh
    reward, rows, heldout, texts = config.reward, inputs.train, inputs.heldout, inputs.texts
    options = compute_options(reward.model, mesh, key="reward.model", frozen=reward.lora.rank > 0)
    model = load_reward_start(inputs.source, stream_key(config.seed, "reward", "init"), mesh=mesh, **options)
    positions = Positions(model.arch, "reward.data.max_length")
    normalise = "reward.normalise" if reward.normalise else f"reward.normalise (empty: {inputs.texts_source})"
    positions.check({"reward.data.train": rows, "reward.data.eval": heldout, normalise: texts})

    batches = packed_or_plain(rows, reward.pack_length, key="reward")
    order = Order(config.seed, batch_size=reward.batch_size, lengths=batches.lengths, parts=batches.parts)
    total = math.ceil(reward.epochs * order.steps_per_epoch)
    share = device_share(reward.batch_size, mesh, key="reward.batch_size")
    platform, tokens = mesh.devices.flat[0].platform, row_tokens(rows, reward.pack_length)
    slices = reading_slices(share, microbatch=reward.microbatch, tokens=tokens, platform=platform)
    programs = build_reward(config, model, mesh, slices=slices, updates=total)
    frozen = programs.training.frozen
    flops = training_flops(model.arch, frozen=frozen is not None)

    def flops_of(batch: Any, metrics: dict[str, Any]) -> jax.Array:
        return flops(batch.segments if isinstance(batch, PackedRankingBatch) else batch.mask, 0.0)

    steps = row_steps(programs.training, batches, order, mesh, flops=flops_of)
    score = _evaluator(site, reward, programs.score, heldout)
    exported = exported_form(model, reward.export_dtype)

    def export(outcome: Outcome) -> Export:
        learnt = combine(outcome.state.train.params, frozen)
        final = replace(model, params=exported(learnt))
        if texts is not None:
            final = _normalise(reward, final, texts, inputs.texts_source, mesh)
        figures = {
            **{name.removeprefix("eval/"): value for name, value in outcome.last.items()},
            "gain": final.gain,
            "bias": final.bias,
            "normalised_on": inputs.texts_source,
            "steps": total,
            "rows": len(rows),
            "skipped": rows.skipped,
            "cut": rows.cut,
        }
        return Export(final, final.params, learnt | {"head": final.params["head"]}, figures)

    loop = Loop(
        title="Reward model",
        total=total,
        advance=steps.advance,
        evaluate=lambda state, number: score(exported(combine(state.train.params, frozen)), number),
        batch_of=steps.batch_of,
        max_skipped=reward.max_skipped,
        guards=None,
        canary=None,
        gates=reward.gates,
        learning_rate=programs.schedule,
        rates=(Rate("pairs", "pairs_per_second"), *rates(device_peaks(reward.model.dtype))),
        best_metric="eval/accuracy",
        best_mode="max",
        shown=("loss", "accuracy", "pairs_per_second"),
    )
    return Prepared(loop, begin(programs.training, mesh=mesh, key=stream_key(config.seed, "reward", "train")), export)


def _evaluator(
    site: Site, reward: RewardConfig, score: Any, heldout: RankingRows | None
) -> Callable[[Params, int], dict[str, float]]:
    """Return a function that computes accuracy, loss, margin, calibration and the "longer wins" baseline.

    It covers all held-out pairs and writes the calibration, bin by bin, to ``evals/<step>.json``.
    """
    if heldout is None:
        return lambda params, number: {}
    folder, mesh = site.folder, site.mesh
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


def _normalise(reward: RewardConfig, model: RewardModel, texts: TextRows, source: str, mesh: Mesh) -> RewardModel:
    """Normalise scores to mean 0 and standard deviation 1 on the texts, so that beta has one scale in all runs."""
    batch_size, show_progress = reward.batch_size, reward.log.progress
    model = replace(model, reading=STOP_TOKEN)
    scores = score_texts(model, texts, mesh=mesh, batch_size=batch_size, show_progress=show_progress)
    spread = float(scores.std())
    if not spread > 0:
        raise UsageError(f"reward.normalise: all {len(scores)} texts of {source} have the same score")
    return normalise_reward(model, gain=1.0 / spread, bias=-float(scores.mean()) / spread)


def plan_reward(config: PlanConfig, target: Target) -> Sized:
    """Plan the start, the update and, if there is held-out data, the evaluation."""
    reward, completions = config.reward, config.completions
    longest, packed = reward.data.max_length, reward.pack_length
    share = device_share(reward.batch_size, target.mesh, key="reward.batch_size")
    tokens, platform = float(packed or completions * longest), target.topology.platform()
    slices = reading_slices(share, microbatch=reward.microbatch, tokens=tokens, platform=platform)
    before = stages_before(config, "reward", "language")
    source = planned_source(config, reward.model.path, key="reward.model.path", before=before)
    base = planned_model(target, source, reward.model, key="reward.model", kind=None, frozen=reward.lora.rank > 0)
    Positions(base.arch, key := "reward.data.max_length").check_length(longest, key=key)
    model = abstract_reward(base, target.mesh)
    programs = build_reward(config, model, target.mesh, slices=slices, updates=PLANNED_UPDATES)
    run, frozen = planned_training(programs.training, target, loaded=()), programs.training.frozen
    traffic = 2 * device_bytes(run.state.params, run.state.opt_state)
    row = jnp.ones((1, packed) if packed else (1, completions, longest), jnp.bool_)
    row_flops = training_flops(model.arch, frozen=frozen is not None)(row, jnp.float32(0.0))

    def build(rows: int) -> StagePlan:
        batch = rows * slices * target.groups
        plain = rankings(target, (batch, completions), longest)
        batch_shapes = planned_rankings(target, batch, completions, longest, packed) if packed else plain
        parts = [run.start, run.update(batch_shapes, flops=float(row_flops) * batch, read=traffic)]
        if reward.data.eval:
            args = combine(run.state.params, frozen), plain
            parts.append(Program("evaluation", programs.score, args, alive=(run.held, args), timed=False))
        return StagePlan("reward", "reward.batch_size", batch, run.held, tuple(parts))

    return Sized(share // slices, reward.model.dtype, build)


def load_start(source: str, *, mesh: Mesh, option: str) -> RewardModel:
    """Load the initial model in float32; a checkpoint replaces its head and its weights."""
    return load_reward_start(source, stream_key(0, "reward", "init"), dtype="float32", mesh=mesh, option=option)


REWARD = Stage(
    name="reward",
    label="Reward model",
    charts={
        "Ranking loss": ("loss", "eval/loss"),
        "Pair accuracy": ("accuracy", "eval/accuracy"),
        "Calibration error": ("eval/ece",),
    },
    inputs=RewardInputs,
    check=check_reward,
    prepare=prepare_reward,
    start=load_start,
    trained_part=lambda config: "train/params",
    stop=lambda config: None,
    plan=plan_reward,
)
