"""One iteration of an on-policy stage: rollout, scoring and update."""

from collections.abc import Callable, Sequence
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
from jrlhf.rollout.sampling import GenerateFn
from jrlhf.rollout.scores import Rewards, part_metrics
from jrlhf.steps import Networks, make_readings, make_targets, rollout_metrics, separate, shared, without_padding
from jrlhf.train.batches import device_share, gradient_slices
from jrlhf.train.performance import PHASES, rollout_work, timed
from jrlhf.train.site import Site
from jrlhf.train.state import RunState
from jrlhf.types import Generation, Metrics, PPOParams, Readings, Rollout, SFTBatch

Iteration = Callable[[RunState, int], tuple[RunState, dict[str, Any]]]
BatchOf = Callable[[RunState, int], dict[str, np.ndarray]]

DEFAULT_READING_SLICES = 8
"""Default number of slices in which a device reads episodes; slices of padding alone are skipped."""


MAXIMA = (
    "policy/ratio_max",
    "policy/max_abs_log_ratio",
    "policy/first_minibatch_max_abs_log_ratio",
    "sampler/max_abs_logprob_diff",
)
"""The metrics of an iteration that are maxima over its tokens, from the step and from the rollout."""


def episode_slices(section: RolloutConfig, rows: int, mesh: Mesh, *, key: str) -> int:
    """Return the number of equal slices in which a device reads ``rows`` episodes; see ``gradient_slices``."""
    share = device_share(rows, mesh, key=key)
    return gradient_slices(share, microbatch=section.microbatch or max(1, share // DEFAULT_READING_SLICES))


def jit_concatenate(mesh: Mesh) -> Callable[[Sequence[Generation]], Generation]:
    """Return a function that joins the parts of a rollout in order, sharded by rows."""
    join = jax.jit(
        lambda parts: jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts), out_shardings=batch_sharding(mesh)
    )
    return lambda parts: parts[0] if len(parts) == 1 else join(parts)


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
    targets = make_targets(
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_estimator=ppo.kl.estimator,
        missing_eos_penalty=ppo.missing_eos_penalty,
        whiten_rewards=ppo.whiten_rewards,
    )
    return jax.jit(targets, out_shardings=batch_sharding(mesh))


class RolloutPrograms(NamedTuple):
    """The jitted functions of an iteration."""

    generate: GenerateFn
    """``(policy, tokens, mask, key) -> Generation``."""
    read: Callable[[PPOParams, Generation], Readings]
    """``(all parameters of policy and critic, generation) -> Readings`` of the answers."""
    targets: Callable[..., Rollout]
    """``(generation, readings, scores, KL coefficient) -> Rollout``."""
    update: Step
    """The training step on a rollout."""


def make_iteration(
    site: Site,
    section: RolloutConfig,
    actors: Actors,
    programs: RolloutPrograms,
    score: Rewards,
    prompts: PromptRows,
    ptx: SFTRows | None,
) -> tuple[Iteration, BatchOf]:
    """Return the iteration, and a function that returns the arrays of its rollout.

    Both take the state and the iteration's number. ``ptx`` is text for the loss of PPO-ptx; None without it.
    """
    mesh = site.mesh
    generate, read, targets, update = programs

    def order_of(rows: PromptRows | SFTRows) -> Order:
        return Order(site.config.seed, batch_size=section.episodes, lengths=rows.lengths, parts=rows.parts)

    order, text_order = order_of(prompts), None if ptx is None else order_of(ptx)
    concatenate, rollout_parts = jit_concatenate(mesh), section.rollout_parts
    key = f"{site.stage}.episodes / {site.stage}.rollout_parts"
    device_share(section.episodes // rollout_parts, mesh, key=key)

    @jax.jit
    def measure(rollout: Rollout, parts: dict[str, jax.Array]) -> Metrics:
        has_score = jnp.any(rollout.response_mask, axis=-1) & jnp.isfinite(rollout.scores)
        return rollout_metrics(rollout) | part_metrics(parts, has_score)

    work = rollout_work(section, actors.policy.arch, actors.value_arch, [model.arch for model in actors.reward_models])

    def next_beta(coef: jax.Array, kl: jax.Array) -> jax.Array:
        if not section.kl.target:
            return coef
        new_coef = update_kl_coef(coef, kl, section.episodes, target=section.kl.target, horizon=section.kl.horizon)
        return jnp.where(jnp.isfinite(kl), new_coef, coef)

    def text_of(number: int) -> SFTBatch | None:
        return None if ptx is None or text_order is None else shard_batch(ptx.batch(text_order[number]), mesh)

    def counts(full: dict[str, jax.Array], update_metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the FLOPs and tokens of the iteration; updates count only if they were not skipped."""
        fraction = update_metrics["policy/updates"] / (section.epochs * section.minibatches)
        full = full | {"flops/update": full["flops/update"] * fraction}
        full["tokens/update"] = full["tokens/scoring"] * (fraction * section.epochs)
        return full | {"flops": sum((full[f"flops/{name}"] for name in PHASES), jnp.float32(0.0))}

    def collect(state: RunState, number: int, seconds: dict[str, Any]) -> tuple[Generation, Rollout, Metrics]:
        """Sample and score answers; the same state and number give the same rollout, bit for bit."""
        sample_key, _ = jax.random.split(jax.random.fold_in(state.key, number))
        params = combine(state.train.params, state.train.frozen)
        with timed(seconds, "seconds/input"):
            rows, text = order[number], text_of(number)
            row_parts = np.split(rows, rollout_parts)
            tokens, mask = (np.split(array, rollout_parts) for array in prompts.batch(rows))
            batches = [shard_batch(part, mesh) for part in zip(tokens, mask, strict=True)]
        with timed(seconds, "seconds/rollout") as wait:
            keys = [sample_key] if rollout_parts == 1 else jax.random.split(sample_key, rollout_parts)
            # All parts are dispatched at once: the rules score a part while the devices sample the next one.
            samples = [generate(params.policy, *batch, key) for batch, key in zip(batches, keys, strict=True)]
            pending = [score.begin(part, prompts, at) for part, at in zip(samples[:-1], row_parts[:-1], strict=True)]
            generation = wait(concatenate(samples))
        with timed(seconds, "seconds/scoring") as wait:
            # The readings are dispatched first, so the devices work while the rules score on the host.
            readings = read(params, generation)
            pending.append(score.begin(samples[-1], prompts, row_parts[-1]))
            answers, scores, parts = score.finish(generation, prompts, rows, pending)
            rollout = targets(answers, readings, scores, state.kl_coef)
            metrics = wait(measure(rollout, parts))
        return generation, rollout._replace(ptx=text), metrics

    def iterate(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        seconds: dict[str, Any] = {}
        _, update_key = jax.random.split(jax.random.fold_in(state.key, number))
        generation, rollout, metrics = collect(state, number, seconds)
        with timed(seconds, "seconds/update") as wait:
            train, update_metrics = wait(update(state.train, rollout, update_key))
        if section.old_logprobs == "sampler":
            # The old log-probs are the sampler's own here, so comparing them with the sampler's says nothing.
            del metrics["sampler/mean_ratio"]
            metrics["sampler/max_abs_logprob_diff"] = update_metrics["policy/first_minibatch_max_abs_log_ratio"]
        metrics |= update_metrics | seconds | {"kl_coef": state.kl_coef}
        metrics |= counts(work(generation, rollout.ptx), update_metrics)
        beta = next_beta(state.kl_coef, metrics["kl"])
        return RunState(train, state.key, state.cursor + 1, beta), metrics

    def batch_of(state: RunState, number: int) -> dict[str, np.ndarray]:
        _, rollout, _ = collect(state, number, {})
        return fetch({name: array for name, array in rollout._asdict().items() if name != "ptx"})

    return iterate, batch_of
