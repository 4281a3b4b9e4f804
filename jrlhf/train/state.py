"""All that a run is between two steps."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jrlhf.types import Key, TrainState


class RunState(NamedTuple):
    """All state of a run. What is not in here is not in the checkpoint, and does not exist."""

    train: TrainState
    key: Key
    """The key of the stage's steps: step i uses ``fold_in(key, i)``."""
    cursor: Int[Array, ""]
    """Steps (PPO: iterations) done; with the seed it decides the next batch."""
    kl_coef: Float[Array, ""]
    """PPO's beta; 0 in the other stages."""


def saved_part(state: RunState) -> RunState:
    """Without the frozen weights: they are those of the model that the config names, and never change."""
    return state._replace(train=state.train._replace(frozen=None))


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
