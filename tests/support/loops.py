"""A run of the loop on a state of three numbers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import CheckpointConfig, LogConfig, OptimConfig
from jrlhf.config.watch import GuardConfig
from jrlhf.steps.accumulate import apply_gradients
from jrlhf.train.loop import Loop, Outcome, run_loop
from jrlhf.train.optim import make_actor_critic_optimizer
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import PPOParams, TrainState

TOTAL = 10
SILENT = ("negative_kl", "sampler", "entropy", "length", "repetition", "explained_variance")
OFF = {name: GuardConfig(action="off") for name in SILENT}
TX, SCHEDULE = make_actor_critic_optimizer(
    OptimConfig(lr=0.1, warmup=0.0, schedule="constant"), value_lr=0.0, updates=TOTAL
)


def new_state() -> RunState:
    params = PPOParams({"w": jnp.arange(3.0)}, {"w": jnp.ones(3)})
    train = TrainState(params, TX.init(params), jnp.int32(0))
    return RunState(train, jax.random.key(7), jnp.int32(0), jnp.float32(0.1))


@jax.jit
def update(train: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
    noise = jax.random.normal(key, (3,))
    grads = jax.tree.map(lambda w: w - noise, train.params)
    loss = jnp.sum(jnp.square(grads.policy["w"]))
    return apply_gradients(TX, train, grads, loss)[0], loss


def advance(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
    train, loss = update(state.train, jax.random.fold_in(state.key, number))
    metrics = {"loss": loss, "n": jnp.float32(8), "skipped": jnp.float32(0), "kl": loss * 0}
    return state._replace(train=train, cursor=jnp.int32(number + 1), kl_coef=state.kl_coef * 1.1), metrics


def evaluate(state: RunState, number: int) -> dict[str, float]:
    return {"eval/w": float(state.train.params.policy["w"].sum()) + number}


def fake_loop(**changes: Any) -> Loop:
    parts: dict[str, Any] = {
        "title": "fake",
        "total": TOTAL,
        "advance": advance,
        "evaluate": evaluate,
        "batch_of": lambda state, number: {"rows": np.arange(3) + number},
        "max_skipped": 3,
        "guards": None,
        "canary": None,
        "gates": (),
        "learning_rate": SCHEDULE,
        "rates": (Rate("n", "n_per_second"),),
        "best_metric": "eval/w",
        "best_mode": "max",
        "shown": ("loss",),
    }
    return Loop(**(parts | changes))


def run(folder: Path, **changes: Any) -> Outcome:
    """Lines every 3, evaluations every 4, checkpoints every 5 of 10 steps: none fall together before the end."""
    return run_loop(
        fake_loop(**changes),
        new_state(),
        folder=folder,
        log=LogConfig(every=3, eval_every=4, progress=False, tensorboard=True),
        checkpoint=CheckpointConfig(every=5, keep=2, keep_best=0),
        metadata={},
    )
