"""Every recipe fits together: shapes of a whole update of each stage, without a weight in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jrlhf.config import Config, load_config
from jrlhf.models import ArchConfig, RewardModel, Rope, decoder_fns
from jrlhf.models.functions import abstract_params, abstract_reward_params
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.parallel import make_mesh, tree_shardings
from jrlhf.rollout.actors import Actors
from jrlhf.stages import grpo as grpo_stage
from jrlhf.stages.ppo import make_step
from jrlhf.steps import DPOSettings, make_dpo_step, make_reward_step, make_sft_step
from jrlhf.train.batches import device_share, gradient_slices
from jrlhf.train.optim import make_actor_critic_optimizer, make_optimizer, make_policy_optimizer
from jrlhf.types import PPOParams, RankingBatch, Rollout, SFTBatch, TrainState
from tests.support import ROOT

CONFIGS = ROOT / "configs"
LLAMA3 = Rope("llama3", 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
ARCHS = {  # from the models' own config.json
    "HuggingFaceTB/SmolLM2-135M": ArchConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, rope=Rope("default", 1e5), tie_embeddings=True
    ),
    "meta-llama/Llama-3.2-1B": ArchConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, rope=LLAMA3, tie_embeddings=True),
    "asset:stories260k": ArchConfig(512, 64, 172, 5, 8, 4, 8, 512, tie_embeddings=True),
}
KEY = jax.eval_shape(lambda: jax.random.key(0))


def struct(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def start(params, tx) -> TrainState:
    return jax.eval_shape(lambda p: TrainState(p, tx.init(p), jnp.int32(0)), params)


RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "launch")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_stage_of_a_recipe_has_the_shapes_it_needs(path: Path) -> None:
    config = load_config(path)
    arch = ARCHS[config.sft.model.path]
    assert max(config.sft.data.max_length, config.reward.data.max_length) <= arch.max_positions
    assert not config.dpo.data.train or config.dpo.data.max_length <= arch.max_positions
    assert config.ppo.prompts.max_length + config.ppo.sampling.max_new_tokens <= arch.max_positions
    for check in (check_sft, check_reward, check_dpo, check_ppo, check_grpo):
        state = check(config, arch)
        # The recipe's mesh on as many devices as there are here, each axis as large as fits.
        fsdp, tensor = min(config.mesh.fsdp, 2), min(config.mesh.tensor, 2)
        mesh = make_mesh(data=-1, fsdp=fsdp, tensor=tensor)
        shardings = tree_shardings(state, mesh, SHARDING_RULES)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            sharding.shard_shape(leaf.shape)  # raises where it does not divide


def slices(rows: int, microbatch: int) -> int:
    share = device_share(rows, make_mesh(data=-1, fsdp=1, tensor=1), key="rows")
    return gradient_slices(share, microbatch=microbatch or share)


def check_sft(config: Config, arch: ArchConfig) -> TrainState:
    sft = config.sft
    fns = decoder_fns(arch, dtype=sft.model.dtype, remat=sft.model.remat)
    tx, _ = make_optimizer(sft.optim, updates=100)
    state = start(abstract_params(arch), tx)
    shape = (sft.batch_size, sft.data.max_length)
    batch = SFTBatch(struct(shape, jnp.int32), struct(shape, jnp.bool_), struct(shape, jnp.bool_))
    step = make_sft_step(fns.logprob_fn, tx, accumulation=slices(sft.batch_size, sft.microbatch))
    after, _ = jax.eval_shape(step, state, batch, KEY)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return state


def check_dpo(config: Config, arch: ArchConfig) -> TrainState:
    dpo = config.dpo
    fns = decoder_fns(arch, dtype=dpo.model.dtype, remat=dpo.model.remat)
    tx, _ = make_optimizer(dpo.optim, updates=100)
    state = start(abstract_params(arch), tx)
    shape = (dpo.batch_size, 2, dpo.data.max_length)
    marks, pairs = struct(shape, jnp.bool_), struct(shape[:2])
    ranks, valid = struct(shape[:2], jnp.int32), struct(shape[:2], jnp.bool_)
    batch = RankingBatch(struct(shape, jnp.int32), marks, ranks, valid, struct(shape[:1]), marks, pairs)
    settings = DPOSettings(dpo.loss, dpo.beta, label_smoothing=dpo.label_smoothing, gamma=dpo.gamma)
    parts = slices(dpo.batch_size, dpo.microbatch)
    step = make_dpo_step(fns.logprob_fn, tx, settings, accumulation=parts)
    after, _ = jax.eval_shape(step, state, batch, KEY)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return state


def check_reward(config: Config, arch: ArchConfig) -> TrainState:
    reward = config.reward
    fns = decoder_fns(arch, dtype=reward.model.dtype, remat=reward.model.remat)
    tx, _ = make_optimizer(reward.optim, updates=100)
    state = start(abstract_reward_params(arch), tx)
    shape = (reward.batch_size, 4, reward.data.max_length)
    batch = RankingBatch(
        struct(shape, jnp.int32),
        struct(shape, jnp.bool_),
        struct(shape[:2], jnp.int32),
        struct(shape[:2], jnp.bool_),
        struct(shape[:1]),
    )
    parts = slices(reward.batch_size, reward.microbatch)
    step = make_reward_step(fns.score_fn, tx, center_coef=reward.center_coef, accumulation=parts)
    after, _ = jax.eval_shape(step, state, batch, KEY)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return state


def check_ppo(config: Config, arch: ArchConfig) -> TrainState:
    ppo = config.ppo
    fns = decoder_fns(arch, dtype=ppo.model.dtype, remat=ppo.model.remat)
    tx, _ = make_actor_critic_optimizer(ppo.optim, value_lr=ppo.value_lr, updates=100)
    state = start(PPOParams(abstract_params(arch), abstract_reward_params(arch)), tx)
    rows, length = ppo.episodes, ppo.prompts.max_length + ppo.sampling.max_new_tokens
    per_token = struct((rows, length))
    marks = struct((rows, length), jnp.bool_)
    rollout = Rollout(
        struct((rows, length), jnp.int32), marks, marks, *[per_token] * 8, struct((rows,)), struct((rows,), jnp.bool_)
    )
    parts = slices(rows // ppo.minibatches, ppo.microbatch)
    policy: Any = SimpleNamespace(arch=arch, **fns._asdict())
    value = RewardModel({}, fns.score_fn, {}, arch, Path(), (), {})
    tokenizer: Any = None
    actors = Actors(policy, None, value, tokenizer, reward_tokenizer=None)
    step = make_step(ppo, actors, tx, accumulation=parts)
    after, _ = jax.eval_shape(step, state, rollout, KEY)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return state


def check_grpo(config: Config, arch: ArchConfig) -> TrainState:
    grpo = config.grpo
    fns = decoder_fns(arch, dtype=grpo.model.dtype, remat=grpo.model.remat)
    tx, _ = make_policy_optimizer(grpo.optim, updates=100)
    state = start(abstract_params(arch), tx)
    shape = grpo.episodes, grpo.prompts.max_length + grpo.sampling.max_new_tokens
    per_token, marks, per_answer = struct(shape), struct(shape, jnp.bool_), struct(shape[:1])
    rollout = Rollout(
        tokens=struct(shape, jnp.int32),
        mask=marks,
        response_mask=marks,
        logprobs=per_token,
        ref_logprobs=per_token,
        sampler_logprobs=per_token,
        entropy=per_token,
        values=None,
        rewards=per_token,
        advantages=per_token,
        returns=None,
        scores=per_answer,
        stopped=struct(shape[:1], jnp.bool_),
        kl_coef=per_answer,
    )
    policy: Any = SimpleNamespace(arch=arch, **fns._asdict())
    tokenizer: Any = None
    actors = Actors(policy, None, None, tokenizer, reward_tokenizer=None)
    parts = slices(grpo.episodes // grpo.minibatches, grpo.microbatch)
    step = grpo_stage.make_step(grpo, actors, tx, accumulation=parts)
    after, _ = jax.eval_shape(step, state, rollout, KEY)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return state
