"""What every stage does before its loop: mesh, state, jitted step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, ModelConfig
from jrlhf.data import Tokenizer, tokenizer_files
from jrlhf.models.hf.folder_files import write_files
from jrlhf.parallel import ShardingRules, init_sharded, is_first, jit_step, make_mesh, replicated, tree_shardings
from jrlhf.train.batches import tree_copy
from jrlhf.train.state import RunState
from jrlhf.types import Key, Metrics, Params, TrainState

JittedStep = Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]


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


def start_training(
    step: JittedStep,
    tx: optax.GradientTransformation,
    params: Params,
    *,
    mesh: Mesh,
    rules: ShardingRules,
    seed: int,
    frozen: Params | None,
    ema: Params | None = None,
    kl_coef: float = 0.0,
) -> tuple[RunState, JittedStep]:
    """The state before the first step, sharded by the same rules as its parameters, and the step jitted for it.

    ``params`` are those that are trained, ``frozen`` completes them: see ``stages.adapters.trainable``.
    """

    # Copies: the jitted step donates its state, and the caller keeps the model it loaded.
    train = init_sharded(first_state(tx), tree_copy(params), tree_copy(ema), mesh=mesh, rules=rules)
    shardings = tree_shardings(jax.eval_shape(lambda: train), mesh, rules)
    # On every device from the start: restored from a checkpoint, these would be bound to the first one alone.
    scalars = jax.jit(
        lambda: (jax.random.key(seed), jnp.int32(0), jnp.float32(kl_coef)), out_shardings=replicated(mesh)
    )
    key, cursor, beta = scalars()
    moving = RunState(train._replace(frozen=frozen), key, cursor, beta)
    return moving, jit_step(step, mesh=mesh, state_shardings=shardings)


def first_state(tx: optax.GradientTransformation) -> Callable[[Params, Params | None], TrainState]:
    """The state before the first step, of the parameters that are trained and those that an average starts from."""

    def init(params: Params, ema: Params | None) -> TrainState:
        return TrainState(params, tx.init(params), jnp.int32(0), ema)

    return init


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's own files beside weights, with whatever pad token was chosen."""
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, tokenizer_files(tokenizer))
