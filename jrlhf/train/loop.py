"""The loop that all stages share: it steps, logs, evaluates, saves, and resumes after an interruption."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from jrlhf.config import CheckpointConfig, LogConfig
from jrlhf.parallel import is_first
from jrlhf.parallel.compilation import counted_compilations
from jrlhf.parallel.hosts import AnyProcess, first_goes_ahead, from_first
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.metrics import MetricsLog, progress
from jrlhf.runs.trackers import Tracker, TrackerThread, make_trackers
from jrlhf.train.attempt import Attempt, Loop, OnEvent, Outcome, no_event, restore_state
from jrlhf.train.signals import Interrupted, stop_request
from jrlhf.train.state import RunState, abstract, saved_part


def run_loop(
    loop: Loop,
    state: RunState,
    *,
    folder: Path,
    log: LogConfig,
    checkpoint: CheckpointConfig,
    metadata: dict[str, Any],
    on_event: OnEvent = no_event,
) -> Outcome:
    """Run the loop to ``loop.total`` steps, from the newest sound checkpoint in ``folder`` or else from ``state``.

    Every checkpoint holds ``metadata``, and the loop calls ``on_event`` with every event.

    On SIGINT or SIGTERM the loop saves the state and raises ``Interrupted``. It raises ``FloatingPointError`` after too
    many skipped steps in a row, or if a metric of any other step is not finite, and ``GuardStop`` when a guard stops
    the run; both leave the last checkpoint as it was.
    """
    store = Checkpoints(
        folder / "checkpoints",
        keep=checkpoint.keep,
        keep_best=checkpoint.keep_best,
        best_metric=loop.best_metric,
        best_mode=loop.best_mode,
    )
    with store as checkpoints, stop_request() as stop, counted_compilations() as compiled:
        state, past = _resume(checkpoints, state)
        start = int(state.cursor)
        trackers = _trackers(folder, log, metadata, resumed=bool(past))
        with (
            MetricsLog(
                folder,
                tensorboard=log.tensorboard,
                resume_step=start if past else None,
                enabled=is_first(),
                trackers=trackers,
            ) as writer,
            progress(loop.total, loop.title, start=start, enabled=log.progress and is_first()) as bar,
        ):
            run = Attempt(loop, state, past, folder, metadata, checkpoints, writer, on_event)
            if past:
                run.check_gates()
            else:
                run.begin()
            any_stop = AnyProcess()
            for done in range(start + 1, loop.total + 1):
                if run.ended or any_stop(bool(stop)):
                    break
                rolled_back = run.step(done)
                ends = done == loop.total
                saves = ends or rolled_back or done % checkpoint.every == 0
                if saves or done % log.every == 0:
                    line = run.write_line(done, compiled)
                    bar.update(done, {name: line[name] for name in loop.shown if name in line})
                if ends or done % log.eval_every == 0:
                    run.evaluate(done)
                if saves:
                    run.save()
            reached = run.wait()
            if reached < loop.total and not run.ended:
                # A launcher may kill all processes once one exits, so each waits until the state is saved.
                from_first("save its state", lambda: None)
                where = f"stopped at step {reached} of {loop.total}, saved in {folder / 'checkpoints'}"
                raise Interrupted(where, stop.number or signal.SIGTERM)
            return run.outcome()


def _trackers(folder: Path, log: LogConfig, metadata: Mapping[str, Any], *, resumed: bool) -> TrackerThread | None:
    """Start the trackers in the first process, and pass them the config but no other metadata."""
    trackers: dict[str, Tracker] = {}
    with first_goes_ahead("find its trackers"):
        if is_first():
            trackers = make_trackers(log)
    if not trackers:
        return None
    about = yaml.safe_load(metadata.get("config", "")) or {}
    return TrackerThread(trackers, folder, project=log.project, about=about, resumed=resumed)


def _resume(checkpoints: Checkpoints, state: RunState) -> tuple[RunState, dict[str, Any]]:
    """Return the state and the metadata of the newest sound checkpoint; without one, ``state`` and an empty dict."""
    newest = from_first("find its newest checkpoint", checkpoints.newest_sound_step)
    if newest is None:
        return state, {}
    frozen, like = state.train.frozen, abstract(saved_part(state))
    # Memory holds one state: callers still refer to the first one, but nobody reads it once there is another.
    jax.tree.map(lambda x: x.delete(), saved_part(state).train)
    like = like._replace(train=like.train._replace(frozen=frozen))
    return restore_state(checkpoints, newest, like), checkpoints.metadata(newest)
