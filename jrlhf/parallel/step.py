"""A pure step, jitted over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.parallel.mesh import batch_sharding, replicated
from jrlhf.types import Key, Metrics, TrainState

Step = Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]


def jit_step(step: Step, *, mesh: Mesh, state_shardings: Any) -> Step:
    """``step`` compiled for the mesh: the state keeps its shardings, the batch is split by rows, metrics are whole.

    The state passed in is donated: its buffers are gone after the call, so that one copy is held and not two.
    ``state_shardings``: ``tree_shardings(jax.eval_shape(make_state), mesh, rules)``.
    """
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
