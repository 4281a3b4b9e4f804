"""The programs of ``run_reward``."""

import jax
import jax.numpy as jnp

from jrlhf.config import PlanConfig
from jrlhf.core import combine
from jrlhf.models.abstract import abstract_reward
from jrlhf.plan.parts import UPDATES, Site, Sized, StagePlan, abstract_trainable, planned_model, planned_training
from jrlhf.plan.programs import Program, device_bytes
from jrlhf.steps import make_reward_step, score_completions
from jrlhf.train.batches import device_share, reading_slices
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import training_flops
from jrlhf.train.positions import Positions
from jrlhf.types import PackedRankingBatch, RankingBatch


def reward_stage(config: PlanConfig, site: Site) -> Sized:
    """Start, update, and where it is asked for evaluation."""
    reward, completions = config.reward, config.completions
    longest, packed = reward.data.max_length, reward.pack_length
    share = device_share(reward.batch_size, site.mesh, key="reward.batch_size")
    tokens, platform = float(packed or completions * longest), site.topology.platform()
    slices = reading_slices(share, microbatch=reward.microbatch, tokens=tokens, platform=platform)
    base = planned_model(site, config, reward.model, config.sft.model, key="reward.model", kind=None)
    Positions(base.arch, key := "reward.data.max_length").check_length(longest, key=key)
    model = abstract_reward(base, site.mesh)
    tx, _ = make_optimizer(reward.optim, updates=UPDATES)
    trained, frozen = abstract_trainable(model.params, model.arch, reward.lora, site, model.rules, path="reward.lora")
    step = make_reward_step(model.score_fn, tx, center_coef=reward.center_coef, accumulation=slices)
    run = planned_training(step, tx, trained, frozen, site, model.rules, loaded=model.params)
    moved = 2 * device_bytes(run.state.params, run.state.opt_state)
    row = jnp.ones((1, packed) if packed else (1, completions, longest), jnp.bool_)
    row_flops = training_flops(model.arch, frozen=frozen is not None)(row, jnp.float32(0.0))

    def build(rows: int) -> StagePlan:
        batch = rows * slices * site.groups
        plain = rankings(site, (batch, completions), longest)
        # As many prompts a row as there is room for at their longest.
        in_row = max(1, packed // (completions * longest))
        given = packed_rankings(site, (batch, in_row, completions), packed) if packed else plain
        programs = [run.start, run.update(site, given, flops=float(row_flops) * batch, read=moved)]
        if reward.data.eval:
            score = jax.jit(lambda params, batch: score_completions(model.score_fn, params, batch))
            args = combine(run.state.params, frozen), plain
            programs.append(Program("evaluation", score, args, alive=(run.held, args), timed=False))
        return StagePlan("reward", "reward.batch_size", batch, run.held, tuple(programs))

    return Sized(share // slices, reward.model.dtype, build)


def rankings(site: Site, lead: tuple[int, int], length: int) -> RankingBatch:
    """``[B, K]`` completions of ``length`` tokens."""
    tokens, marks = site.rows((*lead, length), jnp.int32), site.rows((*lead, length), jnp.bool_)
    ranks, valid = site.rows(lead, jnp.int32), site.rows(lead, jnp.bool_)
    return RankingBatch(tokens, marks, ranks, valid, site.rows(lead[:1], jnp.float32))


def packed_rankings(site: Site, lead: tuple[int, int, int], length: int) -> PackedRankingBatch:
    """``[B, G, K]`` completions in ``B`` rows of ``length`` tokens."""
    tokens, segments = (site.rows((lead[0], length), jnp.int32) for _ in range(2))
    ends, ranks, valid = (site.rows(lead, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_))
    return PackedRankingBatch(tokens, segments, ends, ranks, valid, site.rows(lead[:2], jnp.float32))
