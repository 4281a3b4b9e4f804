"""The loop that all stages share: step, log, evaluate, save; and come back where it left."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jrlhf.config import CheckpointConfig, LogConfig
from jrlhf.parallel import is_first
from jrlhf.parallel.compilation import counted_compilations
from jrlhf.parallel.hosts import AnyProcess, first_goes_ahead, from_first
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.metrics import MetricsLog, progress
from jrlhf.runs.trackers import Tracker, TrackerThread, make_trackers
from jrlhf.train.attempt import Attempt, Loop, OnEvent, Outcome, no_event, restored
from jrlhf.train.signals import Interrupted, stop_request
from jrlhf.train.state import RunState


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
    """Take ``state`` to ``loop.total`` steps, or from the newest sound checkpoint in ``folder`` where there is one.

    ``metadata`` is saved with every checkpoint, and ``on_event`` is called with every event.

    Raises ``Interrupted`` on SIGINT or SIGTERM, when the state is saved. ``FloatingPointError``, where too many steps
    are skipped in a row or a metric of one that was made is not finite, and ``GuardStop`` leave the newest checkpoint
    of before.
    """
    saved = Checkpoints(
        folder / "checkpoints",
        keep=checkpoint.keep,
        keep_best=checkpoint.keep_best,
        best_metric=loop.best_metric,
        best_mode=loop.best_mode,
    )
    with saved as checkpoints, stop_request() as stop, counted_compilations() as compiled:
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
                run.know_gates()
            else:
                run.begin()
            asked = AnyProcess()
            for done in range(start + 1, loop.total + 1):
                if run.ended or asked(bool(stop)):
                    break
                rolled_back = run.step(done)
                ends = done == loop.total
                saves = ends or rolled_back or done % checkpoint.every == 0
                if saves or done % log.every == 0:
                    shown = run.write_line(done, compiled)
                    bar.update(done, {name: shown[name] for name in loop.shown if name in shown})
                if ends or done % log.eval_every == 0:
                    run.evaluate(done)
                if saves:
                    run.save()
            reached = run.wait()
            if reached < loop.total and not run.ended:
                # An engine may end all as soon as one has left: none leaves before the state is whole.
                from_first("save its state", lambda: None)
                where = f"stopped at step {reached} of {loop.total}, saved in {folder / 'checkpoints'}"
                raise Interrupted(where, stop.number or signal.SIGTERM)
            return run.outcome()


def _trackers(folder: Path, log: LogConfig, metadata: Mapping[str, Any], *, resumed: bool) -> TrackerThread | None:
    """Of the first process alone. They are told the config, and no more of ``metadata``."""
    made: dict[str, Tracker] = {}
    with first_goes_ahead("find its trackers"):
        if is_first():
            made = make_trackers(log)
    about = yaml.safe_load(metadata.get("config", "")) or {}
    return TrackerThread(made, folder, project=log.project, about=about, resumed=resumed) if made else None


def _resume(checkpoints: Checkpoints, state: RunState) -> tuple[RunState, dict[str, Any]]:
    """The newest saved state and what was known then, or ``state`` and nothing."""
    newest = from_first("find its newest checkpoint", checkpoints.newest_sound_step)
    return (state, {}) if newest is None else (restored(checkpoints, newest, state), checkpoints.metadata(newest))
