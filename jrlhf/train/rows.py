"""The steps of a stage that trains on rows of a file, in the order of the seed."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.data import Order
from jrlhf.parallel import shard_batch
from jrlhf.train.performance import timed
from jrlhf.train.start import Training
from jrlhf.train.state import RunState


@runtime_checkable
class Batches(Protocol):
    """Rows that can be put into batches."""

    def batch(self, indices: np.ndarray, /) -> Any:
        """The rows with these indices, as a batch of NumPy arrays."""
        ...


class RowSteps(NamedTuple):
    """The two functions of a loop that read rows."""

    advance: Callable[[RunState, int], tuple[RunState, dict[str, Any]]]
    """``(state, number) -> (state, metrics)``: the step on batch ``number``."""
    batch_of: Callable[[RunState, int], dict[str, np.ndarray]]
    """The arrays of batch ``number`` by name."""


def row_steps(
    training: Training,
    batches: Batches,
    order: Order,
    mesh: Mesh,
    *,
    flops: Callable[[Any, dict[str, Any]], jax.Array],
) -> RowSteps:
    """Steps over ``batches`` in ``order``. ``flops``: model FLOPs of a step, from its batch and its metrics."""

    def advance(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        seconds: dict[str, Any] = {}
        with timed(seconds, "seconds/input"):
            batch = shard_batch(batches.batch(order[number]), mesh)
        train, metrics = training.step(state.train, batch, jax.random.fold_in(state.key, number))
        metrics |= seconds | {"flops": flops(batch, metrics)}
        return state._replace(train=train, cursor=state.cursor + 1), metrics

    def batch_of(state: RunState, number: int) -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_leaves_with_path(batches.batch(order[number]))
        return {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in leaves}

    return RowSteps(advance, batch_of)
