"""Direct preference optimisation (DPO) and KTO train the policy on people's judgements, without a reward model."""

import logging
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from jrlhf.config import Config, DPOConfig, PlanConfig, stages_before
from jrlhf.config.dpo_check import dpo_advice
from jrlhf.core import combine
from jrlhf.data import Order, PromptRows
from jrlhf.models import Pretrained, load_pretrained, merge_adapters
from jrlhf.parallel import is_first
from jrlhf.parallel.devices.peaks import device_peaks
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.actors import load_actors
from jrlhf.rollout.evaluation import make_evaluator
from jrlhf.rollout.inputs import RolloutInputs
from jrlhf.rollout.models import weight_reader
from jrlhf.rollout.planning import sampling_program
from jrlhf.rollout.rules import make_rules
from jrlhf.rollout.safety import load_safety_prompts, make_safety
from jrlhf.rollout.samples import make_sample_writer
from jrlhf.rollout.sampling import GenerateFn, jit_generate
from jrlhf.runs.exports import exported_form
from jrlhf.runs.folder import model_source
from jrlhf.runs.inputs import SAFETY, RowsInput, StageInputs, with_sources
from jrlhf.runs.metrics import PROXY_AND_GOLD
from jrlhf.stages.dpo_kto import kto_method
from jrlhf.stages.dpo_method import BatchRows, LoadedRows, Method, Reader
from jrlhf.stages.dpo_pairs import pairs_method
from jrlhf.stages.dpo_reference import reference_logprobs
from jrlhf.stages.rankings import planned_preferences, row_tokens
from jrlhf.stages.run import run_stage
from jrlhf.stages.stage import Export, Prepared, Stage, load_language
from jrlhf.steps import answer_logprobs
from jrlhf.train.attempt import Loop, OnEvent, Outcome, no_event
from jrlhf.train.batches import device_multiple, device_share, reading_slices
from jrlhf.train.keys import stream_key
from jrlhf.train.lora import trainable
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import rates, training_flops, training_passes
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

logger = logging.getLogger(__name__)


def run_dpo(config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate and export a policy with DPO; return the stage's summary. See ``run_stage``.

    The stage also writes ``reference.npz``, the log-probs of the initial policy, and ``samples.jsonl``.
    """
    return run_stage(DPO, config, on_event=on_event)


class DPOInputs(StageInputs):
    """The initial policy, the rankings or labelled answers, and the safety prompts of DPO."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "dpo")
        self._dpo = config.dpo

    @cached_property
    def source(self) -> str:
        before = stages_before(self.config, self.stage, "language")
        return model_source(self.config, self._dpo.model.path, key="dpo.model.path", before=before)

    @cached_property
    def train(self) -> LoadedRows:
        return method_of(self._dpo).load(self._dpo.data, self._dpo.data.train, self.tokenizer)

    @cached_property
    def heldout(self) -> LoadedRows | None:
        data = self._dpo.data
        return method_of(self._dpo).load(data, data.eval, self.tokenizer) if data.eval else None

    @cached_property
    def safety_prompts(self) -> PromptRows | None:
        return load_safety_prompts(self.config, self._dpo.data, self.tokenizer)

    @cached_property
    def answering(self) -> RolloutInputs | None:
        """The inputs of the evaluation on held-out prompts; None without these."""
        return RolloutInputs(self.config, self._dpo.answering, "dpo") if self._dpo.prompts.eval else None

    def models(self) -> Mapping[str, Callable[[], str]]:
        return {**super().models(), **({} if self.answering is None else self.answering.models())}

    def rows(self) -> Mapping[str, RowsInput]:
        data, answering = self._dpo.data, self.answering
        own = {
            "dpo.data.train": RowsInput(data.train, lambda: self.train),
            "dpo.data.eval": RowsInput(data.eval, lambda: self.heldout),
            SAFETY: RowsInput(self.config.safety.prompts, lambda: self.safety_prompts),
        }
        if answering is not None:
            own["dpo.prompts.eval"] = RowsInput(self._dpo.prompts.eval, lambda: answering.heldout)
        return with_sources(own)

    def files(self) -> Mapping[str, Callable[[], Path | None]]:
        return {} if self.answering is None else self.answering.files()


def method_of(dpo: DPOConfig) -> Method:
    """Return what the config's loss reads and does."""
    match dpo.loss:
        case "kto":
            return kto_method(dpo)
        case kind:
            return pairs_method(dpo, kind)


class DPOPrograms(NamedTuple):
    """The jitted functions of the stage."""

    training: Training
    logprobs: Any
    """``(params, batch) -> AnswerLogprobs``, for the reference and for held-out rows."""
    schedule: optax.Schedule


def build_dpo(config: Config, model: Pretrained, mesh: Mesh, *, slices: int, updates: int) -> DPOPrograms:
    """Build the programs that a run executes and a plan compiles; a device reads its prompts in ``slices`` slices."""
    dpo = config.dpo
    tx, schedule = make_optimizer(dpo.optim, updates=updates)
    step = method_of(dpo).make_step(model.logprob_fn, tx, slices)
    trained, frozen = trainable(model, dpo.lora, stream_key(config.seed, "dpo", "lora"), mesh=mesh, path="dpo.lora")
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=model.rules)
    logprobs = jit_for(mesh, lambda params, batch: answer_logprobs(model.logprob_fn, params, batch))
    return DPOPrograms(training, logprobs, schedule)


def check_dpo(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if a rule lacks something, or if the batch does not divide over the devices.

    Log a warning about settings that are valid but most likely a mistake.
    """
    if is_first() and (advice := dpo_advice("dpo", config.dpo)):
        logger.warning("%s", advice)
    make_rules(config.dpo.rewards, stage="dpo")
    device_share(config.dpo.batch_size, mesh, key="dpo.batch_size")


def prepare_dpo(site: Site, inputs: DPOInputs) -> Prepared:
    """Load the initial policy, read the log-probs of the reference, and build the programs and the loop."""
    config, mesh, tokenizer = site.config, site.mesh, site.tokenizer
    dpo, rows, heldout = config.dpo, inputs.train, inputs.heldout
    shown = heldout.prompts(min(dpo.log.samples, len(heldout)), tokenizer) if heldout and dpo.log.samples else None
    model = load_pretrained(
        inputs.source, mesh=mesh, **compute_options(dpo.model, mesh, key="dpo.model", frozen=dpo.lora.rank > 0)
    )
    positions = Positions(model.arch, "dpo.data.max_length")
    positions.check({"dpo.data.train": rows, "dpo.data.eval": heldout})
    answering = positions.answering(dpo.sampling, "dpo.sampling")
    answering.check({"dpo.log.samples (of dpo.data.eval)": shown})

    method = method_of(dpo)
    arranged = {"train": method.arrange(rows, dpo.pack_length)}
    if heldout is not None:
        arranged["eval"] = method.arrange(heldout, 0)
    lengths, parts = arranged["train"].lengths, arranged["train"].parts
    order = Order(config.seed, batch_size=dpo.batch_size, lengths=lengths, parts=parts)
    total = math.ceil(dpo.epochs * order.steps_per_epoch)
    share = device_share(dpo.batch_size, mesh, key="dpo.batch_size")
    tokens = row_tokens(arranged["train"].views()[""].plain, dpo.pack_length)
    platform = mesh.devices.flat[0].platform
    slices = reading_slices(share, microbatch=dpo.microbatch, tokens=tokens, platform=platform)
    programs = build_dpo(config, model, mesh, slices=slices, updates=total)
    training, frozen = programs.training, programs.training.frozen
    at_once = dpo.batch_size // slices
    if method.has_reference:
        arranged = _with_reference(site, programs, arranged, drawn=order.drawn(total), at_once=at_once)
    steps = row_steps(training, arranged["train"], order, mesh, flops=_flops_of(method, model, frozen))
    generate = jit_generate(model.decode_fns, dpo.sampling, tokenizer, mesh, option="dpo.sampling")
    samples = make_sample_writer(site, shown, generate, batch_size=dpo.batch_size)
    reader = Reader(programs.logprobs, mesh, at_once, dpo.log.eval_rows)
    score = method.make_figures(arranged["eval"], reader) if heldout is not None else lambda params: {}
    answer_figures = _answer_evaluator(site, inputs.answering, generate)
    safety = make_safety(site, inputs.safety_prompts, generate, batch_size=dpo.batch_size, positions=answering)
    exported = exported_form(model, dpo.export_dtype)

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        params = exported(combine(state.train.params, frozen))
        samples(params, number)
        return score(params) | answer_figures(state, number) | safety(params, number)

    def export(outcome: Outcome) -> Export:
        learnt = combine(outcome.state.train.params, frozen)
        params = merge_adapters(exported(learnt), model.exact)
        figures = {
            **{name.removeprefix("eval/"): value for name, value in outcome.last.items()},
            "steps": total,
            "rows": len(rows),
            "skipped": rows.skipped,
            "cut": rows.cut,
        }
        return Export(model, params, learnt, figures)

    loop = Loop(
        title="DPO",
        total=total,
        advance=steps.advance,
        evaluate=evaluate,
        batch_of=steps.batch_of,
        max_skipped=dpo.max_skipped,
        guards=None,
        canary=None,
        gates=dpo.gates,
        learning_rate=programs.schedule,
        rates=(
            Rate(method.counted, f"{method.counted}_per_second"),
            Rate("tokens", "tokens_per_second"),
            *rates(device_peaks(dpo.model.dtype)),
        ),
        best_metric="eval/accuracy",
        best_mode="max",
        shown=("loss", "accuracy", f"{method.counted}_per_second"),
    )
    return Prepared(loop, begin(training, mesh=mesh, key=stream_key(config.seed, "dpo", "train")), export)


def _flops_of(method: Method, model: Pretrained, frozen: Any) -> Callable[[Any, dict[str, Any]], jax.Array]:
    """Return a function that counts the model FLOPs of a step, from its batch and its metrics."""
    flops, passes = training_flops(model.arch, frozen=frozen is not None), training_passes(frozen is not None)
    return lambda batch, metrics: method.flops(flops, passes, batch, metrics)


def _with_reference(
    site: Site,
    programs: DPOPrograms,
    rows: Mapping[str, BatchRows],
    *,
    drawn: Int[np.ndarray, "M"],
    at_once: int,
) -> dict[str, BatchRows]:
    """Return training and held-out rows with the log-probs of the initial policy, of training rows those ``drawn``."""
    dpo, training = site.config.dpo, programs.training
    # New adapters change nothing yet, so the initial policy is the reference with them too.
    initial = combine(training.trained, training.frozen)
    viewed = {name: {f"{name}{view}": some for view, some in of.views().items()} for name, of in rows.items()}
    which = {"train": drawn}
    if "eval" in rows:
        heldout = len(rows["eval"])
        which["eval"] = np.arange(min(dpo.log.eval_rows or heldout, heldout))
    logprobs = reference_logprobs(
        site,
        dpo.model,
        {name: some for of in viewed.values() for name, some in of.items()},
        lambda batch: programs.logprobs(initial, batch).total,
        which={name: which[part] for part, of in viewed.items() for name in of},
        at_once=at_once,
        progress_bar=dpo.log.progress,
    )
    return {
        name: some.with_reference({view: logprobs[f"{name}{view}"] for view in some.views()})
        for name, some in rows.items()
    }


def _answer_evaluator(
    site: Site, inputs: RolloutInputs | None, generate: GenerateFn
) -> Callable[[RunState, int], dict[str, float]]:
    """Return a function that answers held-out prompts and scores the answers as PPO's evaluation does."""
    if inputs is None:
        return lambda state, number: {}
    section, models = site.config.dpo.answering, weight_reader(site.config, site.mesh)
    actors = load_actors(section, "dpo", models, value_from=None)
    for positions in actors.positions(section, "dpo"):
        positions.check({"dpo.prompts.eval": inputs.heldout})
    return make_evaluator(site, section, actors, generate, inputs.heldout, models)


def plan_dpo(config: PlanConfig, target: Target) -> Sized:
    """Plan the start, the update, the reference and, if there is held-out data, the evaluation and the samples."""
    dpo, method = config.dpo, method_of(config.dpo)
    completions = method.completions(config.completions)
    longest, packed = dpo.data.max_length, dpo.pack_length
    share = device_share(dpo.batch_size, target.mesh, key="dpo.batch_size")
    tokens, platform = float(packed or completions * longest), target.topology.platform()
    slices = reading_slices(share, microbatch=dpo.microbatch, tokens=tokens, platform=platform)
    before = stages_before(config, "dpo", "language")
    source = planned_source(config, dpo.model.path, key="dpo.model.path", before=before)
    model = planned_model(target, source, dpo.model, key="dpo.model", kind="language", frozen=dpo.lora.rank > 0)
    Positions(model.arch, key := "dpo.data.max_length").check_length(longest, key=key)
    programs = build_dpo(config, model, target.mesh, slices=slices, updates=PLANNED_UPDATES)
    run, frozen = planned_training(programs.training, target, loaded=()), programs.training.frozen
    whole, traffic = combine(run.state.params, frozen), 2 * device_bytes(run.state.params, run.state.opt_state)
    one = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), method.planned(target, 1, completions, longest, packed))
    of_row = jnp.float32(packed or completions * longest)
    row_flops = _flops_of(method, model, frozen)(one, {"tokens": of_row})

    def build(rows: int) -> StagePlan:
        batch = rows * slices * target.groups
        update = method.planned(target, batch, completions, longest, packed)
        at_once = rows * target.groups
        parts = list[Program]()
        if method.has_reference:
            read = planned_preferences(target, at_once, completions, longest, packed, reference=False)
            args = combine(programs.training.trained, frozen), read
            parts.append(Program("reference", programs.logprobs, args, alive=(args,), timed=False))
        parts += [run.start, run.update(update, flops=float(row_flops) * batch, read=traffic)]
        if dpo.data.eval:
            args = whole, planned_preferences(target, at_once, completions, longest, 0, reference=False)
            parts.append(Program("evaluation", programs.logprobs, args, alive=(run.held, args), timed=False))
            if dpo.log.samples:
                prompts = device_multiple(min(batch, dpo.log.samples), target.mesh)
                where: dict[str, Any] = {"rows": prompts, "prompt": longest, "target": target, "held": run.held}
                parts.append(sampling_program("answers", model, whole, dpo.sampling, **where)._replace(timed=False))
        return StagePlan("dpo", "dpo.batch_size", batch, run.held, tuple(parts))

    return Sized(share // slices, dpo.model.dtype, build)


DPO = Stage(
    name="dpo",
    label="DPO",
    charts={
        "Preference loss": ("loss", "eval/loss"),
        "Implicit-reward accuracy": ("accuracy", "eval/accuracy"),
        "Implicit-reward margin": ("margin", "eval/margin"),
        "KTO: held-out rewards of desirable and other answers": ("eval/rewards/chosen", "eval/rewards/rejected"),
        "KTO: the point z₀ that answers are held against": ("reference_point", "eval/reference_point"),
        "Held-out log-probs of better and worse answers": ("eval/logprobs/chosen", "eval/logprobs/rejected"),
        "Reward of held-out answers": PROXY_AND_GOLD,
        "Win rate over the first answers": ("eval/win_rate",),
        "KL of held-out answers, nats per sequence": ("eval/kl",),
        "Refusals, where wanted and where not": ("eval/refusal_rate", "eval/benign_refusal_rate"),
    },
    inputs=DPOInputs,
    check=check_dpo,
    prepare=prepare_dpo,
    start=load_language,
    trained_part=lambda config: "train/params",
    stop=lambda config: config.dpo.sampling.stop,
    plan=plan_dpo,
)
