"""The programs of ``run_ppo``."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import PlanConfig
from jrlhf.core import combine, partition
from jrlhf.models import STOP_TOKEN, ArchConfig, Pretrained, RewardModel, abstract_reward, decode_bytes, forward_flops
from jrlhf.parallel import batch_sharding
from jrlhf.plan.parts import (
    UPDATES,
    Site,
    Sized,
    StagePlan,
    Training,
    abstract_trainable,
    planned_model,
    planned_training,
    sampling_program,
)
from jrlhf.plan.programs import Program, device_bytes
from jrlhf.rollout.actors import Actors, Judge
from jrlhf.rollout.iteration import episode_slices, jit_readings, jit_targets
from jrlhf.rollout.reward_models import jit_score, padded_width, reward_of
from jrlhf.stages.ppo import make_step
from jrlhf.train.batches import device_multiple
from jrlhf.train.optim import make_actor_critic_optimizer
from jrlhf.train.performance import rollout_work
from jrlhf.train.positions import Positions
from jrlhf.types import Generation, PPOParams, SFTBatch


class Planned(NamedTuple):
    """The models of a run, and how their state is trained."""

    actors: Actors
    training: Training
    params: PPOParams
    """All of policy and value network, frozen parts too."""


def ppo_stage(config: PlanConfig, site: Site) -> Sized:
    """Start, and an iteration's rollout, readings, scores and update.

    What makes targets of readings and scores, and evaluation, call for less than these.
    """
    ppo = config.ppo
    scored = episode_slices(ppo, ppo.episodes, site.mesh, key="ppo.episodes")
    minibatch = ppo.episodes // ppo.minibatches
    slices = episode_slices(ppo, minibatch, site.mesh, key="ppo.episodes / ppo.minibatches")
    planned = planned_run(config, site, slices=slices)
    policy, training = planned.actors.policy, planned.training
    total = ppo.prompts.max_length + ppo.sampling.max_new_tokens
    check_planned_lengths(config, planned.actors)
    of_row = row_work(config, planned.actors)
    moved = 2 * device_bytes(training.state.params, training.state.opt_state) * ppo.epochs * ppo.minibatches

    def build(rows: int) -> StagePlan:
        episodes = rows * slices * ppo.minibatches * site.groups
        work = {name: flops * episodes for name, flops in of_row.items()}
        prompt, held = ppo.prompts.max_length, training.held
        part = device_multiple(-(-episodes // ppo.rollout_parts), site.mesh)
        rollout = sampling_program(
            "rollout", policy, planned.params.policy, ppo.sampling, rows=part, prompt=prompt, site=site, held=held
        )
        fetched = ppo.rollout_parts * decode_read(config, policy.arch, part, site)
        rollout = rollout._replace(flops=work["rollout"], read=fetched, trips=ppo.rollout_parts * rollout.trips)
        generation, scores = sampled(site, episodes, total), site.rows((episodes,), jnp.float32)
        scoring = []
        if planned.actors.reward is not None:
            scoring = [score_program(planned, site, generation, slices=scored)._replace(flops=work["scores"])]
        readings = readings_program(config, planned, site, generation, slices=scored)
        readings = readings._replace(flops=work["readings"])
        read = jax.eval_shape(readings.jitted, *readings.args)
        coef = site.whole(lambda: jnp.float32(0.0))
        targets = jax.eval_shape(jit_targets(ppo, site.mesh), generation, read, scores, coef)
        batch = jax.tree.map(lambda x: site.rows(x.shape, x.dtype), targets)
        batch = batch._replace(ptx=site.text(episodes, ppo.ptx.max_length) if ppo.ptx_coef else None)
        figures: dict[str, Any] = {"trips": slices, "flops": work["update"], "read": moved}
        update = training.update(site, batch, generation, scores, **figures)
        programs = training.start, rollout, readings, *scoring, update
        return StagePlan("ppo", "ppo.episodes", episodes, held, programs)

    return Sized(minibatch // site.groups // slices, ppo.model.dtype, build)


def check_planned_lengths(config: PlanConfig, actors: Actors) -> None:
    """ConfigError where a prompt and an answer at their longest, or a text of ppo.ptx, are too long for a model."""
    ppo = config.ppo
    for positions in actors.positions(ppo):
        positions.check_length(ppo.prompts.max_length, key=positions.length_key)
    if ppo.ptx_coef:
        key = "ppo.ptx.max_length"
        Positions(actors.policy.arch, key).check_length(ppo.ptx.max_length, key=key)


def planned_run(config: PlanConfig, site: Site, *, slices: int) -> Planned:
    """As ``load_actors``, ``trainable_actors`` and ``start_training``."""
    ppo = config.ppo
    policy = planned_model(site, config, ppo.model, config.sft.model, key="ppo.model", kind="language")
    reward, same = None, True
    if ppo.rewards.uses_model:
        before = config.reward.model, config.sft.model
        of_reward = planned_model(site, config, ppo.reward, *before, key="ppo.reward", kind="reward")
        reward = abstract_reward(of_reward, site.mesh)
        same = reward.arch.vocab_size == policy.arch.vocab_size
    from_reward = ppo.value_from == "reward" or (ppo.value_from == "auto" and same)
    shared = ppo.value_from == "shared"
    value = reward if reward is not None and from_reward else abstract_reward(policy, site.mesh)
    if shared:
        value = replace(value, params={"head": value.params["head"]})
    others = (
        abstract_reward(
            planned_model(site, config, replace(ppo.reward, path=path), key="ppo.rewards.models", kind="reward"),
            site.mesh,
        )
        for path in ppo.rewards.models
    )
    judges = tuple(Judge(model, _own_tokenizer(model, policy)) for model in others)
    own = None if reward is None else _own_tokenizer(reward, policy)
    unread: Any = None
    actors = Actors(policy, reward, value, tokenizer=unread, reward_tokenizer=own, others=judges, shared=shared)
    (p, p_base), (v, v_base) = (
        partition(model.params, lambda path: True)
        if shared and model is value
        else abstract_trainable(model.params, model.arch, ppo.lora, site, policy.rules, path="ppo.lora")
        for model in (policy, value)
    )
    trained, frozen = PPOParams(p, v), PPOParams(p_base, v_base) if ppo.lora.rank else None
    tx, _ = make_actor_critic_optimizer(ppo.optim, value_lr=ppo.value_lr, updates=UPDATES)
    step = make_step(ppo, actors, tx, accumulation=slices)
    loaded, ema = (
        (policy.params, [model.params for model in actors.reward_models], value.params),
        p if ppo.ema_decay else None,
    )
    training = planned_training(step, tx, trained, frozen, site, policy.rules, loaded=loaded, ema=ema)
    return Planned(actors, training, combine(training.state.params, frozen))


def _own_tokenizer(reward: RewardModel, policy: Pretrained) -> Any | None:
    """What stands for the reward model's own tokenizer, which is not read; None where it reads the policy's tokens, as
    is taken of vocabularies of one size, or would if it were not another's: see ``own_tokenizer``."""
    same = reward.arch.vocab_size == policy.arch.vocab_size
    return None if same and reward.reading == STOP_TOKEN else "its own"


def sampled(site: Site, rows: int, length: int) -> Generation:
    """What a rollout gives."""
    shape = rows, length
    tokens, mask, response = (site.rows(shape, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.bool_))
    return Generation(tokens, mask, response, site.rows(shape, jnp.float32), site.rows((rows,), jnp.bool_))


def score_program(planned: Planned, site: Site, generation: Generation, *, slices: int) -> Program:
    """The reward model on what was sampled, in the policy's tokens or, at about as many, in its own."""
    reward = reward_of(planned.actors)
    if planned.actors.reward_tokenizer is None:
        score, texts = jit_score(planned.actors, site.mesh, slices=slices), (generation.tokens, generation.mask)
    else:
        score = jax.jit(reward.score, out_shardings=batch_sharding(site.mesh))
        rows, length = generation.tokens.shape
        shape = rows, padded_width(length, reward.arch.max_positions)
        texts = site.rows(shape, jnp.int32), site.rows(shape, jnp.bool_)
    alive = planned.training.held, generation, texts
    return Program("scores", score, (reward.params, *texts), alive=alive, trips=slices)


def readings_program(
    config: PlanConfig, planned: Planned, site: Site, generation: Generation, *, slices: int
) -> Program:
    """What policy, reference and value network say of what was sampled."""
    read = jit_readings(config.ppo, planned.actors, site.mesh, slices=slices)
    args = planned.params.policy, planned.actors.policy.params, planned.params.value, generation
    return Program("readings", read, args, alive=(planned.training.held, args), trips=slices)


def row_work(config: PlanConfig, actors: Actors) -> dict[str, float]:
    """Model FLOPs of an episode of full length, by program; and of a row of text with it, where there is one."""
    ppo, policy = config.ppo, actors.policy.arch
    rewards = [model.arch for model in actors.reward_models]
    prompt, new = ppo.prompts.max_length, ppo.sampling.max_new_tokens
    real, answer = jnp.ones((1, prompt + new), jnp.bool_), jnp.arange(prompt + new)[None] >= prompt
    marks = jnp.ones((1, ppo.ptx.max_length), jnp.bool_)
    text = SFTBatch(marks.astype(jnp.int32), marks, marks) if ppo.ptx_coef else None
    generation = Generation(real.astype(jnp.int32), real, answer, real.astype(jnp.float32), real[:, 0])
    # Of one episode, in one part. The bytes are not asked for: see ``decode_read``.
    work = rollout_work(replace(ppo, rollout_parts=1), policy, actors.value_arch, rewards)(generation, text)
    scores = sum(float(forward_flops(reward, np.arange(prompt + new), logits=0)) for reward in rewards)
    return {
        "rollout": float(work["flops/rollout"]),
        "scores": scores,
        "readings": float(work["flops/scoring"]) - scores,
        "update": float(work["flops/update"]),
    }


def decode_read(config: PlanConfig, arch: ArchConfig, episodes: int, site: Site) -> float:
    """Bytes that a device reads for a rollout: all weights but for those of others in ``tensor``, its rows' caches."""
    ppo, tensor = config.ppo, site.mesh.shape["tensor"]
    first, steps = ppo.prompts.max_length, ppo.sampling.max_new_tokens - 1
    size = partial(decode_bytes, arch, itemsize=jnp.dtype(ppo.model.dtype).itemsize, kv_cache=ppo.sampling.kv_cache)
    weights = size(np.full(1, -1), steps=steps)
    cached = size(np.arange(first, first + steps), steps=0)
    return (float(weights) + float(cached) * episodes / site.groups) / tensor
