"""The programs of a stage by shapes alone: the very functions that a run jits, with shapes in place of arrays."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.config import ModelConfig, PlanConfig, stage_section, stage_sections
from jrlhf.models import Pretrained
from jrlhf.models.abstract import abstract_pretrained, placed
from jrlhf.models.hf.adapter_folder import ModelKind
from jrlhf.parallel import batch_sharding, replicated
from jrlhf.parallel.devices.topology import Topology
from jrlhf.runs.folder import model_source
from jrlhf.train.start import Training, computed
from jrlhf.types import SFTBatch, TrainState

PLANNED_UPDATES = 1000
"""Number of updates that a planned schedule covers; no figure of a plan depends on it."""


class Program(NamedTuple):
    """One of the jitted functions that a stage calls."""

    name: str
    jitted: Any
    args: tuple[Any, ...]
    """Shapes with shardings, in place of arrays."""
    alive: tuple[Any, ...]
    """All that the devices hold while it runs, its arguments included; what occurs twice is one array."""
    trips: int = 1
    """Number of iterations of a loop whose end depends on the data."""
    timed: bool = True
    """Whether it is part of every step."""
    flops: float = 0.0
    """Model FLOPs of all devices."""
    read: float = 0.0
    """Minimum number of bytes that a device reads from its memory."""
    cache: tuple[int, int] | None = None
    """The last two dimensions of an array of the KV cache."""


class StagePlan(NamedTuple):
    """A stage at one size."""

    name: str
    batch_key: str
    batch: int
    """Rows (prompts, episodes) of a step, over all devices."""
    held: dict[str, Any]
    """Trees on the devices from the first step to the last: ``trained``, ``optimizer``, ``average``, ``loaded``."""
    programs: tuple[Program, ...]


class Sized(NamedTuple):
    """A stage that can be planned at any size."""

    rows: int
    """Rows that a device reads at once under the config."""
    dtype: str
    build: Callable[[int], StagePlan]
    """The stage with that many rows at once, in as many slices as the config says."""


class Target(NamedTuple):
    """The devices that a stage is planned for."""

    topology: Topology
    mesh: Mesh

    @property
    def groups(self) -> int:
        """Number of devices that read different rows."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The shape of an array of a batch, split by rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, make: Callable[[], Any]) -> Any:
        """The shapes of what ``make`` returns, whole on every device."""
        shapes = jax.eval_shape(make)
        return placed(shapes, jax.tree.map(lambda _: replicated(self.mesh), shapes))

    def text(self, rows: int, length: int, *, packed: bool = False) -> SFTBatch:
        """The shapes of a batch of text."""
        shape = rows, length
        marks = self.rows(shape, jnp.int32 if packed else jnp.bool_)
        return SFTBatch(self.rows(shape, jnp.int32), marks, self.rows(shape, jnp.bool_))


def device_bytes(*trees: Any) -> float:
    """What one device holds of trees of arrays or of shapes with shardings; a leaf that occurs twice counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves.values()))


def planned_source(config: PlanConfig, path: str, *, key: str, stage: str | None) -> str:
    """The folder or hub id whose sizes a model has: without a path that of ``stage``, or of a stage before it."""
    if not path and stage is not None:
        names = [*stage_sections()]
        earlier = names[: names.index(stage) + 1]
        path = next((p for name in reversed(earlier) if (p := stage_section(config, name).model.path)), "")
    return model_source(config, path, key=key, stage=None)


def planned_model(
    target: Target, source: str, model: ModelConfig, *, key: str, kind: ModelKind | None, option: str = ""
) -> Pretrained:
    """The model of a stage by shapes. ``kind``: the kind that a model with a path of its own must have; None: either.

    Attention that only a GPU or a TPU can compute is planned with XLA's on simulated devices.
    """
    options: dict[str, Any] = {"dtype": model.dtype, "remat": model.remat, "option": f"{key}.path"}
    if target.topology.real:
        options = computed(model, target.mesh, key=key)
    options |= {"option": option} if option else {}
    return abstract_pretrained(source, mesh=target.mesh, kind=kind if model.path else None, **options)


class PlannedTraining(NamedTuple):
    """The two programs of training by shapes."""

    state: TrainState
    start: Program
    held: dict[str, Any]
    update: Callable[..., Program]
    """``(batch, *live, **figures) -> Program``: the step on a batch; ``live`` is what else the devices hold by then."""


def planned_training(training: Training, target: Target, *, loaded: Any) -> PlannedTraining:
    """``loaded`` are the models that the stage keeps beside its state."""
    trained, ema, frozen = training.trained, training.ema, training.frozen
    # A run copies what it trains, as the step donates its state.
    copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (trained, ema))
    state = placed(jax.eval_shape(training.start, trained, ema), training.shardings)._replace(frozen=frozen)
    kept = (loaded, frozen)
    held = {"trained": state.params, "optimizer": state.opt_state, "average": state.ema, "loaded": kept}

    def update(batch: Any, *live: Any, **figures: Any) -> Program:
        args = (state._replace(frozen=None), frozen, batch, target.whole(lambda: jax.random.key(0)))
        return Program("update", training.update, args, alive=(args, held, live), **figures)

    return PlannedTraining(state, Program("start", training.start, copies, (kept, copies), timed=False), held, update)
