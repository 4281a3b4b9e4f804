"""Run state on disk: atomic, asynchronous, kept by age and by merit, restored onto any mesh. The only Orbax import."""

import copy
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

BestMode = Literal["min", "max"]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or fitted to the state it is asked for."""


class RunLocked(RuntimeError):
    """A run folder that a live process is using."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; RunLocked, naming the other's pid, where another one holds it.

    The kernel releases the lock when the process ends, however it ends: there is no stale lock to remove. In a run over
    several hosts only the first one takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"{folder} is in use by process {file.read().strip() or 'unknown'}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Checkpoints:
    """The checkpoints of one stage: ``folder/<step>/{state, metadata}``, each step whole or not there at all.

    Kept are the newest ``keep`` and the ``keep_best`` with the best ``metrics[best_metric]``; an old step goes only
    after the new one is whole. Writing goes on in the background; an error in it is raised by the next ``save``,
    ``wait`` or ``close``. Several processes may read a folder, one may write.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_best: int, best_metric: str | None, best_mode: BestMode
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if keep_best and best_metric is None:
            raise ValueError("keep_best needs a best_metric to go by")
        self.folder = folder.absolute()
        self._ready = False

        def merit(metrics: Mapping[str, float] | None) -> float:
            value = float((metrics or {}).get(best_metric or "", math.nan))
            return -math.inf if math.isnan(value) else -value if best_mode == "min" else value

        self._merit = merit
        with self._errors(f"cannot open the checkpoints in {self.folder}"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    create=False, best_fn=merit, preservation_policy=_NewestAndBest(keep, keep_best, merit)
                ),
                handler_registry=_handlers(),
            )

    def save(self, step: int, state: Any, *, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Start writing ``state`` (a pytree of arrays) and ``metadata`` (JSON) as one step.

        The state is copied before this returns: the caller may donate it at once. ValueError for a step that is not
        newer than the newest.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not newer than checkpoint {self.folder / str(latest)}")
        self._make_ready()
        # Metadata is written in the background: the caller may change it meanwhile.
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_to_storable(state)), metadata=ocp.args.JsonSave(copy.deepcopy(metadata))
        )
        with self._errors(f"step {step} was not saved to {self.folder}"):
            self._manager.save(step, args=items, metrics=metrics or {}, force=True)

    def latest_step(self) -> int | None:
        """The newest whole step; None where there is none. Waits for a step that is being written."""
        self.wait()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The whole step with the best metric; None where no step has one."""
        self.wait()
        ranked = [(self._merit(self._manager.metrics(step)), step) for step in self._manager.all_steps()]
        return max((pair for pair in ranked if pair[0] > -math.inf), default=(0.0, None))[1]

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step."""
        self.wait()
        with self._errors(f"cannot read the metadata of checkpoint {self.folder / str(step)}"):
            return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def restore(self, step: int, like: Any, *, part: str = "") -> Any:
        """The state saved at a step, bit for bit, in the structure and shardings of ``like``.

        ``like``: the state itself or its ``ShapeDtypeStruct``s; a leaf without a sharding goes to the first device.
        ``part``: the path of the subtree ``like`` stands for, as ``"train/params/policy"``; the rest is not read.
        CheckpointError names every leaf that is missing, unknown, or of another shape or dtype.
        """
        self.wait()
        where = self.folder / str(step)
        prefix = f"{part}/" if part else ""
        leaves = {prefix + path: leaf for path, leaf in _by_path(like, jax.Array | jax.ShapeDtypeStruct).items()}
        wanted = {path: _stored_form(leaf) for path, leaf in leaves.items()}
        with self._errors(f"cannot read checkpoint {where}"):
            stored = self._manager.item_metadata(step)["state"]
            if stored is None:
                raise FileNotFoundError(f"{where} has no readable state")
        problems = _differences({path: have for path, have in stored.items() if path.startswith(prefix)}, wanted)
        if problems:
            raise CheckpointError(f"checkpoint {where} does not fit this run's state: " + "; ".join(problems))
        with self._errors(f"cannot read checkpoint {where}"):
            read = ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            )
            restored = self._manager.restore(step, args=ocp.args.Composite(state=read))["state"]
        values = [_from_stored(restored[path], leaf) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong while it was."""
        try:
            with self._errors(f"a checkpoint was not saved to {self.folder}"):
                self._manager.wait_until_finished()
        except CheckpointError:
            # Orbax forgets the steps it is about to delete before the new one is whole; they are still there.
            self._manager.reload()
            self._ready = False
            raise

    def close(self) -> None:
        """``wait``, then let go of threads."""
        with self._errors(f"a checkpoint was not saved to {self.folder}"):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _make_ready(self) -> None:
        """Before the first save and after a failed one: make the folder, and clear what was left half-written."""
        if not self._ready:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for left_over in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            self._ready = True

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Whatever Orbax raises, of whichever kind, becomes a CheckpointError with its reason."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _NewestAndBest:
    """Which steps stay: the newest ones, and besides those with the highest merit, the newer first among equals."""

    newest: int
    best: int
    merit: Callable[[Mapping[str, float] | None], float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax's ``PreservationPolicy``: a flag for each of its ``PolicyCheckpointInfo``s, oldest first."""
        del context
        measured = [info for info in checkpoints if self.merit(info.metrics) > -math.inf]
        ranked = sorted(measured, key=lambda info: (self.merit(info.metrics), info.step), reverse=True)
        kept = {info.step for info in [*ranked[: self.best], *checkpoints[-self.newest :]]}
        return [info.step in kept for info in checkpoints]


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, save, restore, handler in (
        ("state", ocp.args.PyTreeSave, ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler()),
        ("metadata", ocp.args.JsonSave, ocp.args.JsonRestore, ocp.JsonCheckpointHandler()),
    ):
        registry.add(item, save, handler)
        registry.add(item, restore, handler)
    return registry


def _by_path(tree: Any, kind: Any) -> dict[str, Any]:
    """Leaves by path (``"params/policy/embed"``): what a checkpoint stores, and what its errors name."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, kind):
            raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a JAX array (plain values: metadata)")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name}")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_storable(state: Any) -> dict[str, jax.Array]:
    """The state by path, typed PRNG keys as the integers they are made of."""
    leaves = _by_path(state, jax.Array)
    return {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items()}


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What ``leaf`` is on disk, and where it is to go."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _from_stored(leaf: jax.Array, like: Any) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=_key_impl(like)) if _is_key(like) else leaf


def _key_impl(like: Any) -> Any:
    """The generator of a typed key that may be a mere shape: JAX tells it of a traced key only."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return found[0]


def _differences(stored: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What keeps a stored state from being the wanted one, a line a leaf."""
    problems = [f"{path} is not in the checkpoint" for path in sorted(wanted.keys() - stored.keys())]
    problems += [f"{path} is in the checkpoint only" for path in sorted(stored.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & stored.keys()):
        have, want = stored[path], wanted[path]
        if tuple(have.shape) != want.shape or have.dtype != want.dtype:
            problems.append(f"{path} is {have.dtype}{list(have.shape)} there and {want.dtype}{list(want.shape)} here")
    return problems
