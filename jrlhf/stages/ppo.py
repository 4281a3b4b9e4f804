"""Stage 3: PPO trains the policy on the reward model's scores, with a KL penalty to the SFT policy."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, PlanConfig, PPOConfig
from jrlhf.core import combine
from jrlhf.data import SFTRows, load_sft
from jrlhf.parallel.devices.peaks import device_peaks
from jrlhf.parallel.step import Step
from jrlhf.rollout.actors import Actors, learnt_policy, load_actors, trainable_actors, value_of
from jrlhf.rollout.evaluation import has_judge, make_evaluator
from jrlhf.rollout.inputs import RolloutInputs
from jrlhf.rollout.iteration import (
    MAXIMA,
    EpisodeSlices,
    RolloutPrograms,
    jit_readings,
    jit_targets,
    make_iteration,
    networks_of,
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
from jrlhf.rollout.sampling import jit_generate
from jrlhf.rollout.scores import ScoredAnswers, make_rewards
from jrlhf.runs.exports import exported_form
from jrlhf.runs.inputs import RowsInput, with_sources
from jrlhf.runs.metrics import PROXY_AND_GOLD
from jrlhf.stages.run import run_stage
from jrlhf.stages.stage import Export, Prepared, Stage, load_language
from jrlhf.steps import PPOSettings, make_ppo_step
from jrlhf.train.attempt import Loop, OnEvent, Outcome, no_event
from jrlhf.train.keys import stream_key
from jrlhf.train.optim import make_actor_critic_optimizer
from jrlhf.train.performance import phase_rates, rates
from jrlhf.train.positions import Positions
from jrlhf.train.programs import PLANNED_UPDATES, Program, Sized, StagePlan, Target, device_bytes, planned_training
from jrlhf.train.site import Site
from jrlhf.train.start import Training, begin, build_training
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import Generation, PPOParams, Readings


def run_ppo(config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate and export a policy with PPO; return the stage's summary. See ``run_stage``.

    The stage also writes held-out answers to ``evals/<iteration>.jsonl``, and ``safety/<iteration>.jsonl``.
    """
    return run_stage(PPO, config, on_event=on_event)


class PPOInputs(RolloutInputs):
    """The inputs of an on-policy stage, and the pretraining text of PPO-ptx."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.ppo, "ppo")

    @cached_property
    def ptx(self) -> SFTRows | None:
        """Text for the language-model loss of PPO-ptx; None if its coefficient is 0."""
        ppo = self.config.ppo
        return load_sft(ppo.ptx, ppo.ptx.train, self.tokenizer, train_on="completion") if ppo.ptx_coef else None

    def rows(self) -> Mapping[str, RowsInput]:
        ppo = self.config.ppo
        text = {"ppo.ptx.train": RowsInput(ppo.ptx.train if ppo.ptx_coef else "", lambda: self.ptx)}
        return {**super().rows(), **with_sources(text)}


class PPOPrograms(NamedTuple):
    """The jitted functions of the stage except the sampler and the scores."""

    training: Training
    read: Any
    """``(policy, reference, value, generation) -> Readings``."""
    targets: Any
    """``(scored answers, readings, KL coefficient) -> Rollout``."""
    schedule: optax.Schedule


def build_ppo(config: Config, actors: Actors, mesh: Mesh, *, slices: EpisodeSlices, updates: int) -> PPOPrograms:
    """Build the programs that a run executes and a plan compiles."""
    ppo = config.ppo
    tx, schedule = make_actor_critic_optimizer(ppo.optim, value_lr=ppo.value_lr, updates=updates)
    step = make_step(ppo, actors, tx, accumulation=slices.update)
    trained, frozen = trainable_actors(ppo.lora, config.seed, actors, mesh, stage="ppo")
    ema = trained.policy if ppo.ema_decay else None
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=actors.policy.rules, ema=ema)
    read = jit_readings(ppo, actors, mesh, slices=slices.scoring)
    return PPOPrograms(training, read, jit_targets(ppo, mesh), schedule)


def make_step(ppo: PPOConfig, actors: Actors, tx: optax.GradientTransformation, *, accumulation: int) -> Step:
    """Build ``make_ppo_step`` from a config, in which 0 turns a setting off where the step expects None."""
    settings = PPOSettings(
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        temperature=ppo.sampling.temperature,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        value_coef=ppo.value_coef,
        entropy_coef=ppo.entropy_coef,
        dual_clip=ppo.dual_clip or None,
        ptx_coef=ppo.ptx_coef,
        target_approx_kl=ppo.target_approx_kl or None,
        critic_warmup_updates=ppo.critic_warmup * ppo.epochs * ppo.minibatches,
        sampler_weight_cap=ppo.weight_cap or None,
        ema_decay=ppo.ema_decay or None,
        accumulation=accumulation,
        drop_padding=actors.packable,
    )
    return make_ppo_step(networks_of(actors), tx, settings)


def check_ppo(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if a rule lacks something, or if episodes do not divide over the devices."""
    make_rules(config.ppo.rewards, stage="ppo")
    slices_of(config.ppo, mesh, stage="ppo")


def prepare_ppo(site: Site, inputs: PPOInputs) -> Prepared:
    """Load the models of PPO, and build its programs and its loop."""
    config, mesh = site.config, site.mesh
    ppo, prompts, heldout, ptx = config.ppo, inputs.prompts, inputs.heldout, inputs.ptx
    models, slices = weight_reader(config, mesh), slices_of(config.ppo, mesh, stage="ppo")
    actors = load_actors(ppo, "ppo", models, value_from=ppo.value_from)
    Positions(actors.policy.arch, "ppo.ptx.max_length").check({"ppo.ptx.train": ptx})
    for positions in actors.positions(ppo, "ppo"):
        positions.check({"ppo.prompts.train": prompts, "ppo.prompts.eval": heldout})

    updates = ppo.iterations * ppo.epochs * ppo.minibatches
    programs = build_ppo(config, actors, mesh, slices=slices, updates=updates)

    def read(params: PPOParams, generation: Generation) -> Readings:
        return programs.read(params.policy, actors.policy.params, params.value, generation)

    generate = jit_generate(actors.policy.decode_fns, ppo.sampling, actors.tokenizer, mesh, option="ppo.sampling")
    score = make_rewards(ppo.rewards, actors, mesh, slices=slices.scoring, stage="ppo")
    jitted = RolloutPrograms(generate, read, programs.targets, programs.training.step)
    iterate, batch_of = make_iteration(site, ppo, actors, jitted, score, prompts, ptx=ptx)
    heldout_figures = make_evaluator(site, ppo, actors, generate, heldout, models)
    answering = actors.positions(ppo, "ppo")[0]
    safety = make_safety(site, inputs.safety_prompts, generate, batch_size=ppo.episodes, positions=answering)
    exported = exported_form(actors.policy, ppo.export_dtype)

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        return heldout_figures(state, number) | safety(exported(learnt_policy(state.train)), number)

    def export(outcome: Outcome) -> Export:
        learnt = learnt_policy(outcome.state.train)
        figures = {
            "before": outcome.first,
            "after": outcome.last,
            "iterations": ppo.iterations,
            "kl_coef": np.float32(outcome.state.kl_coef),
            "cut": prompts.cut,
        }
        return Export(actors.policy, learnt, learnt, figures)

    peaks = device_peaks(ppo.model.dtype)
    loop = Loop(
        title="PPO",
        total=ppo.iterations,
        advance=iterate,
        batch_of=batch_of,
        max_skipped=ppo.max_skipped,
        maxima=MAXIMA,
        guards=ppo.guards,
        canary=ppo.canary,
        gates=ppo.gates,
        evaluate=evaluate,
        learning_rate=programs.schedule,
        rates=(Rate("length/tokens", "tokens_per_second"), *rates(peaks), *phase_rates(peaks)),
        best_metric="eval/judge_mean" if has_judge(ppo.canary) else "eval/score_mean",
        best_mode="max",
        shown=("reward/score_mean", "kl", "entropy", "length/mean", "tokens_per_second"),
    )
    return Prepared(
        loop,
        begin(programs.training, mesh=mesh, key=stream_key(config.seed, "ppo", "train"), kl_coef=ppo.kl.coef),
        export,
    )


def plan_ppo(config: PlanConfig, target: Target) -> Sized:
    """Plan the start, and the rollout, readings, scores and update of an iteration.

    The targets and the evaluation are left out because they need less memory than these.
    """
    ppo, mesh = config.ppo, target.mesh
    slices = slices_of(ppo, mesh, stage="ppo")
    actors = load_actors(ppo, "ppo", shape_reader(config, target), value_from=ppo.value_from)
    check_planned_lengths(ppo, actors, stage="ppo")
    if ppo.ptx_coef:
        key = "ppo.ptx.max_length"
        Positions(actors.policy.arch, key).check_length(ppo.ptx.max_length, key=key)
    programs = build_ppo(config, actors, mesh, slices=slices, updates=PLANNED_UPDATES)
    loaded = actors.policy.params, [model.params for model in actors.reward_models], value_of(actors).params
    run = planned_training(programs.training, target, loaded=loaded)
    params: PPOParams = combine(run.state.params, programs.training.frozen)
    work_of_row = row_work(ppo, actors, text_length=ppo.ptx.max_length if ppo.ptx_coef else 0)
    traffic = 2 * device_bytes(run.state.params, run.state.opt_state) * ppo.epochs * ppo.minibatches

    def build(rows: int) -> StagePlan:
        episodes = rows * slices.update * ppo.minibatches * target.groups
        work = {name: flops * episodes for name, flops in work_of_row.items()}
        rollout = rollout_program(ppo, actors.policy, params.policy, episodes=episodes, target=target, held=run.held)
        generation = generation_shapes(target, episodes, ppo.prompts.max_length + ppo.sampling.max_new_tokens)
        parts = [run.start, rollout._replace(flops=work["rollout"])]
        args = params.policy, actors.policy.params, params.value, generation
        alive = (run.held, args)
        parts.append(Program("readings", programs.read, args, alive, trips=slices.scoring, flops=work["readings"]))
        if actors.reward is not None:
            score = score_program(actors, target, generation, slices=slices.scoring, held=run.held)
            parts.append(score._replace(flops=work["scores"]))
        scores = target.rows((episodes,), jnp.float32)
        coef = target.whole(lambda: jnp.float32(0.0))
        readings = jax.eval_shape(programs.read, *args)
        rollouts = jax.eval_shape(programs.targets, ScoredAnswers(generation, scores, {}), readings, coef)
        batch = jax.tree.map(lambda x: target.rows(x.shape, x.dtype), rollouts)
        batch = batch._replace(ptx=target.text(episodes, ppo.ptx.max_length) if ppo.ptx_coef else None)
        figures: dict[str, Any] = {"trips": slices.update, "flops": work["update"], "read": traffic}
        parts.append(run.update(batch, generation, scores, **figures))
        return StagePlan("ppo", "ppo.episodes", episodes, run.held, tuple(parts))

    rows = ppo.episodes // ppo.minibatches // target.groups // slices.update
    return Sized(rows, ppo.model.dtype, build)


PPO = Stage(
    name="ppo",
    label="PPO",
    charts={
        "Reward: trained on, and held out": ("reward/score_mean", *PROXY_AND_GOLD),
        "Win rate over the first answers": ("eval/win_rate", "eval/judge_win_rate"),
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
    inputs=PPOInputs,
    check=check_ppo,
    prepare=prepare_ppo,
    start=load_language,
    trained_part=lambda config: "train/ema" if config.ppo.ema_decay else "train/params/policy",
    stop=lambda config: config.ppo.sampling.stop,
    plan=plan_ppo,
)
