"""GRPO and its relatives train the policy on groups of answers to one prompt, without a value network."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, GRPOConfig, PlanConfig
from jrlhf.core import combine
from jrlhf.parallel import batch_sharding
from jrlhf.parallel.devices.peaks import device_peaks
from jrlhf.parallel.step import Step, jit_for
from jrlhf.rollout.actors import Actors, learnt_policy, load_actors, trainable_policy
from jrlhf.rollout.evaluation import has_judge, make_evaluator
from jrlhf.rollout.inputs import RolloutInputs
from jrlhf.rollout.iteration import (
    MAXIMA,
    EpisodeSlices,
    RolloutPrograms,
    make_iteration,
    reading_fn,
    slices_of,
)
from jrlhf.rollout.models import shape_reader, weight_reader
from jrlhf.rollout.planning import (
    check_planned_lengths,
    generation_shapes,
    rollout_program,
    row_work,
    score_program,
)
from jrlhf.rollout.rules import make_rules
from jrlhf.rollout.safety import make_safety
from jrlhf.rollout.sampling import GenerateFn, jit_generate, prompt_readings
from jrlhf.rollout.scores import ScoredAnswers, make_rewards, weights_of
from jrlhf.runs.exports import exported_form
from jrlhf.runs.metrics import PROXY_AND_GOLD
from jrlhf.stages.run import run_stage
from jrlhf.stages.stage import Export, Prepared, Stage, load_language
from jrlhf.steps import GRPOSettings, make_group_targets, make_grpo_step, make_policy_readings
from jrlhf.train.attempt import Loop, OnEvent, Outcome, no_event
from jrlhf.train.batches import groups_of
from jrlhf.train.keys import stream_key
from jrlhf.train.optim import make_policy_optimizer
from jrlhf.train.performance import phase_rates, rates
from jrlhf.train.programs import PLANNED_UPDATES, Program, Sized, StagePlan, Target, device_bytes, planned_training
from jrlhf.train.site import Site
from jrlhf.train.start import Training, begin, build_training
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import Generation, Params, Readings, Rollout


def run_grpo(config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate and export a policy with GRPO; return the stage's summary. See ``run_stage``.

    The stage also writes held-out answers to ``evals/<iteration>.jsonl``, and ``safety/<iteration>.jsonl``.
    """
    return run_stage(GRPO, config, on_event=on_event)


class GRPOPrograms(NamedTuple):
    """The jitted functions of the stage except the sampler and the scores."""

    training: Training
    read: Any
    """``(policy, reference or None, generation) -> Readings``."""
    targets: Any
    """``(scored answers, readings, KL coefficient) -> Rollout``."""
    schedule: optax.Schedule


def build_grpo(config: Config, actors: Actors, mesh: Mesh, *, slices: EpisodeSlices, updates: int) -> GRPOPrograms:
    """Build the programs that a run executes and a plan compiles."""
    grpo = config.grpo
    tx, schedule = make_policy_optimizer(grpo.optim, updates=updates)
    step = make_step(grpo, actors, tx, accumulation=slices.update)
    trained, frozen = trainable_policy(grpo.lora, config.seed, actors, mesh, stage="grpo")
    ema = trained if grpo.ema_decay else None
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=actors.policy.rules, ema=ema)
    read = make_policy_readings(
        reading_fn(actors, actors.policy.logprob_fn, slices=slices.scoring),
        temperature=grpo.sampling.temperature,
        from_sampler=grpo.old_logprobs == "sampler",
    )
    return GRPOPrograms(
        training, jit_for(mesh, read, out_shardings=batch_sharding(mesh)), jit_group_targets(grpo, mesh), schedule
    )


def jit_group_targets(grpo: GRPOConfig, mesh: Mesh) -> Any:
    """Jit ``make_group_targets`` with the settings of a config; its results are sharded by rows."""
    make = make_group_targets(
        samples=grpo.samples,
        baseline=grpo.baseline,
        scale=grpo.scale,
        weights=weights_of(grpo.rewards) if grpo.normalise == "each" else None,
        kl_place=grpo.kl_place,
        kl_estimator=grpo.kl.estimator,
        missing_eos_penalty=grpo.missing_eos_penalty,
        max_new_tokens=grpo.sampling.max_new_tokens,
        overlong_buffer=grpo.overlong_buffer,
        overlong_penalty=grpo.overlong_penalty,
    )

    def targets(answers: ScoredAnswers, readings: Readings, kl_coef: jax.Array) -> Rollout:
        return make(answers.generation, readings, answers.scores, answers.parts, kl_coef)

    return jax.jit(targets, out_shardings=batch_sharding(mesh))


def make_step(grpo: GRPOConfig, actors: Actors, tx: optax.GradientTransformation, *, accumulation: int) -> Step:
    """Build ``make_grpo_step`` from a config, in which 0 turns a setting off where the step expects None."""
    settings = GRPOSettings(
        epochs=grpo.epochs,
        minibatches=grpo.minibatches,
        temperature=grpo.sampling.temperature,
        loss=grpo.loss,
        ratio=grpo.ratio,
        aggregation=grpo.aggregation,
        max_new_tokens=grpo.sampling.max_new_tokens,
        clip=grpo.clip,
        clip_high=grpo.clip_high or grpo.clip,
        kl_estimator=grpo.kl.estimator,
        entropy_coef=grpo.entropy_coef,
        dual_clip=grpo.dual_clip or None,
        leave_out_cut=grpo.leave_out_cut,
        sampler_weight_cap=grpo.weight_cap or None,
        target_approx_kl=grpo.target_approx_kl or None,
        ema_decay=grpo.ema_decay or None,
        accumulation=accumulation,
        drop_padding=actors.packable,
    )
    return make_grpo_step(actors.policy.logprob_fn, tx, settings)


def check_grpo(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if a rule lacks something, or if episodes do not divide over the devices."""
    make_rules(config.grpo.rewards, stage="grpo")
    slices_of(config.grpo, mesh, stage="grpo")


def prepare_grpo(site: Site, inputs: RolloutInputs) -> Prepared:
    """Load the models of GRPO, and build its programs and its loop."""
    config, mesh, grpo = site.config, site.mesh, site.config.grpo
    prompts, heldout = inputs.prompts, inputs.heldout
    models, slices = weight_reader(config, mesh), slices_of(grpo, mesh, stage="grpo")
    actors = load_actors(grpo, "grpo", models, value_from=None, reference=grpo.has_reference)
    for positions in actors.positions(grpo, "grpo"):
        positions.check({"grpo.prompts.train": prompts, "grpo.prompts.eval": heldout})

    programs = build_grpo(config, actors, mesh, slices=slices, updates=grpo.iterations * grpo.epochs * grpo.minibatches)

    def read(params: Params, generation: Generation) -> Readings:
        return programs.read(params, actors.reference, generation)

    def sampler(**at: int) -> GenerateFn:
        return jit_generate(
            actors.policy.decode_fns, grpo.sampling, actors.tokenizer, mesh, option="grpo.sampling", **at
        )

    generate = sampler()
    score = make_rewards(grpo.rewards, actors, mesh, slices=slices.scoring, stage="grpo")
    jitted = RolloutPrograms(
        sampler(samples=grpo.samples, readings=readings_of(grpo, mesh)), read, programs.targets, programs.training.step
    )
    iterate, batch_of = make_iteration(
        site, grpo, actors, jitted, score, prompts, samples=grpo.samples, resample=grpo.resample
    )
    heldout_figures = make_evaluator(site, grpo, actors, generate, heldout, models)
    answering = actors.positions(grpo, "grpo")[0]
    safety = make_safety(site, inputs.safety_prompts, generate, batch_size=grpo.episodes, positions=answering)
    exported = exported_form(actors.policy, grpo.export_dtype)

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        return heldout_figures(state, number) | safety(exported(learnt_policy(state.train)), number)

    def export(outcome: Outcome) -> Export:
        learnt = learnt_policy(outcome.state.train)
        figures = {"before": outcome.first, "after": outcome.last, "iterations": grpo.iterations, "cut": prompts.cut}
        if grpo.has_reference:
            figures["kl_coef"] = np.float32(outcome.state.kl_coef)
        return Export(actors.policy, learnt, learnt, figures)

    peaks = device_peaks(grpo.model.dtype)
    loop = Loop(
        title="GRPO",
        total=grpo.iterations,
        advance=iterate,
        batch_of=batch_of,
        max_skipped=grpo.max_skipped,
        maxima=MAXIMA,
        guards=grpo.guards,
        canary=grpo.canary,
        gates=grpo.gates,
        evaluate=evaluate,
        learning_rate=programs.schedule,
        rates=(Rate("length/tokens", "tokens_per_second"), *rates(peaks), *phase_rates(peaks)),
        best_metric="eval/judge_mean" if has_judge(grpo.canary) else "eval/score_mean",
        best_mode="max",
        shown=("reward/score_mean", "groups/degenerate", "kl", "entropy", "length/mean", "tokens_per_second"),
    )
    key, coef = stream_key(config.seed, "grpo", "train"), grpo.kl.coef
    return Prepared(loop, begin(programs.training, mesh=mesh, key=key, kl_coef=coef), export)


def readings_of(grpo: GRPOConfig, mesh: Mesh) -> int:
    """Return how often a rollout reads each prompt; see ``prompt_readings``."""
    return prompt_readings(grpo.samples, rows=grpo.episodes // grpo.rollout_parts, devices=groups_of(mesh))


def plan_grpo(config: PlanConfig, target: Target) -> Sized:
    """Plan the start, and the rollout, readings, scores and update of an iteration.

    The targets and the evaluation are left out because they need less memory than these.
    """
    grpo, mesh = config.grpo, target.mesh
    slices = slices_of(grpo, mesh, stage="grpo")
    actors = load_actors(grpo, "grpo", shape_reader(config, target), value_from=None, reference=grpo.has_reference)
    check_planned_lengths(grpo, actors, stage="grpo")
    programs = build_grpo(config, actors, mesh, slices=slices, updates=PLANNED_UPDATES)
    # Without a reference the state has taken the policy over, unless it is the base of adapters.
    loaded = actors.reference, [model.params for model in actors.reward_models]
    run = planned_training(programs.training, target, loaded=loaded)
    params = combine(run.state.params, programs.training.frozen)
    work_of_row = row_work(grpo, actors, together=grpo.samples // readings_of(grpo, mesh))
    traffic = 2 * device_bytes(run.state.params, run.state.opt_state) * grpo.epochs * grpo.minibatches

    def build(rows: int) -> StagePlan:
        episodes = rows * slices.update * grpo.minibatches * target.groups
        work = {name: flops * episodes for name, flops in work_of_row.items()}
        at = {"episodes": episodes, "target": target, "held": run.held, "samples": grpo.samples}
        rollout = rollout_program(grpo, actors.policy, params, **at)
        generation = generation_shapes(target, episodes, grpo.prompts.max_length + grpo.sampling.max_new_tokens)
        parts = [run.start, rollout._replace(flops=work["rollout"])]
        args = params, actors.reference, generation
        readings = Program(
            "readings", programs.read, args, (run.held, args), trips=slices.scoring, flops=work["readings"]
        )
        if actors.has_reference or grpo.old_logprobs == "policy":
            parts.append(readings)
        if actors.reward is not None:
            score = score_program(actors, target, generation, slices=slices.scoring, held=run.held)
            parts.append(score._replace(flops=work["scores"]))
        scores = target.rows((episodes,), jnp.float32)
        parts_of_scores: dict[str, Any] = dict.fromkeys(weights_of(grpo.rewards), scores)
        answers = ScoredAnswers(generation, scores, parts_of_scores)
        coef = target.whole(lambda: jnp.float32(0.0))
        rollouts = jax.eval_shape(programs.targets, answers, jax.eval_shape(programs.read, *args), coef)
        batch = jax.tree.map(lambda x: target.rows(x.shape, x.dtype), rollouts)
        figures: dict[str, Any] = {"trips": slices.update, "flops": work["update"], "read": traffic}
        parts.append(run.update(batch, generation, scores, **figures))
        return StagePlan("grpo", "grpo.episodes", episodes, run.held, tuple(parts))

    rows = grpo.episodes // grpo.minibatches // target.groups // slices.update
    return Sized(rows, grpo.model.dtype, build)


GRPO = Stage(
    name="grpo",
    label="GRPO",
    charts={
        "Reward: trained on, and held out": ("reward/score_mean", *PROXY_AND_GOLD),
        "Win rate over the first answers": ("eval/win_rate", "eval/judge_win_rate"),
        "Groups of equal scores, share": ("groups/degenerate",),
        "KL, nats per sequence": ("kl", "eval/kl"),
        "Entropy, nats per token": ("entropy", "eval/entropy"),
        "Answer length, tokens": ("length/mean", "eval/length"),
        "Refusals, where wanted and where not": ("eval/refusal_rate", "eval/benign_refusal_rate"),
        "KL coefficient": ("kl_coef",),
        "Distinct-2": ("eval/distinct2",),
        "Slots that draw tokens, share": ("rollout/occupancy",),
        "Time by phase, share": ("share/rollout", "share/scoring", "share/update", "share/evaluation"),
        "Share of the device's peak": ("perf/mfu", "perf/rollout_bandwidth_share"),
    },
    inputs=lambda config: RolloutInputs(config, config.grpo, "grpo"),
    check=check_grpo,
    prepare=prepare_grpo,
    start=load_language,
    trained_part=lambda config: "train/ema" if config.grpo.ema_decay else "train/params",
    stop=lambda config: config.grpo.sampling.stop,
    plan=plan_grpo,
)
