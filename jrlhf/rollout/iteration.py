"""One iteration of an on-policy stage: rollout, scoring and update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import PPOConfig, RolloutConfig
from jrlhf.core import combine, update_kl_coef
from jrlhf.data import Order, PromptRows, SFTRows
from jrlhf.parallel import batch_sharding, fetch, shard_batch
from jrlhf.parallel.step import Step, jit_for
from jrlhf.rollout.actors import Actors, value_of
from jrlhf.rollout.drawing import make_drawing, make_resampling
from jrlhf.rollout.sampling import GenerateFn
from jrlhf.rollout.scores import Rewards, ScoredAnswers, part_metrics
from jrlhf.rollout.slots import log_slots, rollout_occupancy
from jrlhf.rollout.work import iteration_work
from jrlhf.steps import (
    Networks,
    group_metrics,
    make_readings,
    make_targets,
    rollout_metrics,
    separate,
    shared,
    without_padding,
)
from jrlhf.train.batches import device_share, gradient_slices
from jrlhf.train.performance import timed
from jrlhf.train.site import Site
from jrlhf.train.state import RunState
from jrlhf.types import Generation, Metrics, Params, Readings, Rollout, SFTBatch

Iteration = Callable[[RunState, int], tuple[RunState, dict[str, Any]]]
BatchOf = Callable[[RunState, int], dict[str, np.ndarray]]

DEFAULT_READING_SLICES = 8
"""Default number of slices in which a device reads episodes; slices of padding alone are skipped."""


MAXIMA = (
    "policy/ratio_max",
    "policy/max_abs_log_ratio",
    "policy/first_minibatch_max_abs_log_ratio",
    "sampler/max_abs_logprob_diff",
    "sampler/weight_max",
)
"""The metrics of an iteration that are maxima over its tokens, from the step and from the rollout."""


def episode_slices(section: RolloutConfig, rows: int, mesh: Mesh, *, key: str) -> int:
    """Return the number of equal slices in which a device reads ``rows`` episodes; see ``gradient_slices``."""
    share = device_share(rows, mesh, key=key)
    return gradient_slices(share, microbatch=section.microbatch or max(1, share // DEFAULT_READING_SLICES))


class EpisodeSlices(NamedTuple):
    """The numbers of slices in which a device reads its episodes."""

    scoring: int
    """Number of slices of a rollout, for scores and readings."""
    update: int
    """Number of slices of a minibatch, for the update."""


def slices_of(section: RolloutConfig, mesh: Mesh, *, stage: str) -> EpisodeSlices:
    """Return the slices of a stage. Raise ConfigError if episodes or minibatches do not divide over the devices."""
    episodes, minibatches = section.episodes, section.minibatches
    scoring = episode_slices(section, episodes, mesh, key=f"{stage}.episodes")
    update = episode_slices(section, episodes // minibatches, mesh, key=f"{stage}.episodes / {stage}.minibatches")
    return EpisodeSlices(scoring, update)


def reading_fn(actors: Actors, fn: Callable[..., Any], *, slices: int) -> Any:
    """Return ``fn`` without padding if the models support it, for readings that need no gradient."""
    return without_padding(fn, slices=slices) if actors.packable else fn


def networks_of(actors: Actors, *, slices: int | None = None) -> Networks:
    """Return policy and value network; with ``slices`` they read that many slices without padding or gradients."""

    def reading(fn: Callable[..., Any]) -> Any:
        return fn if slices is None else reading_fn(actors, fn, slices=slices)

    if actors.shared:
        return shared(reading(actors.policy.actor_critic_fn))
    return separate(reading(actors.policy.logprob_fn), reading(value_of(actors).score_fn))


def jit_readings(ppo: PPOConfig, actors: Actors, mesh: Mesh, *, slices: int) -> Callable[..., Readings]:
    """Jit ``make_readings`` with the settings of a config; its results are sharded by rows."""
    read = make_readings(
        networks_of(actors, slices=slices),
        temperature=ppo.sampling.temperature,
        from_sampler=ppo.old_logprobs == "sampler",
    )
    return jit_for(mesh, read, out_shardings=batch_sharding(mesh))


def jit_targets(ppo: PPOConfig, mesh: Mesh) -> Callable[..., Rollout]:
    """Jit ``make_targets`` with the settings of a config; its results are sharded by rows."""
    make = make_targets(
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_estimator=ppo.kl.estimator,
        missing_eos_penalty=ppo.missing_eos_penalty,
        whiten_rewards=ppo.whiten_rewards,
    )

    def targets(answers: ScoredAnswers, readings: Readings, kl_coef: jax.Array) -> Rollout:
        return make(answers.generation, readings, answers.scores, kl_coef)

    return jax.jit(targets, out_shardings=batch_sharding(mesh))


class RolloutPrograms(NamedTuple):
    """The jitted functions of an iteration."""

    generate: GenerateFn
    """The sampler, with all answers of a rollout to each prompt, which is read ``prompt_readings`` times."""
    read: Callable[[Params, Generation], Readings]
    """``(all parameters of the stage, generation) -> Readings`` of the answers."""
    targets: Callable[[ScoredAnswers, Readings, jax.Array], Rollout]
    """``(scored answers, readings, KL coefficient) -> Rollout``."""
    update: Step
    """The training step on a rollout."""


class Collected(NamedTuple):
    """A rollout and its metrics, the answers of its first draw, and those of further draws."""

    rollout: Rollout
    metrics: dict[str, Any]
    first: Generation
    further: list[Generation]


def make_iteration(
    site: Site,
    section: RolloutConfig,
    actors: Actors,
    programs: RolloutPrograms,
    score: Rewards,
    prompts: PromptRows,
    *,
    ptx: SFTRows | None = None,
    samples: int = 1,
    resample: int = 0,
) -> tuple[Iteration, BatchOf]:
    """Return the iteration, and a function that returns the arrays of its rollout.

    Both take the state and the iteration's number. ``ptx`` is text for the loss of PPO-ptx; None without it. Each
    prompt of a rollout has ``samples`` answers, in neighbouring rows; groups of equal scores are replaced in at most
    ``resample`` further draws.
    """
    mesh = site.mesh
    generate, read, targets, update = programs

    def order_of(rows: PromptRows | SFTRows, batch_size: int) -> Order:
        return Order(site.config.seed, batch_size=batch_size, lengths=rows.lengths, parts=rows.parts)

    order = order_of(prompts, section.episodes // samples)
    text_order = None if ptx is None else order_of(ptx, section.episodes)
    drawing = make_drawing(site, section, generate, score, prompts, samples=samples)
    resampling = None
    if resample:
        resampling = make_resampling(site, section, drawing, prompts, samples=samples, draws=resample)

    @jax.jit
    def measure(rollout: Rollout, parts: dict[str, jax.Array]) -> Metrics:
        has_score = jnp.any(rollout.response_mask, axis=-1) & jnp.isfinite(rollout.scores)
        groups = group_metrics(rollout, samples=samples) if samples > 1 else {}
        return rollout_metrics(rollout) | part_metrics(parts, has_score) | groups

    work = iteration_work(section, actors, together=samples // drawing.readings)
    occupancy = rollout_occupancy(section, actors.policy.decode_fns, mesh)
    log_slots(section, actors.policy.decode_fns, mesh, stage=site.stage, prompt=max(prompts.buckets))

    def next_beta(coef: jax.Array, metrics: Metrics) -> jax.Array:
        if not section.kl.target:
            return coef
        kl = metrics["kl"]
        new_coef = update_kl_coef(coef, kl, section.episodes, target=section.kl.target, horizon=section.kl.horizon)
        return jnp.where(jnp.isfinite(kl), new_coef, coef)

    def text_of(number: int) -> SFTBatch | None:
        return None if ptx is None or text_order is None else shard_batch(ptx.batch(text_order[number]), mesh)

    def collect(state: RunState, number: int, seconds: dict[str, Any]) -> Collected:
        """Sample and score answers; the same state and number give the same rollout, bit for bit."""
        root = jax.random.fold_in(state.key, number)
        sample_key, _ = jax.random.split(root)
        params = combine(state.train.params, state.train.frozen)
        with timed(seconds, "seconds/input"):
            questions, text = order[number], text_of(number)
        drawn = drawing.draw(params, questions, sample_key, seconds)
        further, groups, readings = [], {}, None
        with timed(seconds, "seconds/scoring"):
            # The readings are dispatched first, so the devices work while the rules score on the host.
            if resampling is None:
                readings = read(params, drawn.generation)
            answers = drawing.score(drawn)
        if resampling is not None:
            answers, further, replaced = resampling(answers, params, root, number, seconds)
            groups = {"groups/replaced": np.float32(replaced), "groups/draws": np.float32(1 + len(further))}
        with timed(seconds, "seconds/scoring") as wait:
            readings = read(params, answers.generation) if readings is None else readings
            rollout = targets(answers, readings, state.kl_coef)
            metrics = wait(measure(rollout, answers.parts)) | groups
        return Collected(rollout._replace(ptx=text), metrics, drawn.generation, further)

    def iterate(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        seconds: dict[str, Any] = {}
        _, update_key = jax.random.split(jax.random.fold_in(state.key, number))
        rollout, metrics, first, further = collect(state, number, seconds)
        with timed(seconds, "seconds/update") as wait:
            train, update_metrics = wait(update(state.train, rollout, update_key))
        if section.old_logprobs == "sampler":
            # The old log-probs are the sampler's own here, so comparing them with the sampler's says nothing.
            del metrics["sampler/mean_ratio"]
            metrics["sampler/max_abs_logprob_diff"] = update_metrics["policy/first_minibatch_max_abs_log_ratio"]
        metrics |= update_metrics | seconds
        metrics["rollout/occupancy"] = occupancy(first)
        if actors.has_reference:
            metrics["kl_coef"] = state.kl_coef
        metrics |= work(first, further, rollout.ptx, update_metrics["policy/updates"])
        beta = next_beta(state.kl_coef, metrics)
        return RunState(train, state.key, state.cursor + 1, beta), metrics

    def batch_of(state: RunState, number: int) -> dict[str, np.ndarray]:
        arrays = collect(state, number, {}).rollout._replace(ptx=None)._asdict()
        return fetch({name: array for name, array in arrays.items() if array is not None})

    return iterate, batch_of
