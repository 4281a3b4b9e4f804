"""One iteration of PPO: rollout, scoring, update."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import Config, PPOConfig
from jrlhf.core import combine, update_kl_coef
from jrlhf.data import Order, PromptRows, SFTRows
from jrlhf.parallel import batch_sharding, fetch, shard_batch
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.sampling import GenerateFn
from jrlhf.rollout.scores import Rewards, part_metrics
from jrlhf.steps import Networks, make_readings, make_targets, rollout_metrics, separate, shared, without_padding
from jrlhf.train.batches import device_share, gradient_slices
from jrlhf.train.performance import PHASES, rollout_work, timed
from jrlhf.train.start import JittedStep
from jrlhf.train.state import RunState
from jrlhf.types import Generation, Metrics, Readings, Rollout, SFTBatch

Iteration = Callable[[RunState, int], tuple[RunState, dict[str, Any]]]
BatchOf = Callable[[RunState, int], dict[str, np.ndarray]]

SLICES = 8
"""In so many the episodes are read where the config does not say; a slice that holds padding alone is left out."""


def episode_slices(ppo: PPOConfig, rows: int, mesh: Mesh, *, key: str) -> int:
    """In how many equal slices ``rows`` episodes are read; see ``gradient_slices``."""
    share = device_share(rows, mesh, key=key)
    return gradient_slices(share, microbatch=ppo.microbatch or max(1, share // SLICES))


def jit_joined(mesh: Mesh) -> Callable[[Sequence[Generation]], Generation]:
    """One rollout of its parts, in their order, laid out by rows."""
    join = jax.jit(
        lambda parts: jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts), out_shardings=batch_sharding(mesh)
    )
    return lambda parts: parts[0] if len(parts) == 1 else join(parts)


def reading_fn(actors: Actors, fn: Callable[..., Any], *, slices: int) -> Any:
    """One of the actors' functions, for what no gradient is taken of."""
    return without_padding(fn, slices=slices) if actors.packable else fn


def networks_of(actors: Actors, *, slices: int | None = None) -> Networks:
    """Policy and value network; with ``slices`` in that many parts without padding, where no gradient is taken."""

    def reading(fn: Callable[..., Any]) -> Any:
        return fn if slices is None else reading_fn(actors, fn, slices=slices)

    if actors.shared:
        return shared(reading(actors.policy.actor_critic_fn))
    return separate(reading(actors.policy.logprob_fn), reading(actors.value.score_fn))


def jit_readings(ppo: PPOConfig, actors: Actors, mesh: Mesh, *, slices: int) -> Callable[..., Readings]:
    """``make_readings`` with a config's settings, laid out by rows."""
    read = make_readings(
        networks_of(actors, slices=slices),
        temperature=ppo.sampling.temperature,
        from_sampler=ppo.old_logprobs == "sampler",
    )
    return jax.jit(read, out_shardings=batch_sharding(mesh))


def jit_targets(ppo: PPOConfig, mesh: Mesh) -> Callable[..., Rollout]:
    """``make_targets`` with a config's settings, laid out by rows."""
    targets = make_targets(
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_estimator=ppo.kl.estimator,
        missing_eos_penalty=ppo.missing_eos_penalty,
        whiten_rewards=ppo.whiten_rewards,
    )
    return jax.jit(targets, out_shardings=batch_sharding(mesh))


def make_iteration(
    config: Config,
    actors: Actors,
    generate: GenerateFn,
    score: Rewards,
    update: JittedStep,
    prompts: PromptRows,
    ptx: SFTRows | None,
    mesh: Mesh,
    *,
    slices: int,
) -> tuple[Iteration, BatchOf]:
    """A function of the state and the iteration's number, and the rollout it trains on. ``slices``: of the episodes,
    while they are scored."""
    ppo = config.ppo

    def in_order(rows: PromptRows | SFTRows) -> Order:
        return Order(config.seed, batch_size=ppo.episodes, lengths=rows.lengths, parts=rows.parts)

    order, text_order = in_order(prompts), None if ptx is None else in_order(ptx)
    read, targets = jit_readings(ppo, actors, mesh, slices=slices), jit_targets(ppo, mesh)
    joined, rollout_parts = jit_joined(mesh), ppo.rollout_parts
    device_share(ppo.episodes // rollout_parts, mesh, key="ppo.episodes / ppo.rollout_parts")

    @jax.jit
    def measure(rollout: Rollout, parts: dict[str, jax.Array]) -> Metrics:
        has_score = jnp.any(rollout.response_mask, axis=-1) & jnp.isfinite(rollout.scores)
        return rollout_metrics(rollout) | part_metrics(parts, has_score)

    work = rollout_work(ppo, actors.policy.arch, actors.value_arch, [model.arch for model in actors.reward_models])

    def next_beta(coef: jax.Array, kl: jax.Array) -> jax.Array:
        if not ppo.kl.target:
            return coef
        moved = update_kl_coef(coef, kl, ppo.episodes, target=ppo.kl.target, horizon=ppo.kl.horizon)
        return jnp.where(jnp.isfinite(kl), moved, coef)

    def text_of(number: int) -> SFTBatch | None:
        return None if ptx is None or text_order is None else shard_batch(ptx.batch(text_order[number]), mesh)

    def counts(full: dict[str, jax.Array], updated: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What the iteration took: of the updates only those that were made."""
        made = updated["policy/updates"] / (ppo.epochs * ppo.minibatches)
        full = full | {"flops/update": full["flops/update"] * made}
        full["tokens/update"] = full["tokens/scoring"] * (made * ppo.epochs)
        return full | {"flops": sum((full[f"flops/{name}"] for name in PHASES), jnp.float32(0.0))}

    def collect(state: RunState, number: int, seconds: dict[str, Any]) -> tuple[Generation, Rollout, Metrics]:
        """Answers, scored. Of the same state and number it is the same rollout, to the bit."""
        sample_key, _ = jax.random.split(jax.random.fold_in(state.key, number))
        params = combine(state.train.params, state.train.frozen)
        with timed(seconds, "seconds/input"):
            rows, text = order[number], text_of(number)
            asked = np.split(rows, rollout_parts)
            tokens, mask = (np.split(array, rollout_parts) for array in prompts.batch(rows))
            batches = [shard_batch(part, mesh) for part in zip(tokens, mask, strict=True)]
        with timed(seconds, "seconds/rollout") as wait:
            keys = [sample_key] if rollout_parts == 1 else jax.random.split(sample_key, rollout_parts)
            # All are handed out at once: while the devices are at one, the rules are at those before it.
            drawn = [generate(params.policy, *batch, key) for batch, key in zip(batches, keys, strict=True)]
            heard = [score.begin(part, prompts, of) for part, of in zip(drawn[:-1], asked[:-1], strict=True)]
            generation = wait(joined(drawn))
        with timed(seconds, "seconds/scoring") as wait:
            # Handed out first: the devices are at it while the rules score on the host.
            readings = read(params.policy, actors.policy.params, params.value, generation)
            heard.append(score.begin(drawn[-1], prompts, asked[-1]))
            kept, scores, parts = score.finish(generation, prompts, rows, heard)
            rollout = targets(kept, readings, scores, state.kl_coef)
            metrics = wait(measure(rollout, parts))
        return generation, rollout._replace(ptx=text), metrics

    def iterate(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        seconds: dict[str, Any] = {}
        _, update_key = jax.random.split(jax.random.fold_in(state.key, number))
        generation, rollout, metrics = collect(state, number, seconds)
        with timed(seconds, "seconds/update") as wait:
            train, updated = wait(update(state.train, rollout, update_key))
        if ppo.old_logprobs == "sampler":
            # The rollout's are the sampler's own, and say nothing of it.
            del metrics["sampler/mean_ratio"]
            metrics["sampler/max_abs_logprob_diff"] = updated["policy/first_minibatch_max_abs_log_ratio"]
        metrics |= updated | seconds | {"kl_coef": state.kl_coef} | counts(work(generation, rollout.ptx), updated)
        beta = next_beta(state.kl_coef, metrics["kl"])
        return RunState(train, state.key, state.cursor + 1, beta), metrics

    def batch_of(state: RunState, number: int) -> dict[str, np.ndarray]:
        _, rollout, _ = collect(state, number, {})
        return fetch({name: array for name, array in rollout._asdict().items() if name != "ptx"})

    return iterate, batch_of
