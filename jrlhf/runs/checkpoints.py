"""Checkpoints: atomic, asynchronous, checksummed, and restorable onto any mesh. Only this module imports Orbax."""

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from jrlhf.runs.leaves import by_path, differences, from_stored, stored_form, to_storable
from jrlhf.runs.manifest import UnknownFormat, damage, write_manifest
from jrlhf.system.errors import RunError, reason_of

log = logging.getLogger(__name__)

BestMode = Literal["min", "max"]

FORMAT_VERSION = 1
"""Version of a step folder's format. An incompatible change needs a new number and code that reads the old one."""
DAMAGED_FOLDER = "damaged"
"""Subfolder for damaged steps."""
STATE_FOLDER, NOTES_FILE = "state", "notes.json"
PARTIAL_SUFFIX, REMOVED_SUFFIX = ".partial", ".removed"


class CheckpointError(RunError):
    """A checkpoint cannot be written or read, or does not fit the state of the run."""


class Checkpoints:
    """The checkpoints of one stage in ``folder/<step>/{state, notes.json, manifest.json}``.

    A step's folder gets its name once all of it is on disk, with the checksums in ``manifest.json`` written last, so a
    step is always complete. The newest ``keep`` steps and the ``keep_best`` steps with the best metric ``best_metric``
    stay; an old step is deleted only after the new one is complete. Writing happens in the background, and its errors
    are raised by the next ``save``, ``wait``, ``surface`` or ``close``. Several processes may read a folder; if they
    save together, the first one renames and deletes.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_best: int, best_metric: str | None, best_mode: BestMode
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if keep_best and best_metric is None:
            raise ValueError("keep_best needs a best_metric")
        self.folder = folder.absolute()
        self._keep, self._keep_best = keep, keep_best
        self._best_metric, self._sign = best_metric, -1.0 if best_mode == "min" else 1.0
        # Hosts share the work of writing what they all hold. In one process it would only be cut, by a program a slice,
        # all of which the first save compiles.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._arrays = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: Any, *, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Start writing ``state`` (a pytree of arrays) and ``metadata`` (JSON) as one step.

        The state is copied before this returns, so the caller may donate it. Raises ValueError for a step that is not
        newer than the latest one.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not newer than checkpoint {self.folder / str(latest)}")
        leaves, notes = to_storable(state), json.dumps({"metadata": metadata, "metrics": metrics or {}})
        partial = self.folder / f"{step}{PARTIAL_SUFFIX}"
        with self._errors(f"step {step} was not saved to {self.folder}"):
            if jax.process_index() == 0:
                self._clear_leftovers()
                partial.mkdir(parents=True)
            self._arrays.save(partial / STATE_FOLDER, args=ocp.args.PyTreeSave(leaves))
        self._writing = self._thread.submit(self._finish, step, partial, notes)

    def _finish(self, step: int, partial: Path, notes: str) -> None:
        """In the background, wait for the arrays, write the rest, rename the folder, and delete superseded steps."""
        self._arrays.wait_until_finished()
        if jax.process_index() != 0:
            return
        (partial / NOTES_FILE).write_text(notes, encoding="utf-8")
        write_manifest(partial, form=FORMAT_VERSION)
        partial.rename(self.folder / str(step))
        _sync_names(self.folder)
        for old in self._superseded():
            # A half-deleted folder must not have a step's name.
            removed = (self.folder / str(old)).rename(self.folder / f"{old}{REMOVED_SUFFIX}")
            shutil.rmtree(removed)

    def steps(self) -> list[int]:
        """Return all complete steps, oldest first, after waiting for a step that is being written."""
        self.wait()
        return self._step_folders()

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the complete step with the best metric; None if no step has the metric."""
        return next(iter(self._by_merit(self.steps())), None)

    def newest_sound_step(self) -> int | None:
        """Return the newest step whose files match their checksums; None if there has never been a step.

        Damaged newer steps are moved to ``damaged/``, with a warning, and never deleted. Raises CheckpointError if all
        steps are damaged, so that a run does not silently start over.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            wrong = self._damage(step)
            if not wrong:
                if problems:
                    log.warning("%s; resuming from step %d", "; ".join(problems), step)
                return step
            where = self._move_to_damaged(step)
            problems.append(
                f"checkpoint {self.folder / str(step)} is damaged ({_first_lines(wrong)}) and set aside in {where}"
            )
        if problems or (self.folder / DAMAGED_FOLDER).is_dir():
            reason = "; ".join(problems) or f"those in {self.folder / DAMAGED_FOLDER} are damaged"
            raise CheckpointError(f"no checkpoint can be used: {reason}. To start over, remove {self.folder}")
        return None

    def check(self, step: int) -> None:
        """Raise CheckpointError with the names of a step's damaged files, if any."""
        if wrong := self._damage(step):
            raise CheckpointError(f"checkpoint {self.folder / str(step)} is damaged: {_first_lines(wrong)}")

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata saved with a step."""
        self.wait()
        return self._notes(step)["metadata"]

    def restore(self, step: int, like: Any, *, part: str = "") -> Any:
        """Read the state saved at a step, bit for bit, into the structure and shardings of ``like``.

        ``like`` is a state or its ``ShapeDtypeStruct``s; a leaf without a sharding goes to the first device. ``part``
        is the path of the subtree that ``like`` describes (``train/params/policy``); the rest is not read. Raises
        CheckpointError with the names of all leaves that are missing, unknown, or of another shape or dtype.
        """
        self.wait()
        where = self.folder / str(step)
        prefix = f"{part}/" if part else ""
        leaves = {prefix + path: leaf for path, leaf in by_path(like, jax.Array | jax.ShapeDtypeStruct).items()}
        expected = {path: stored_form(leaf) for path, leaf in leaves.items()}
        with self._errors(f"cannot read checkpoint {where}"):
            stored = self._arrays.metadata(where / STATE_FOLDER).item_metadata
            if stored is None:
                raise FileNotFoundError(f"{where} has no readable state")
        actual = {path: entry for path, entry in stored.tree.items() if path.startswith(prefix)}
        if problems := differences(actual, expected):
            raise CheckpointError(f"checkpoint {where} does not fit this run's state: " + "; ".join(problems))
        with self._errors(f"cannot read checkpoint {where}"):
            read = ocp.args.PyTreeRestore(
                expected, restore_args=ocp.checkpoint_utils.construct_restore_args(expected), partial_restore=True
            )
            restored = self._arrays.restore(where / STATE_FOLDER, args=read)
        values = [from_stored(restored[path], leaf) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the error of a failed save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._errors(f"a checkpoint was not saved to {self.folder}"):
                writing.result()

    def surface(self) -> None:
        """Raise the error of a save that has ended; return at once if a save is still running."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Wait for a running save and end the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._arrays.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _step_folders(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _notes(self, step: int) -> dict[str, Any]:
        with self._errors(f"cannot read the notes of checkpoint {self.folder / str(step)}"):
            return json.loads((self.folder / str(step) / NOTES_FILE).read_text(encoding="utf-8"))

    def _merit(self, step: int) -> float:
        metrics: Mapping[str, float] = self._notes(step)["metrics"]
        value = float(metrics.get(self._best_metric or "", math.nan))
        return -math.inf if math.isnan(value) else self._sign * value

    def _by_merit(self, steps: list[int]) -> list[int]:
        """Return the steps that have the metric, the best first and the newer first among equals."""
        measured = [(merit, step) for step in steps if (merit := self._merit(step)) > -math.inf]
        return [step for _, step in sorted(measured, reverse=True)]

    def _superseded(self) -> list[int]:
        """Return the steps that are neither among the newest nor among the best."""
        steps = self._step_folders()
        best = self._by_merit(steps)[: self._keep_best]
        return [step for step in steps[: -self._keep] if step not in best]

    def _damage(self, step: int) -> list[str]:
        try:
            return damage(self.folder / str(step), form=FORMAT_VERSION)
        except UnknownFormat as error:
            raise CheckpointError(str(error)) from None

    def _move_to_damaged(self, step: int) -> Path:
        beside = self.folder / DAMAGED_FOLDER
        beside.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(2)))
        target = next(path for name in names if not (path := beside / name).exists())
        return (self.folder / str(step)).rename(target)

    def _clear_leftovers(self) -> None:
        """Remove what an interrupted save or deletion left."""
        for end in (PARTIAL_SUFFIX, REMOVED_SUFFIX):
            for left_over in self.folder.glob(f"*{end}"):
                shutil.rmtree(left_over)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn any error of Orbax into a CheckpointError with its reason."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(f"{what}: {reason_of(error)}") from error


def _sync_names(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_lines(lines: list[str], *, most: int = 3) -> str:
    return "; ".join([*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])])
