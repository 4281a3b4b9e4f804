"""Compilation of pure training steps for a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.parallel.mesh import batch_sharding, replicated
from jrlhf.parallel.platforms import compiler_options
from jrlhf.types import Key, Metrics, Params, TrainState

Step = Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]


def jit_for(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
    """Jit a function that runs a model on the mesh, with the compiler options of the mesh's platform.

    ``options`` are those of ``jax.jit``.
    """
    return jax.jit(function, compiler_options=compiler_options(mesh), **options)


def jit_step(step: Step, *, mesh: Mesh, state_shardings: Any) -> Step:
    """Jit ``step`` for the mesh: the state keeps its shardings, the batch is split by rows, metrics are replicated.

    The state is donated, so that only one copy of it is in memory. Its ``frozen`` part is not donated, since others may
    share it, and keeps its shardings. ``state_shardings`` are ``tree_shardings(jax.eval_shape(make_state), mesh,
    rules)`` for a state with ``frozen`` None.
    """
    jitted = jit_moving(step, mesh=mesh, state_shardings=state_shardings)

    def call(state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        new, metrics = jitted(state._replace(frozen=None), state.frozen, batch, key)
        return new._replace(frozen=state.frozen), metrics

    return call


def jit_moving(step: Step, *, mesh: Mesh, state_shardings: Any) -> Any:
    """Return the jitted function inside ``jit_step``, which can be lowered.

    Its arguments are ``(state without its frozen part, frozen, batch, key)``.
    """
    everywhere = replicated(mesh)

    def update(moving: TrainState, frozen: Params | None, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        new, metrics = step(moving._replace(frozen=frozen), batch, key)
        return new._replace(frozen=None), metrics

    return jit_for(
        mesh,
        update,
        in_shardings=(state_shardings, None, batch_sharding(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
