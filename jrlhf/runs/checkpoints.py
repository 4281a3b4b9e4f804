"""Run state on disk: atomic, asynchronous, checked, kept by age and by merit, onto any mesh. The only Orbax import."""

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

log = logging.getLogger(__name__)

BestMode = Literal["min", "max"]

FORMAT = 1
"""Of a step's folder. A change that an older version cannot read gets a new number, and a way to read the old one."""
SET_ASIDE = "damaged"
"""Where below the checkpoints those steps go that are not as they were written."""
STATE, NOTES = "state", "notes.json"
PARTIAL, REMOVED = ".partial", ".removed"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or fitted to the state it is asked for."""


class Checkpoints:
    """The checkpoints of one stage: ``folder/<step>/{state, notes.json, manifest.json}``, each whole or not there.

    A step gets its name when all of it is on the disk, its checksums (``manifest.json``) last. Kept are the newest
    ``keep`` and the ``keep_best`` with the best ``metrics[best_metric]``; an old step goes only after the new one is
    whole. Writing goes on in the background; an error in it is raised by the next ``save``, ``wait``, ``surface`` or
    ``close``. Several processes may read a folder; of those that save together the first one names and deletes.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_best: int, best_metric: str | None, best_mode: BestMode
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if keep_best and best_metric is None:
            raise ValueError("keep_best needs a best_metric to go by")
        self.folder = folder.absolute()
        self._keep, self._keep_best = keep, keep_best
        self._best_metric, self._sign = best_metric, -1.0 if best_mode == "min" else 1.0
        self._arrays = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: Any, *, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Start writing ``state`` (a pytree of arrays) and ``metadata`` (JSON) as one step.

        The state is copied before this returns: the caller may donate it at once. ValueError for a step that is not
        newer than the newest.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not newer than checkpoint {self.folder / str(latest)}")
        leaves, notes = to_storable(state), json.dumps({"metadata": metadata, "metrics": metrics or {}})
        partial = self.folder / f"{step}{PARTIAL}"
        with self._errors(f"step {step} was not saved to {self.folder}"):
            if jax.process_index() == 0:
                self._clear_leftovers()
                partial.mkdir(parents=True)
            self._arrays.save(partial / STATE, args=ocp.args.PyTreeSave(leaves))
        self._writing = self._thread.submit(self._finish, step, partial, notes)

    def _finish(self, step: int, partial: Path, notes: str) -> None:
        """In the background: when the arrays are written, the rest, the name, and then what is not kept any more."""
        self._arrays.wait_until_finished()
        if jax.process_index() != 0:
            return
        (partial / NOTES).write_text(notes, encoding="utf-8")
        write_manifest(partial, form=FORMAT)
        partial.rename(self.folder / str(step))
        _sync_names(self.folder)
        for old in self._superseded():
            # A folder that is half deleted must not bear a step's name.
            removed = (self.folder / str(old)).rename(self.folder / f"{old}{REMOVED}")
            shutil.rmtree(removed)

    def steps(self) -> list[int]:
        """Whole steps, oldest first. Waits for a step that is being written."""
        self.wait()
        return self._named()

    def latest_step(self) -> int | None:
        """The newest whole step; None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The whole step with the best metric; None where no step has one."""
        return next(iter(self._by_merit(self.steps())), None)

    def newest_sound_step(self) -> int | None:
        """The newest step whose files are as they were written; None where there has never been a step.

        Damaged newer ones are named in a warning and moved to ``damaged/``, where nothing deletes them. CheckpointError
        where no step is left: a run must not start over in silence.
        """
        lost: list[str] = []
        for step in reversed(self.steps()):
            wrong = self._damage(step)
            if not wrong:
                if lost:
                    log.warning("%s; going on from step %d", "; ".join(lost), step)
                return step
            where = self._set_aside(step)
            lost.append(
                f"checkpoint {self.folder / str(step)} is damaged ({_shortened(wrong)}) and set aside in {where}"
            )
        if lost or (self.folder / SET_ASIDE).is_dir():
            reason = "; ".join(lost) or f"those in {self.folder / SET_ASIDE} are damaged"
            raise CheckpointError(f"no checkpoint can be used: {reason}. To start anew, remove {self.folder}")
        return None

    def check(self, step: int) -> None:
        """CheckpointError, naming the files, where those of a step are not as they were written."""
        if wrong := self._damage(step):
            raise CheckpointError(f"checkpoint {self.folder / str(step)} is damaged: {_shortened(wrong)}")

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step."""
        self.wait()
        return self._notes(step)["metadata"]

    def restore(self, step: int, like: Any, *, part: str = "") -> Any:
        """The state saved at a step, bit for bit, in the structure and shardings of ``like``.

        ``like``: the state itself or its ``ShapeDtypeStruct``s; a leaf without a sharding goes to the first device.
        ``part``: the path of the subtree ``like`` stands for, as ``"train/params/policy"``; the rest is not read.
        CheckpointError names every leaf that is missing, unknown, or of another shape or dtype.
        """
        self.wait()
        where = self.folder / str(step)
        prefix = f"{part}/" if part else ""
        leaves = {prefix + path: leaf for path, leaf in by_path(like, jax.Array | jax.ShapeDtypeStruct).items()}
        wanted = {path: stored_form(leaf) for path, leaf in leaves.items()}
        with self._errors(f"cannot read checkpoint {where}"):
            stored = self._arrays.metadata(where / STATE).item_metadata
            if stored is None:
                raise FileNotFoundError(f"{where} has no readable state")
        found = {path: have for path, have in stored.tree.items() if path.startswith(prefix)}
        if problems := differences(found, wanted):
            raise CheckpointError(f"checkpoint {where} does not fit this run's state: " + "; ".join(problems))
        with self._errors(f"cannot read checkpoint {where}"):
            read = ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            )
            restored = self._arrays.restore(where / STATE, args=read)
        values = [from_stored(restored[path], leaf) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong while it was."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._errors(f"a checkpoint was not saved to {self.folder}"):
                writing.result()

    def surface(self) -> None:
        """Raise what went wrong in a save that has ended by itself; returns at once, whether or not one goes on."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """``wait``, then let go of threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._arrays.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _named(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _notes(self, step: int) -> dict[str, Any]:
        with self._errors(f"cannot read the notes of checkpoint {self.folder / str(step)}"):
            return json.loads((self.folder / str(step) / NOTES).read_text(encoding="utf-8"))

    def _merit(self, step: int) -> float:
        metrics: Mapping[str, float] = self._notes(step)["metrics"]
        value = float(metrics.get(self._best_metric or "", math.nan))
        return -math.inf if math.isnan(value) else self._sign * value

    def _by_merit(self, steps: list[int]) -> list[int]:
        """Those that have any, the best first, the newer first among equals."""
        measured = [(merit, step) for step in steps if (merit := self._merit(step)) > -math.inf]
        return [step for _, step in sorted(measured, reverse=True)]

    def _superseded(self) -> list[int]:
        """Neither among the newest nor among the best."""
        steps = self._named()
        best = self._by_merit(steps)[: self._keep_best]
        return [step for step in steps[: -self._keep] if step not in best]

    def _damage(self, step: int) -> list[str]:
        try:
            return damage(self.folder / str(step), form=FORMAT)
        except UnknownFormat as error:
            raise CheckpointError(str(error)) from None

    def _set_aside(self, step: int) -> Path:
        beside = self.folder / SET_ASIDE
        beside.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(2)))
        target = next(path for name in names if not (path := beside / name).exists())
        return (self.folder / str(step)).rename(target)

    def _clear_leftovers(self) -> None:
        """What a save or a deletion left that was cut short."""
        for end in (PARTIAL, REMOVED):
            for left_over in self.folder.glob(f"*{end}"):
                shutil.rmtree(left_over)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Whatever Orbax raises, of whichever kind, becomes a CheckpointError with its reason."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def _sync_names(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _shortened(lines: list[str], *, most: int = 3) -> str:
    return "; ".join([*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])])
