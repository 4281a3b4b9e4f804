"""Stage 1: supervised fine-tuning (SFT) teaches a pretrained model to answer."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, PlanConfig, SFTConfig
from jrlhf.core import combine
from jrlhf.data import Order, PromptRows, SFTRows, load_prompts, load_sft, pack_sft
from jrlhf.models import Pretrained, load_pretrained, merge_adapters
from jrlhf.parallel import fetch, is_first, shard_batch
from jrlhf.parallel.devices.peaks import device_peaks
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.planning import sampling_program
from jrlhf.rollout.safety import load_safety_prompts, make_safety
from jrlhf.rollout.samples import make_sample_writer
from jrlhf.rollout.sampling import GenerateFn, answers, jit_generate
from jrlhf.runs.exports import exported_form
from jrlhf.runs.folder import model_source
from jrlhf.runs.inputs import SAFETY, RowsInput, StageInputs, with_sources
from jrlhf.stages.run import run_stage
from jrlhf.stages.stage import Export, Prepared, Stage, load_language
from jrlhf.steps import make_sft_eval, make_sft_step
from jrlhf.system.lines import json_line, write_text
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
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import Params, SFTBatch


def run_sft(config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate and export a model with SFT; return the stage's summary. See ``run_stage``.

    The stage also writes ``samples.jsonl``. With ``sft.candidate_prompts`` it writes ``candidates.jsonl``, and with
    ``safety.prompts`` it writes ``safety/<step>.jsonl``.
    """
    return run_stage(SFT, config, on_event=on_event)


class SFTInputs(StageInputs):
    """The base model, the rows and the prompts of SFT."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "sft")
        self._sft = config.sft

    @cached_property
    def source(self) -> str:
        return model_source(self.config, self._sft.model.path, key="sft.model.path", before=())

    @cached_property
    def train(self) -> SFTRows:
        return load_sft(self._sft.data, self._sft.data.train, self.tokenizer, train_on=self._sft.train_on)

    @cached_property
    def heldout(self) -> SFTRows | None:
        data = self._sft.data
        return load_sft(data, data.eval, self.tokenizer, train_on=self._sft.train_on) if data.eval else None

    @cached_property
    def candidate_prompts(self) -> PromptRows | None:
        """Prompts for which the model samples candidates to rank."""
        source = self._sft.candidate_prompts
        return load_prompts(self._sft.data, source, self.tokenizer) if source else None

    @cached_property
    def safety_prompts(self) -> PromptRows | None:
        return load_safety_prompts(self.config, self._sft.data, self.tokenizer)

    def rows(self) -> Mapping[str, RowsInput]:
        data = self._sft.data
        return with_sources(
            {
                "sft.data.train": RowsInput(data.train, lambda: self.train),
                "sft.data.eval": RowsInput(data.eval, lambda: self.heldout),
                "sft.candidate_prompts": RowsInput(self._sft.candidate_prompts, lambda: self.candidate_prompts),
                SAFETY: RowsInput(self.config.safety.prompts, lambda: self.safety_prompts),
            }
        )


class SFTPrograms(NamedTuple):
    """The jitted functions of the stage."""

    training: Training
    losses: Any
    """``(params, batch) -> (sum of negative log-likelihoods, tokens)`` for held-out rows."""
    schedule: optax.Schedule


def build_sft(config: Config, model: Pretrained, mesh: Mesh, *, slices: int, updates: int) -> SFTPrograms:
    """Build the programs that a run executes and a plan compiles; a device reads its rows in ``slices`` slices."""
    sft = config.sft
    tx, schedule = make_optimizer(sft.optim, updates=updates)
    step = make_sft_step(model.logprob_fn, tx, accumulation=slices)
    trained, frozen = trainable(model, sft.lora, stream_key(config.seed, "sft", "lora"), mesh=mesh, path="sft.lora")
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=model.rules)
    return SFTPrograms(training, jit_for(mesh, make_sft_eval(model.logprob_fn)), schedule)


def check_sft(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if the batch does not divide over the devices."""
    device_share(config.sft.batch_size, mesh, key="sft.batch_size")


def prepare_sft(site: Site, inputs: SFTInputs) -> Prepared:
    """Load the base model, and build the programs and the loop."""
    config, mesh, tokenizer = site.config, site.mesh, site.tokenizer
    sft, rows, heldout, candidates = config.sft, inputs.train, inputs.heldout, inputs.candidate_prompts
    shown = heldout.prompts(min(sft.log.samples, len(heldout)), tokenizer) if heldout and sft.log.samples else None
    model = load_pretrained(
        inputs.source, mesh=mesh, **compute_options(sft.model, mesh, key="sft.model", frozen=sft.lora.rank > 0)
    )
    positions = Positions(model.arch, "sft.data.max_length")
    positions.check({"sft.data.train": rows, "sft.data.eval": heldout})
    answering = positions.answering(sft.sampling, "sft.sampling")
    answering.check({"sft.candidate_prompts": candidates, "sft.log.samples (of sft.data.eval)": shown})

    batches = pack_sft(rows, sft.pack_length) if sft.pack_length else rows
    order = Order(config.seed, batch_size=sft.batch_size, lengths=batches.lengths, parts=batches.parts)
    total = math.ceil(sft.epochs * order.steps_per_epoch)
    share, tokens = device_share(sft.batch_size, mesh, key="sft.batch_size"), float(batches.lengths.mean())
    slices = reading_slices(share, microbatch=sft.microbatch, tokens=tokens, platform=mesh.devices.flat[0].platform)
    programs = build_sft(config, model, mesh, slices=slices, updates=total)
    frozen = programs.training.frozen
    flops = training_flops(model.arch, frozen=frozen is not None)

    steps = row_steps(
        programs.training, batches, order, mesh, flops=lambda batch, metrics: flops(batch.mask, metrics["tokens"])
    )
    generate = jit_generate(model.decode_fns, sft.sampling, tokenizer, mesh, option="sft.sampling")
    samples = make_sample_writer(site, shown, generate, batch_size=sft.batch_size)
    score = _evaluator(sft, programs.losses, heldout, mesh)
    safety = make_safety(site, inputs.safety_prompts, generate, batch_size=sft.batch_size, positions=answering)
    exported = exported_form(model, sft.export_dtype)

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        params = exported(combine(state.train.params, frozen))
        samples(params, number)
        return score(params) | safety(params, number)

    def export(outcome: Outcome) -> Export:
        learnt = combine(outcome.state.train.params, frozen)
        params = merge_adapters(exported(learnt), model.exact)
        if candidates is not None:
            several = jit_generate(
                model.decode_fns, sft.sampling, tokenizer, mesh, option="sft.sampling", samples=sft.candidates
            )
            _write_candidates(site, several, params, candidates)
        figures = {
            "base_nll": outcome.first.get("eval/nll"),
            "heldout_nll": outcome.last.get("eval/nll"),
            "steps": total,
            "rows": len(rows),
            "skipped": rows.skipped,
            "cut": rows.cut,
        }
        return Export(model, params, learnt, figures)

    loop = Loop(
        title="SFT",
        total=total,
        advance=steps.advance,
        evaluate=evaluate,
        batch_of=steps.batch_of,
        max_skipped=sft.max_skipped,
        guards=None,
        canary=None,
        gates=sft.gates,
        learning_rate=programs.schedule,
        rates=(Rate("tokens", "tokens_per_second"), *rates(device_peaks(sft.model.dtype))),
        best_metric="eval/nll",
        best_mode="min",
        shown=("loss", "tokens_per_second"),
    )
    return Prepared(loop, begin(programs.training, mesh=mesh, key=stream_key(config.seed, "sft", "train")), export)


def _evaluator(
    sft: SFTConfig, losses: Any, heldout: SFTRows | None, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Return a function that computes the held-out negative log-likelihood per token, in nats."""
    if heldout is None:
        return lambda params: {}
    rows, batch_size = heldout, device_multiple(sft.batch_size, mesh)

    def evaluate(params: Params) -> dict[str, float]:
        parts = []
        for indices, real in covering_batches(rows.lengths, batch_size=batch_size, limit=sft.log.eval_rows):
            batch: SFTBatch = rows.batch(indices)
            batch = batch._replace(loss_mask=batch.loss_mask & real[:, None])
            parts.append(losses(params, shard_batch(batch, mesh)))
        nll, tokens = (float(sum(x)) for x in zip(*fetch(parts), strict=True))
        return {"eval/nll": nll / max(tokens, 1.0), "eval/perplexity": math.exp(min(nll / max(tokens, 1.0), 80.0))}

    return evaluate


def _write_candidates(site: Site, generate: GenerateFn, params: Params, prompts: PromptRows) -> None:
    """Write several answers to each prompt for people to rank; with ``"ranks"`` a row becomes a row of reward data."""
    sft = site.config.sft
    texts = answers(
        generate,
        params,
        prompts,
        site.tokenizer,
        samples=sft.candidates,
        key=stream_key(site.config.seed, "sft", "candidates"),
        mesh=site.mesh,
        batch_size=sft.batch_size,
        show_progress=sft.log.progress,
    )
    rows = (row | {"completions": completions} for row, completions in zip(prompts.shown, texts, strict=True))
    if is_first():
        write_text(site.folder / "candidates.jsonl", "".join(map(json_line, rows)))


def plan_sft(config: PlanConfig, target: Target) -> Sized:
    """Plan the start, the update and, if the config has their data, the evaluation and the sampling of answers."""
    sft = config.sft
    length = sft.pack_length or sft.data.max_length
    share = device_share(sft.batch_size, target.mesh, key="sft.batch_size")
    platform = target.topology.platform()
    slices = reading_slices(share, microbatch=sft.microbatch, tokens=float(length), platform=platform)
    source = planned_source(config, sft.model.path, key="sft.model.path", before=())
    model = planned_model(target, source, sft.model, key="sft.model", kind="language", frozen=sft.lora.rank > 0)
    Positions(model.arch, key := "sft.data.max_length").check_length(sft.data.max_length, key=key)
    programs = build_sft(config, model, target.mesh, slices=slices, updates=PLANNED_UPDATES)
    run, frozen = planned_training(programs.training, target, loaded=()), programs.training.frozen
    whole, traffic = combine(run.state.params, frozen), 2 * device_bytes(run.state.params, run.state.opt_state)
    row_flops = training_flops(model.arch, frozen=frozen is not None)(
        jnp.ones((1, length), jnp.bool_), jnp.float32(length)
    )

    def build(rows: int) -> StagePlan:
        batch = rows * slices * target.groups
        text = target.text(batch, length, packed=bool(sft.pack_length))
        parts = [run.start, run.update(text, flops=float(row_flops) * batch, read=traffic)]
        if sft.data.eval:
            args = whole, target.text(batch, sft.data.max_length)
            parts.append(Program("evaluation", programs.losses, args, alive=(run.held, args), timed=False))
        samples = batch if sft.candidate_prompts else min(batch, sft.log.samples) if sft.data.eval else 0
        if samples:
            prompts, prompt = device_multiple(samples, target.mesh), sft.data.max_length
            where: dict[str, Any] = {"rows": prompts, "prompt": prompt, "target": target, "held": run.held}
            parts.append(sampling_program("answers", model, whole, sft.sampling, **where)._replace(timed=False))
        return StagePlan("sft", "sft.batch_size", batch, run.held, tuple(parts))

    return Sized(share // slices, sft.model.dtype, build)


SFT = Stage(
    name="sft",
    label="SFT",
    charts={
        "Loss, nats per token": ("loss", "eval/nll"),
        "Refusals, where wanted and where not": ("eval/refusal_rate", "eval/benign_refusal_rate"),
        "Learning rate": ("lr",),
        "Tokens a second": ("tokens_per_second",),
    },
    inputs=SFTInputs,
    check=check_sft,
    prepare=prepare_sft,
    start=load_language,
    trained_part=lambda config: "train/params",
    stop=lambda config: config.sft.sampling.stop,
    plan=plan_sft,
)
