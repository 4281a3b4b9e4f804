"""The programs of a stage for a plan: the same jitted functions as in a run, with shapes instead of arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.config import ModelConfig, PlanConfig, required_value, stage_section, stages_before
from jrlhf.models import Pretrained
from jrlhf.models.abstract import abstract_pretrained, own_shapes, placed
from jrlhf.models.hf.adapter_folder import ModelKind
from jrlhf.parallel import batch_sharding, replicated
from jrlhf.parallel.devices.topology import Topology
from jrlhf.parallel.platforms import settings_of
from jrlhf.runs.folder import model_source
from jrlhf.train.start import Training, compute_options, weights_dtype
from jrlhf.types import SFTBatch, TrainState

PLANNED_UPDATES = 1000
"""Number of updates in the schedule of a plan; no figure of a plan depends on it."""


class Program(NamedTuple):
    """One of the jitted functions that a stage calls."""

    name: str
    jitted: Any
    args: tuple[Any, ...]
    """Shapes with shardings, in place of arrays."""
    alive: tuple[Any, ...]
    """All arrays that the devices hold while it runs, including its arguments; the same object counts once."""
    trips: int = 1
    """Number of iterations of a loop whose end depends on the data."""
    loops: Mapping[str, float] = MappingProxyType({})
    """The same of such loops by name, the scope in which they are built."""
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
    """A stage whose plan can have any batch size."""

    rows: int
    """Number of rows that a device reads at once under the config."""
    dtype: str
    build: Callable[[int], StagePlan]
    """Build the plan for that many rows at once, with as many slices as the config says."""


class Target(NamedTuple):
    """The devices and the mesh of a plan."""

    topology: Topology
    mesh: Mesh

    @property
    def groups(self) -> int:
        """Number of devices that read different rows."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the shape of a batch's array, sharded by rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, make: Callable[[], Any]) -> Any:
        """Return the shapes of the result of ``make``, replicated on every device."""
        shapes = jax.eval_shape(make)
        return placed(shapes, jax.tree.map(lambda _: replicated(self.mesh), shapes))

    def text(self, rows: int, length: int, *, packed: bool = False) -> SFTBatch:
        """Return the shapes of a batch of text."""
        shape = rows, length
        marks = self.rows(shape, jnp.int32 if packed else jnp.bool_)
        return SFTBatch(self.rows(shape, jnp.int32), marks, self.rows(shape, jnp.bool_))


def device_bytes(*trees: Any) -> float:
    """Return the bytes per device of trees of arrays or of shapes with shardings; the same leaf counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves.values()))


def planned_source(config: PlanConfig, path: str, *, key: str, before: Sequence[str]) -> str:
    """Return the folder or hub id whose config gives a model's sizes.

    An empty ``path`` stands for the model that the nearest stage ``before`` starts from, of those that have a path or
    are a part of the run.
    """
    if path or not before:
        return model_source(config, path, key=key, before=())
    paths = {stage: stage_section(config, stage).model.path for stage in before}
    stage = next((stage for stage in before if paths[stage] or required_value(config, stage)), before[-1])
    return planned_source(config, paths[stage], key=key, before=stages_before(config, stage, "language"))


def planned_model(
    target: Target,
    source: str,
    model: ModelConfig,
    *,
    key: str,
    kind: ModelKind | None,
    option: str = "",
    frozen: bool = False,
) -> Pretrained:
    """Return the model of a stage as shapes. ``kind`` is the required kind of a model with its own path; None: any.

    ``frozen`` says that the stage does not train the weights that are loaded. On simulated devices, XLA's attention
    replaces kernels that need the compiler of a GPU or TPU.
    """
    remat = settings_of(target.topology.platform()).remat if model.remat == "auto" else model.remat
    options: dict[str, Any] = {"dtype": model.dtype, "remat": remat, "option": f"{key}.path"}
    options["weights"] = weights_dtype(model, frozen=frozen)
    if not target.topology.simulated:
        options = compute_options(model, target.mesh, key=key, frozen=frozen)
    options |= {"option": option} if option else {}
    return abstract_pretrained(source, mesh=target.mesh, kind=kind if model.path else None, **options)


class PlannedTraining(NamedTuple):
    """The start and the update of training as shapes."""

    state: TrainState
    start: Program
    held: dict[str, Any]
    update: Callable[..., Program]
    """``(batch, *live, **figures) -> Program``: the step on a batch, while the devices also hold ``live``."""


def planned_training(training: Training, target: Target, *, loaded: Any) -> PlannedTraining:
    """Return the programs of training as shapes. ``loaded`` are the models that a stage holds besides its state."""
    trained, frozen = training.trained, training.frozen
    # A run copies the initial parameters of the average, which are the trained ones.
    ema = own_shapes(training.ema)
    state = placed(jax.eval_shape(training.start, trained, ema), training.shardings)._replace(frozen=frozen)
    constant = (loaded, frozen)
    held = {"trained": state.params, "optimizer": state.opt_state, "average": state.ema, "loaded": constant}

    def update(batch: Any, *live: Any, **figures: Any) -> Program:
        args = (state._replace(frozen=None), frozen, batch, target.whole(lambda: jax.random.key(0)))
        return Program("update", training.update, args, alive=(args, held, live), **figures)

    start = Program("start", training.start, (trained, ema), (constant, trained, ema), timed=False)
    return PlannedTraining(state, start, held, update)
