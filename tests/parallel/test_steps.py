"""A step over eight devices is the step of one: same update, same metrics, for every mesh.

The updates are compared under SGD. Adam divides a gradient by its own size, so an entry whose true gradient is 0 (an
unused token's embedding, say) gets a full-size step in the direction of the rounding error: its first update differs by
2·lr between two correct layouts. One test uses Adam with an eps (1e-3) far above the rounding error, for its state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jrlhf.core import from_logits
from jrlhf.parallel import ShardingRules, Step, init_sharded, jit_step, make_mesh, shard_batch, tree_shardings
from jrlhf.steps import (
    DPOSettings,
    KTOSettings,
    PPOSettings,
    make_dpo_step,
    make_kto_step,
    make_ppo_step,
    make_reward_step,
    make_sft_step,
    separate,
)
from jrlhf.types import PPOParams, RankingBatch, Rollout, SFTBatch, TrainState, UnpairedBatch

VOCABULARY, WIDTH, ROWS, LENGTH = 32, 16, 16, 6
MESHES = {"8,1,1": (8, 1, 1), "2,2,2": (2, 2, 2), "1,8,1": (1, 8, 1)}
RULES: ShardingRules = (
    ("embedding$", P("tensor", "fsdp")),
    ("up/kernel$", P("fsdp", "tensor")),
    ("down/kernel$", P("tensor", "fsdp")),
)


class Trunk(linen.Module):
    """A causal toy: each position sees the running mean of the embeddings up to it."""

    out: int

    @linen.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        seen = jnp.where(mask[..., None], linen.Embed(VOCABULARY, WIDTH)(tokens), 0.0)
        count = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.float32), 1.0)
        x = jnp.cumsum(seen, axis=1) / count[..., None]
        x = linen.Dense(2 * WIDTH, name="up")(x)
        x = linen.Dense(WIDTH, name="down")(jnp.tanh(x))
        return linen.Dense(self.out, name="head")(x)


policy, scorer = Trunk(VOCABULARY), Trunk(1)


def score_fn(params: Any, tokens: jax.Array, mask: jax.Array, /) -> jax.Array:
    return scorer.apply(params, tokens, mask)[..., 0]


def init_of(module: Trunk, key: jax.Array) -> Any:
    return module.init(key, jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), jnp.bool_))


class Case(NamedTuple):
    """A step, how its state starts, and what it is fed."""

    make_step: Callable[[optax.GradientTransformation, int], Step]
    init: Callable[[jax.Array], Any]
    batch: Any


def ragged_masks(rng: np.random.Generator, *lead: int) -> np.ndarray:
    lengths = rng.integers(2, LENGTH + 1, lead)
    return np.arange(LENGTH) < lengths[..., None]


def sft_case() -> Case:
    rng = np.random.default_rng(0)
    mask = ragged_masks(rng, ROWS)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32)
    batch = SFTBatch(tokens, mask, mask & (rng.random((ROWS, LENGTH)) < 0.8))
    return Case(
        lambda tx, slices: make_sft_step(from_logits(policy.apply), tx, accumulation=slices),
        lambda key: init_of(policy, key),
        batch,
    )


def reward_case() -> Case:
    rng = np.random.default_rng(1)
    batch = RankingBatch(
        rng.integers(0, VOCABULARY, (ROWS, 3, LENGTH), np.int32),
        ragged_masks(rng, ROWS, 3),
        rng.integers(0, 3, (ROWS, 3), np.int32),
        rng.random((ROWS, 3)) < 0.9,
        rng.random(ROWS, np.float32),
    )
    return Case(
        lambda tx, slices: make_reward_step(score_fn, tx, center_coef=0.01, accumulation=slices),
        lambda key: init_of(scorer, key),
        batch,
    )


def dpo_case() -> Case:
    rng = np.random.default_rng(3)
    rankings = reward_case().batch
    batch = rankings._replace(
        loss_mask=rankings.mask & (np.arange(LENGTH) >= 2),
        ref_logprobs=(rng.standard_normal((ROWS, 3)) - 8.0).astype(np.float32),
    )
    settings = DPOSettings("sigmoid", beta=0.5, label_smoothing=0.1)
    return Case(
        lambda tx, slices: make_dpo_step(from_logits(policy.apply), tx, settings, accumulation=slices),
        lambda key: init_of(policy, key),
        batch,
    )


def kto_case() -> Case:
    """The first two completions of the rankings, each by itself; rank 0 is about a third of them."""
    rankings = dpo_case().batch
    # The reference finds the mismatched pairs unlikely, so that z₀ is not at its bound of 0.
    shifted = rankings._replace(ref_logprobs=rankings.ref_logprobs - 3.0)
    single = lambda batch, k: jax.tree.map(lambda x: x[:, k : k + 1] if x.ndim > 1 else x, batch)  # noqa: E731
    settings = KTOSettings(beta=0.5, desirable_weight=1.3, undesirable_weight=1.0)
    return Case(
        lambda tx, slices: make_kto_step(from_logits(policy.apply), tx, settings, accumulation=slices),
        lambda key: init_of(policy, key),
        UnpairedBatch(single(rankings, 0), single(shifted, 1)),
    )


def ppo_case() -> Case:
    rng = np.random.default_rng(2)
    mask = ragged_masks(rng, ROWS)

    def per_token(scale: float, offset: float = 0.0) -> np.ndarray:
        return (offset + scale * rng.standard_normal((ROWS, LENGTH))).astype(np.float32)

    text = sft_case().batch
    rollout = Rollout(
        tokens=rng.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32),
        mask=mask,
        response_mask=mask & (np.arange(LENGTH) >= 1),
        logprobs=per_token(0.1, -3.4),
        ref_logprobs=per_token(0.1, -3.4),
        sampler_logprobs=per_token(0.1, -3.4),
        entropy=per_token(0.1, 3.4),
        values=per_token(0.5),
        rewards=per_token(1.0),
        advantages=per_token(1.0),
        returns=per_token(1.0),
        scores=per_token(1.0)[:, 0],
        stopped=rng.random(ROWS) < 0.5,
        ptx=text,
    )

    def make_step(tx: optax.GradientTransformation, slices: int) -> Step:
        settings = PPOSettings(
            epochs=2, minibatches=2, temperature=0.9, clip=0.2, value_clip=0.2, value_coef=0.5, entropy_coef=0.01,
            dual_clip=3.0, ptx_coef=0.1, critic_warmup_updates=1, ema_decay=0.9, accumulation=slices,
        )  # fmt: skip
        return make_ppo_step(separate(from_logits(policy.apply), score_fn), tx, settings)

    def init(key: jax.Array) -> PPOParams:
        actor, critic = jax.random.split(key)
        return PPOParams(init_of(policy, actor), init_of(scorer, critic))

    return Case(make_step, init, rollout)


CASES = {"sft": sft_case, "reward": reward_case, "dpo": dpo_case, "kto": kto_case, "ppo": ppo_case}


def one_device() -> Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def run(case: Case, mesh: Mesh, *, tx: optax.GradientTransformation, slices: int = 1, steps: int = 2) -> Any:
    """The state and metrics after a few steps, as NumPy; and the state itself."""

    def init(key: jax.Array) -> TrainState:
        params = case.init(key)
        ema = jax.tree.map(jnp.copy, params.policy) if isinstance(params, PPOParams) else None
        return TrainState(params, tx.init(params), jnp.int32(0), ema)

    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, RULES)
    state = init_sharded(init, jax.random.key(0), mesh=mesh, rules=RULES)
    step = jit_step(case.make_step(tx, slices), mesh=mesh, state_shardings=shardings)
    batch = shard_batch(case.batch, mesh)
    metrics: Any = None
    for i in range(steps):
        before = state
        state, metrics = step(before, batch, jax.random.fold_in(jax.random.key(1), i))
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "the old state's memory was not given back"
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    assert all(x.sharding.is_fully_replicated for x in metrics.values())
    return jax.device_get((state, metrics)), state


def distance(a: Any, b: Any) -> float:
    return max(
        float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {name: run(case(), one_device(), tx=optax.sgd(0.5))[0] for name, case in CASES.items()}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_give_the_update_of_one(
    name: str, axes: tuple[int, int, int], references: dict[str, Any]
) -> None:
    data, fsdp, tensor = axes
    case = CASES[name]()
    result, state = run(case, make_mesh(data=data, fsdp=fsdp, tensor=tensor), tx=optax.sgd(0.5))
    assert distance(result, references[name]) < 1e-5
    embedding = next(x for x in jax.tree.leaves(state.params) if x.shape == (VOCABULARY, WIDTH))
    part = (VOCABULARY // tensor, WIDTH // fsdp)
    assert {s.data.shape for s in embedding.addressable_shards} == {part}


@pytest.mark.parametrize("name", CASES)
def test_the_compared_update_is_far_above_rounding(name: str, references: dict[str, Any]) -> None:
    assert distance(references[name][0].params, CASES[name]().init(jax.random.key(0))) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_slices_of_a_batch_give_the_update_of_the_whole(name: str, references: dict[str, Any]) -> None:
    # A PPO minibatch of 8 rows in 4 slices is 2 rows each, fewer than the 4 row groups: uneven layouts are covered too.
    result, _ = run(CASES[name](), make_mesh(data=2, fsdp=2, tensor=2), tx=optax.sgd(0.5), slices=4)
    assert distance(result, references[name]) < 1e-5


def test_adam_keeps_its_moments_sharded_and_its_update_the_same() -> None:
    tx = optax.adam(1e-2, eps=1e-3)
    expected, _ = run(sft_case(), one_device(), tx=tx)
    result, state = run(sft_case(), make_mesh(data=2, fsdp=2, tensor=2), tx=tx)
    assert distance(result, expected) < 1e-5
    assert state.opt_state[0].mu["params"]["up"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_a_step_compiles_once() -> None:
    case = sft_case()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tx = optax.sgd(0.1)
    traces = []

    def counted(state: TrainState, batch: Any, key: jax.Array) -> Any:
        traces.append(1)
        return case.make_step(tx, 1)(state, batch, key)

    def init(key: jax.Array) -> TrainState:
        params = case.init(key)
        return TrainState(params, tx.init(params), jnp.int32(0))

    state = init_sharded(init, jax.random.key(0), mesh=mesh, rules=RULES)
    step = jit_step(counted, mesh=mesh, state_shardings=tree_shardings(state, mesh, RULES))
    for i in range(3):
        state, _ = step(state, shard_batch(case.batch, mesh), jax.random.key(i))
    assert len(traces) == 1
    assert int(state.step) == 3
