"""What the plans of all stages are made of: shapes with shardings where a run has arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.config import LoRAConfig, ModelConfig, PlanConfig, SamplingConfig
from jrlhf.core import partition
from jrlhf.models import ArchConfig, ModelKind, Pretrained, abstract_pretrained, is_trained, placed
from jrlhf.parallel import ShardingRules, Topology, batch_sharding, jit_moving, replicated, tree_shardings
from jrlhf.plan.programs import Figures, Program
from jrlhf.rollout.sampling import jit_sampler
from jrlhf.runs.folder import model_source
from jrlhf.train.lora import with_adapters
from jrlhf.train.start import computed, first_state
from jrlhf.types import Params, SFTBatch, TrainState

UPDATES = 1000
"""Of a schedule, which no figure depends on."""


class Site(NamedTuple):
    """Where a stage is planned to run."""

    topology: Topology
    mesh: Mesh

    @property
    def groups(self) -> int:
        """Devices that read different rows."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of a batch."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, make: Callable[[], Any]) -> Any:
        """What every device has whole."""
        shapes = jax.eval_shape(make)
        return placed(shapes, jax.tree.map(lambda _: replicated(self.mesh), shapes))

    def text(self, rows: int, length: int, *, packed: bool = False) -> SFTBatch:
        """A batch of text."""
        shape = rows, length
        marks = self.rows(shape, jnp.int32 if packed else jnp.bool_)
        return SFTBatch(self.rows(shape, jnp.int32), marks, self.rows(shape, jnp.bool_))


class StagePlan(NamedTuple):
    """A stage at a certain size."""

    name: str
    batch_key: str
    batch: int
    """Rows (prompts, episodes) of a step, over all devices."""
    held: dict[str, Any]
    """What is there from the first step to the last: ``trained``, ``optimizer``, ``average``, ``loaded``."""
    programs: tuple[Program, ...]


class Sized(NamedTuple):
    """A stage that can be asked for at any size."""

    rows: int
    """That a device reads at a time, by the config."""
    dtype: str
    build: Callable[[int], StagePlan]
    """The stage by such rows; of slices it has as many as the config asks for."""


@dataclass(frozen=True)
class StageFigures:
    """What one stage takes; bytes are a device's."""

    name: str
    batch_key: str
    batch: int
    held: dict[str, float]
    cache: float
    temporaries: float
    """Of the program with the highest peak: activations, gradients, the cache."""
    peak: float
    peak_in: str
    flops: float
    """Of a step (PPO: an iteration), of all devices."""
    sent: dict[str, float]
    """By a device in a step, by mesh axes."""
    seconds: float | None
    memory: float | None
    """That may be used; None: nothing is known of the devices' memory."""
    fits: bool | None
    fitting_batch: int | None
    """The largest batch that fits, read in as many slices; 0: not even a row a device."""
    programs: list[Figures]


def planned_model(
    site: Site, config: PlanConfig, model: ModelConfig, *before: ModelConfig, key: str, kind: ModelKind | None = None
) -> Pretrained:
    """The model of a stage; without a path it has the sizes of a stage before, the first of ``before`` with one.

    ``kind``: what a model that the config names must be; a stage that goes before gives the right one. None: either.
    What only a GPU or a TPU can compute attention with is planned with XLA's on simulated devices.
    """
    path = next((one.path for one in (model, *before) if one.path), "")
    source = model_source(config, path, key=f"{key}.path", stage=None)
    how: dict[str, Any] = {"dtype": model.dtype, "remat": model.remat, "option": f"{key}.path"}
    if site.topology.real:
        how = computed(model, site.mesh, key=key)
    return abstract_pretrained(source, mesh=site.mesh, kind=kind if model.path else None, **how)


def abstract_trainable(
    params: Params, arch: ArchConfig, lora: LoRAConfig, site: Site, rules: ShardingRules, *, path: str
) -> tuple[Params, Params | None]:
    """As ``stages.adapters.trainable``, of shapes."""
    if lora.rank == 0:
        return params, None
    shapes = jax.eval_shape(lambda p: with_adapters(p, arch, lora, jax.random.key(0), path=path), params)
    new = placed(shapes, tree_shardings(shapes, site.mesh, rules))
    old = {jax.tree_util.keystr(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(params)}
    whole = jax.tree_util.tree_map_with_path(lambda where, leaf: old.get(jax.tree_util.keystr(where), leaf), new)
    return partition(whole, is_trained)


class Training(NamedTuple):
    """As ``start_training``: the state, the program that makes it and the one that moves it."""

    state: TrainState
    start: Program
    jitted: Any
    loaded: Any
    """The models that the stage keeps."""
    held: dict[str, Any]

    def update(self, site: Site, batch: Any, *live: Any, **figures: Any) -> Program:
        """The step on a batch; ``live``: what else is there by then."""
        args = (self.state._replace(frozen=None), self.state.frozen, batch, site.whole(lambda: jax.random.key(0)))
        return Program("update", self.jitted, args, alive=(args, self.held, live), **figures)


def planned_training(
    step: Any, tx: Any, trained: Params, frozen: Any, site: Site, rules: ShardingRules, *, loaded: Any, ema: Any = None
) -> Training:
    """See ``Training``."""
    init = first_state(tx)
    # Their own arrays, as the step donates its state: see ``start_training``.
    copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (trained, ema))
    shapes = jax.eval_shape(init, trained, ema)
    shardings = tree_shardings(shapes, site.mesh, rules)
    state = placed(shapes, shardings)._replace(frozen=frozen)
    kept = (loaded, frozen)
    held = {"trained": state.params, "optimizer": state.opt_state, "average": state.ema, "loaded": kept}
    start = Program("start", jax.jit(init, out_shardings=shardings), copies, alive=(kept, copies), timed=False)
    return Training(state, start, jit_moving(step, mesh=site.mesh, state_shardings=shardings), kept, held)


def sampling_program(
    name: str,
    model: Pretrained,
    params: Params,
    sampling: SamplingConfig,
    *,
    rows: int,
    prompt: int,
    site: Site,
    held: Any,
) -> Program:
    """``jit_generate`` on prompts of full length, ``prompt`` tokens; stop tokens are those of config.json."""
    ends = model.config.get("eos_token_id") or 0
    stops = tuple(ends) if isinstance(ends, list) else (int(ends),)
    pad = int(model.config.get("pad_token_id") or 0)
    sampler = jit_sampler(model.decode_fns, sampling, site.mesh, stop_tokens=stops, pad_token=pad)
    prompts = site.rows((rows, prompt), jnp.int32), site.rows((rows, prompt), jnp.bool_)
    args = (params, *prompts, site.whole(lambda: jax.random.key(0)))
    cache = prompt + sampling.max_new_tokens, model.arch.head_dim
    return Program(name, sampler, args, (held, args), trips=max(1, sampling.max_new_tokens - 1), cache=cache)
