"""State of a running stage: stepping, logging, evaluating, saving, rolling back."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.config import CanaryConfig, ConfigError
from jrlhf.config.gates import all_pass, unknown_metrics
from jrlhf.config.watch import RolloutGuardsConfig
from jrlhf.parallel import is_first
from jrlhf.parallel.compilation import Compilations
from jrlhf.parallel.hosts import from_first
from jrlhf.runs.checkpoints import BestMode, Checkpoints
from jrlhf.runs.metrics import MetricsLog
from jrlhf.train.canary import Canary
from jrlhf.train.guards import GuardStop, Watch
from jrlhf.train.optim import rate_factor
from jrlhf.train.state import RunState, abstract, saved_part
from jrlhf.train.window import Rate, Window
from jrlhf.types import Metrics

logger = logging.getLogger(__name__)


class Loop(NamedTuple):
    """The parts of the training loop that differ between stages."""

    title: str
    total: int
    advance: Callable[[RunState, int], tuple[RunState, Metrics]]
    """Run step number i. It may return before the device is done: the loop waits only to log."""
    evaluate: Callable[[RunState, int], dict[str, float]]
    """Return held-out metrics after i steps; the dict is empty without held-out data."""
    guards: RolloutGuardsConfig | None
    """Guards on PPO's rollouts; None in the other stages."""
    canary: CanaryConfig | None
    """Canary on PPO's evaluations; None in the other stages."""
    gates: tuple[str, ...]
    """Bounds on the held-out figures of the exported state."""
    batch_of: Callable[[RunState, int], dict[str, np.ndarray]]
    """Return the arrays that step number i reads, by name; the loop dumps them if training on them fails."""
    max_skipped: int
    """Number of consecutive skipped steps that end the run."""
    learning_rate: Callable[[int], Any]
    rates: tuple[Rate, ...]
    best_metric: str
    """Metric of an evaluation that ranks states. With gates or a canary, the loop returns the best passing state."""
    best_mode: BestMode
    shown: tuple[str, ...]
    """The metrics that the progress bar shows."""
    maxima: tuple[str, ...] = ()
    """Metrics that are maxima over the data of a step; a log line has their maximum over its steps."""


EventKind = Literal["begin", "step", "line", "evaluation", "save", "rollback"]


class Event(NamedTuple):
    """An action that the loop has just finished."""

    kind: EventKind
    step: int
    """Number of finished steps at that time."""
    state: RunState
    figures: Mapping[str, Any]
    """Metrics of the step (not awaited), the line or the evaluation; for a rollback ``to``; otherwise empty."""


OnEvent = Callable[[Event], None]


def no_event(event: Event) -> None:
    """Ignore an event."""


class Outcome(NamedTuple):
    """The result of the loop: a state and its evaluation."""

    state: RunState
    step: int
    """Number of steps that led to ``state``."""
    first: dict[str, float]
    """Evaluation before the first step."""
    last: dict[str, float]
    """Evaluation of ``state``."""
    seconds: float
    """Wall time of the loop over all attempts, including compilation and evaluation."""


def restore_state(checkpoints: Checkpoints, step: int, like: RunState) -> RunState:
    """Read the checkpoint of ``step``, and add the frozen weights of ``like``, which no checkpoint holds."""
    state: RunState = checkpoints.restore(step, abstract(saved_part(like)))
    return state._replace(train=state.train._replace(frozen=like.train.frozen))


class Attempt:
    """One process's attempt at a run: the state, and the notes for its log and its checkpoints."""

    def __init__(
        self,
        loop: Loop,
        state: RunState,
        past: Mapping[str, Any],
        folder: Path,
        metadata: dict[str, Any],
        checkpoints: Checkpoints,
        writer: MetricsLog,
        on_event: OnEvent,
    ) -> None:
        self._on_event = on_event
        self._loop, self._folder, self._metadata = loop, folder, metadata
        self._checkpoints, self._writer = checkpoints, writer
        self.state = state
        self.first: dict[str, float] = past.get("first", {})
        self.last: dict[str, float] = past.get("last", {})
        self._began = time.perf_counter() - past.get("seconds", 0.0)
        self._skipped_in_row: int = past.get("skipped_in_row", 0)
        self._window = Window(loop.rates, maxima=loop.maxima, snapshot=past.get("window"))
        self._watch = None if loop.guards is None else Watch(loop.guards, past.get("guards"))
        self._canary = None
        if loop.canary is not None and loop.canary.action != "off":
            self._canary = Canary(loop.canary, loop.best_metric, past.get("canary"))
        self.ended: bool = past.get("ended", False)
        """Whether the canary has ended the run before its last step."""
        self._saved_at = int(state.cursor)
        self._evaluated: bool = past.get("evaluated", False)
        """Whether ``last`` is the evaluation of the current state."""

    def _emit(self, kind: EventKind, step: int, figures: Mapping[str, Any]) -> None:
        self._on_event(Event(kind, step, self.state, figures))

    def seconds(self) -> float:
        """Return the wall time of the run over all attempts."""
        return time.perf_counter() - self._began

    def begin(self) -> None:
        """Evaluate, and save if a rollback is possible, before the first step of the run."""
        self.first = self.last = self._loop.evaluate(self.state, 0)
        self._evaluated = True
        self.check_gates()
        self._writer.write(0, self.first)
        self._emit("begin", 0, self.first)
        if self._canary is not None:
            self._canary.compare(0, self.first, passes=all_pass(self._loop.gates, self.first))
        if self._canary is not None or (self._watch is not None and self._watch.can_roll_back):
            self.save()

    def check_gates(self) -> None:
        """Raise ConfigError for a gate on a figure that no evaluation has."""
        if unknown := unknown_metrics(self._loop.gates, self.first):
            names = ", ".join(name.removeprefix("eval/") for name in self.first)
            raise ConfigError(
                f"gates: {self._loop.title} has no held-out figure {', '.join(unknown)}; there are {names}"
            )

    def step(self, done: int) -> bool:
        """Run step number ``done``, counted from 1; return whether a guard rolled the run back."""
        self._checkpoints.surface()
        self.state, metrics = self._loop.advance(self.state, done - 1)
        self._evaluated = False
        self._window.add(metrics)
        self._emit("step", done, metrics)
        if self._watch is None:
            return False
        alarms = self._watch.check(metrics)
        for alarm in alarms:
            self._writer.event(done, "guard", **alarm._asdict())
            logger.warning("step %d: %s", done, alarm)
        if stops := [str(alarm) for alarm in alarms if alarm.action == "stop"]:
            raise GuardStop(f"step {done}: {'; '.join(stops)}")
        rolls_back = any(alarm.action == "rollback" for alarm in alarms)
        if rolls_back:
            self._roll_back(self._watch, done)
        return rolls_back

    def _roll_back(self, watch: Watch, done: int) -> None:
        # The rollout of step n measures the state after n - 1 steps, so the state before the first crossing is bad.
        good = self._go_back(watch, done, lambda: self._newest_calm(done - watch.crossings))
        if good is None:
            raise GuardStop(f"step {done}: no checkpoint is older than the first crossing; raise checkpoint.keep")

    def _newest_calm(self, before: int) -> int | None:
        steps = (step for step in reversed(self._checkpoints.steps()) if step < before)
        return next((step for step in steps if self._checkpoints.metadata(step)["calm"]), None)

    def _go_back(self, watch: Watch, done: int, choose: Callable[[], int | None]) -> int | None:
        """Restore the checkpoint that the first process chooses and return its step; return None without one."""
        checkpoints = self._checkpoints

        def choose_sound() -> int | None:
            good = choose()
            if good is not None:
                checkpoints.check(good)
            return good

        good = from_first("choose the checkpoint to go back to", choose_sound)
        if good is None:
            return None
        self.state = watch.rollback_state(self.state, restore_state(checkpoints, good, self.state))
        self._evaluated = False
        rate, beta = float(rate_factor(self.state.train.opt_state)), float(self.state.kl_coef)
        self._writer.event(done, "rollback", to=good, rate_factor=rate, kl_coef=beta)
        self._emit("rollback", done, {"to": good})
        logger.warning("step %d: back to the state of step %d, learning rate x %.3g, beta %.3g", done, good, rate, beta)
        return good

    def write_line(self, done: int, compiled: Compilations) -> dict[str, float]:
        """Log the steps since the last line. Raise FloatingPointError, before a save, if a metric is not finite."""
        any_update = not all(self._note_skipped(done))
        rate = float(self._loop.learning_rate(max(int(self.state.train.step) - 1, 0)))
        if self._watch is not None:
            rate *= float(rate_factor(self.state.train.opt_state))
        line = self._window.close() | {"lr": rate}
        line |= {"compile/programs": compiled.programs, "compile/seconds": compiled.seconds}
        self._writer.write(done, line)
        self._emit("line", done, line)
        bad_names = sorted(name for name, value in line.items() if not np.isfinite(value))
        # Skipped steps do not change the state, and they count in a mean only if all steps were skipped.
        if bad_names and any_update:
            raise FloatingPointError(f"step {done}: {', '.join(bad_names)} not finite; the state is not saved")
        return line

    def _note_skipped(self, done: int) -> list[bool]:
        """Return whether each step was skipped, and log each skipped one.

        After too many in a row, write a dump of the batch and raise FloatingPointError.
        """
        skipped = self._window.skipped()
        for number, is_skipped in enumerate(skipped, done + 1 - len(skipped)):
            self._skipped_in_row = self._skipped_in_row + 1 if is_skipped else 0
            if is_skipped:
                self._writer.event(number, "skipped", in_a_row=self._skipped_in_row)
                logger.warning("step %d skipped: its loss or gradient is not finite", number)
            if self._skipped_in_row >= self._loop.max_skipped:
                dump = self._folder / f"skipped-{number}.npz"
                # Skipped steps leave the state as it was, so unless a later step changed it this repeats the rollout.
                batch = self._loop.batch_of(self.state, number - 1)
                if is_first():
                    np.savez(dump, allow_pickle=False, **batch)
                raise FloatingPointError(
                    f"step {number}: loss or gradient not finite, {self._skipped_in_row} steps in a row; no state was "
                    f"saved since the last good step; the batch of step {number} is in {dump}"
                )
        return skipped

    def evaluate(self, done: int) -> None:
        """Evaluate the state after ``done`` steps, log the figures and let the canary compare them."""
        with self._window.apart("evaluation", self.state):
            self.last = self._loop.evaluate(self.state, done)
        self._evaluated = True
        self._writer.write(done, self.last)
        self._emit("evaluation", done, self.last)
        if self._canary is not None and self._watch is not None:
            self._handle_regression(self._canary, self._watch, done)

    def _handle_regression(self, canary: Canary, watch: Watch, done: int) -> None:
        """On a regression warn, roll the run back to its best state or end it, as the config says."""
        regression = canary.compare(done, self.last, passes=all_pass(self._loop.gates, self.last))
        if regression is None:
            return
        self._writer.event(done, "canary", **regression._asdict(), action=canary.action)
        logger.warning("step %d: %s", done, regression)
        if canary.action == "warn":
            return
        if canary.action == "rollback" and watch.has_rollback:

            def best_or_calm() -> int | None:
                best = self._checkpoints.best_step()
                return self._newest_calm(done) if best is None else best

            if self._go_back(watch, done, best_or_calm) is not None:
                return
        self.ended = True
        self._writer.event(done, "ended", rollbacks=watch.rollbacks)
        logger.warning("step %d: the run ends here", done)

    def save(self) -> None:
        """Save the state, and the notes that a resumed run needs to end exactly as this one."""
        self._saved_at = int(self.state.cursor)
        notes = {"first": self.first, "last": self.last, "seconds": self.seconds(), "window": self._window.keep()}
        notes |= {"skipped_in_row": self._skipped_in_row, "evaluated": self._evaluated, "ended": self.ended}
        if self._canary is not None:
            notes["canary"] = self._canary.keep()
        if self._watch is not None:
            notes |= {"guards": self._watch.keep(), "calm": not self._watch.crossings}
        # Only the state's own evaluation ranks it, and a state that fails a gate has no rank.
        merits = self.last if self._evaluated and all_pass(self._loop.gates, self.last) else {}
        with self._window.apart("checkpoint", self.state):
            self._writer.sync()
            self._checkpoints.save(
                self._saved_at, saved_part(self.state), metadata=self._metadata | notes, metrics=merits
            )
        self._emit("save", self._saved_at, {})

    def wait(self) -> int:
        """Save the state if needed, wait until it is on disk, and return its number of steps."""
        if int(self.state.cursor) != self._saved_at:
            self.save()
        self._checkpoints.wait()
        return self._saved_at

    def outcome(self) -> Outcome:
        """Return the last state, or with gates or a canary the best saved one."""
        seconds = self.seconds()
        chooses = self._canary is not None or bool(self._loop.gates)
        best = from_first("choose the best checkpoint", self._checkpoints.best_step) if chooses else None
        if best is None:
            return Outcome(self.state, self._saved_at, self.first, self.last, seconds)
        state = restore_state(self._checkpoints, best, self.state)
        return Outcome(state, best, self.first, self._checkpoints.metadata(best)["last"], seconds)
