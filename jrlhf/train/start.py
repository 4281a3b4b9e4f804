"""What every stage does before its loop: mesh, state, jitted step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, ModelConfig
from jrlhf.parallel import ShardingRules, make_mesh, replicated, tree_shardings
from jrlhf.parallel.step import Step, jit_moving
from jrlhf.train.batches import tree_copy
from jrlhf.train.state import RunState
from jrlhf.types import Key, Metrics, Params, TrainState


def mesh_of(config: Config) -> Mesh:
    """The mesh a config asks for, over all devices."""
    axes = config.mesh
    return make_mesh(data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)


def computed(model: ModelConfig, mesh: Mesh, *, key: str) -> dict[str, Any]:
    """How a model is computed with, and what names it: keywords of ``load_pretrained`` and ``load_reward_model``.

    ConfigError, which names ``key``, where this machine cannot.
    """
    device = mesh.devices.flat[0]
    platform, kind = device.platform, device.device_kind
    match model.attention:
        case "cudnn" if platform != "gpu" or model.dtype != "bfloat16":
            raise ConfigError(f"{key}.attention: cudnn needs a GPU and bfloat16, not {platform} and {model.dtype}")
        case "splash" if platform != "tpu" or kind in ("TPU v2", "TPU v3"):
            raise ConfigError(f"{key}.attention: splash needs a TPU, v4 or newer, not {kind}")
    return {"dtype": model.dtype, "remat": model.remat, "attention": model.attention, "option": f"{key}.path"}


class Training(NamedTuple):
    """What a stage trains, as arrays or as shapes, and the two programs that make its state and move it."""

    trained: Params
    frozen: Params | None
    """The parameters that complete the trained ones and never change; None where all are trained."""
    ema: Params | None
    """Parameters that an average over updates starts from; None where there is no average."""
    shardings: Any
    """Sharding of every leaf of the state."""
    start: Any
    """Jitted ``(trained, ema) -> TrainState``, without the frozen part."""
    update: Any
    """Jitted ``(state without its frozen part, frozen, batch, key) -> (state, metrics)``, which donates the state."""

    def step(self, state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        """Apply ``update`` to a state with its frozen part."""
        new, metrics = self.update(state._replace(frozen=None), state.frozen, batch, key)
        return new._replace(frozen=state.frozen), metrics


def build_training(
    step: Step,
    tx: optax.GradientTransformation,
    trained: Params,
    frozen: Params | None,
    *,
    mesh: Mesh,
    rules: ShardingRules,
    ema: Params | None = None,
) -> Training:
    """Jit the start and the step over the mesh; the state has the shardings of its parameters.

    ``trained`` and ``frozen`` are the two parts of ``lora.trainable``, arrays in a run and shapes in a plan.
    """
    init = first_state(tx)
    shardings = tree_shardings(jax.eval_shape(init, trained, ema), mesh, rules)
    start = jax.jit(init, out_shardings=shardings)
    return Training(trained, frozen, ema, shardings, start, jit_moving(step, mesh=mesh, state_shardings=shardings))


def begin(training: Training, *, mesh: Mesh, key: Key, kl_coef: float = 0.0) -> RunState:
    """Return the state before the first step. ``key`` is that of the stage's steps."""
    # Copies: the step donates its state, and the caller keeps the model it loaded. A fresh head is on one device yet.
    copies = tree_copy((training.trained, training.ema))
    train = training.start(*jax.device_put(copies, (training.shardings.params, training.shardings.ema)))
    # On every device from the start: restored from a checkpoint, these would be bound to the first one alone.
    scalars = jax.jit(lambda: (key, jnp.int32(0), jnp.float32(kl_coef)), out_shardings=replicated(mesh))
    run_key, cursor, coef = scalars()
    return RunState(train._replace(frozen=training.frozen), run_key, cursor, coef)


def first_state(tx: optax.GradientTransformation) -> Callable[[Params, Params | None], TrainState]:
    """The state before the first step, of the parameters that are trained and those that an average starts from."""

    def init(params: Params, ema: Params | None) -> TrainState:
        return TrainState(params, tx.init(params), jnp.int32(0), ema)

    return init
