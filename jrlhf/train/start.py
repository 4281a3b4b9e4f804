"""Setup of every stage before its loop: the mesh, the state and the jitted step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, ModelConfig
from jrlhf.models.frozen import FrozenDtype
from jrlhf.models.kernels import has_splash
from jrlhf.parallel import ShardingRules, make_mesh, tree_shardings
from jrlhf.parallel.mesh import replicate
from jrlhf.parallel.platforms import platform
from jrlhf.parallel.step import Step, jit_moving
from jrlhf.train.batches import tree_copy
from jrlhf.train.state import RunState
from jrlhf.types import Key, Metrics, Params, TrainState


def mesh_of(config: Config) -> Mesh:
    """Return the mesh of a config over all devices."""
    axes = config.mesh
    return make_mesh(data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)


def compute_options(model: ModelConfig, mesh: Mesh, *, key: str, frozen: bool = False) -> dict[str, Any]:
    """Return the keywords of ``load_pretrained`` and ``load_reward_model``: dtype, remat, attention, weights, option.

    ``frozen`` says that the stage does not train the weights that are loaded. Raise ConfigError, which names ``key``,
    if the devices do not support the attention.
    """
    device = mesh.devices.flat[0]
    name, kind = platform(mesh), device.device_kind
    match model.attention:
        case "cudnn" if name != "gpu" or model.dtype != "bfloat16":
            raise ConfigError(f"{key}.attention: cudnn needs a GPU and bfloat16, not {name} and {model.dtype}")
        case "splash" if name != "tpu" or not has_splash(mesh):
            raise ConfigError(f"{key}.attention: splash needs a TPU, v4 or newer, not {kind}")
    return {
        "dtype": model.dtype,
        "remat": model.remat,
        "attention": model.attention,
        "weights": weights_dtype(model, frozen=frozen),
        "option": f"{key}.path",
    }


def weights_dtype(model: ModelConfig, *, frozen: bool) -> FrozenDtype:
    """Return the dtype of a model's weights in memory; those that a stage trains are always float32."""
    return model.weights if frozen else "float32"


class Training(NamedTuple):
    """The parameters of a stage, as arrays or shapes, and its two programs, the start and the update."""

    trained: Params
    """Initial parameters, which become part of the state; see ``begin``."""
    frozen: Params | None
    """Constant parameters that complete the trained ones; None if all are trained."""
    ema: Params | None
    """Initial parameters of the moving average; None without an average."""
    shardings: Any
    """Sharding of every leaf of the state."""
    start: Any
    """Jitted ``(trained, ema) -> TrainState``, without the frozen part."""
    update: Any
    """Jitted ``(state without its frozen part, frozen, batch, key) -> (state, metrics)``, which donates the state."""

    def step(self, state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        """Apply ``update`` to a state that includes its frozen part."""
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
    """Jit the start and the step over the mesh; the state takes the shardings of its parameters.

    ``trained`` and ``frozen`` are the two parts of ``lora.trainable``: arrays in a run, shapes in a plan.
    """
    init = first_state(tx)
    shardings = tree_shardings(jax.eval_shape(init, trained, ema), mesh, rules)
    # Donated, so that the initial parameters become the state: where shardings are given, jit would copy its inputs.
    start = jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))
    return Training(trained, frozen, ema, shardings, start, jit_moving(step, mesh=mesh, state_shardings=shardings))


def begin(training: Training, *, mesh: Mesh, key: Key, kl_coef: float = 0.0) -> RunState:
    """Return the state before the first step; ``key`` is the root key of the stage's steps.

    The state takes over the trained arrays: nobody can read them elsewhere afterwards.
    """
    # The average starts as other arrays than the policy, since none can be donated twice. A new head is on one device.
    parts = training.trained, tree_copy(training.ema)
    train = training.start(*jax.device_put(parts, (training.shardings.params, training.shardings.ema)))
    # The scalars are replicated now, because a checkpoint would otherwise restore them to the first device only.
    run_key, cursor, coef = replicate((key, jnp.int32(0), jnp.float32(kl_coef)), mesh)
    return RunState(train._replace(frozen=training.frozen), run_key, cursor, coef)


def first_state(tx: optax.GradientTransformation) -> Callable[[Params, Params | None], TrainState]:
    """Return ``(trained parameters, initial parameters of the average) -> state before the first step``."""

    def init(params: Params, ema: Params | None) -> TrainState:
        return TrainState(params, tx.init(params), jnp.int32(0), ema)

    return init
