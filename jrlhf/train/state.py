"""The complete state of a run between two steps."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jrlhf.types import Key, TrainState


class RunState(NamedTuple):
    """The complete state of a run; a checkpoint holds exactly these arrays, without the frozen weights."""

    train: TrainState
    key: Key
    """Root key of the stage's steps; step i uses ``fold_in(key, i)``."""
    cursor: Int[Array, ""]
    """Number of finished steps, in PPO iterations; cursor and seed determine the next batch."""
    kl_coef: Float[Array, ""]
    """KL coefficient β of PPO; 0 in the other stages."""


def saved_part(state: RunState) -> RunState:
    """Drop the frozen weights from a state; they are constant, and the config names the model that has them."""
    return state._replace(train=state.train._replace(frozen=None))


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree, as the target of a restore."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
