"""A run on its way: what a step, a line, an evaluation and a save do to it, and what is gone back to."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.config import CanaryConfig, ConfigError
from jrlhf.config.gates import all_pass, unknown_metrics
from jrlhf.config.watch import GuardsConfig
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
    """What differs between stages."""

    title: str
    total: int
    advance: Callable[[RunState, int], tuple[RunState, Metrics]]
    """Step number i. It may return before the device is done: nothing here waits except to log."""
    evaluate: Callable[[RunState, int], dict[str, float]]
    """Held-out metrics after i steps; empty where there is nothing to evaluate on."""
    guards: GuardsConfig | None
    """Of PPO's rollouts."""
    canary: CanaryConfig | None
    """Of PPO's evaluations."""
    gates: tuple[str, ...]
    """What the figures of the state that is exported must keep."""
    batch_of: Callable[[RunState, int], dict[str, np.ndarray]]
    """What step number i reads, by name; to be dumped where it cannot be trained on."""
    max_skipped: int
    """Skipped steps in a row that end the run."""
    learning_rate: Callable[[int], Any]
    rates: tuple[Rate, ...]
    best_metric: str
    """Of an evaluation. Where there are gates or a canary, the best state that keeps the gates is what comes out."""
    best_mode: BestMode
    shown: tuple[str, ...]
    """The metrics that the progress bar shows."""
    maxima: tuple[str, ...] = ()
    """The metrics that are maxima over what a step reads: of several steps, a log line has the greatest."""


EventKind = Literal["begin", "step", "line", "evaluation", "save", "rollback"]


class Event(NamedTuple):
    """Something that the loop has just done."""

    kind: EventKind
    step: int
    """Number of steps done by then."""
    state: RunState
    figures: Mapping[str, Any]
    """Metrics of the step (not awaited), of the line or of the evaluation; ``to`` of a rollback; else empty."""


OnEvent = Callable[[Event], None]


def no_event(event: Event) -> None:
    """Ignore an event."""


class Outcome(NamedTuple):
    state: RunState
    step: int
    """After how many steps that is the state."""
    first: dict[str, float]
    """Evaluation before the first step."""
    last: dict[str, float]
    """Evaluation of ``state``."""
    seconds: float
    """Wall time of the loop over all attempts, compilation and evaluation included."""


def restored(checkpoints: Checkpoints, step: int, like: RunState) -> RunState:
    """What was saved after ``step`` steps, with the frozen weights of ``like``, which no checkpoint holds."""
    found: RunState = checkpoints.restore(step, abstract(saved_part(like)))
    return found._replace(train=found.train._replace(frozen=like.train.frozen))


class Attempt:
    """A run on its way: its state, and what its log and checkpoints need to know besides."""

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
        self._window = Window(loop.rates, maxima=loop.maxima, kept=past.get("window"))
        self._watch = None if loop.guards is None else Watch(loop.guards, past.get("guards"))
        self._canary = None
        if loop.canary is not None and loop.canary.action != "off":
            self._canary = Canary(loop.canary, loop.best_metric, past.get("canary"))
        self.ended: bool = past.get("ended", False)
        """Whether the canary has ended it before its last step."""
        self._saved_at = int(state.cursor)
        self._evaluated: bool = past.get("evaluated", False)
        """Whether ``last`` is of this very state."""

    def _tell(self, kind: EventKind, step: int, figures: Mapping[str, Any]) -> None:
        self._on_event(Event(kind, step, self.state, figures))

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def begin(self) -> None:
        """Before the first step of all: what there is to compare with, and to go back to."""
        self.first = self.last = self._loop.evaluate(self.state, 0)
        self._evaluated = True
        self.know_gates()
        self._writer.write(0, self.first)
        self._tell("begin", 0, self.first)
        if self._canary is not None:
            self._canary.judge(0, self.first, passes=all_pass(self._loop.gates, self.first))
        if self._canary is not None or (self._watch is not None and self._watch.can_roll_back):
            self.save()

    def know_gates(self) -> None:
        """ConfigError for a gate on a figure that no evaluation has."""
        if unknown := unknown_metrics(self._loop.gates, self.first):
            known = ", ".join(name.removeprefix("eval/") for name in self.first)
            raise ConfigError(
                f"gates: {self._loop.title} has no held-out figure {', '.join(unknown)}; there are {known}"
            )

    def step(self, done: int) -> bool:
        """The step that makes ``done`` of them; whether it ended in going back to an earlier state."""
        self._checkpoints.surface()
        self.state, metrics = self._loop.advance(self.state, done - 1)
        self._evaluated = False
        self._window.add(metrics)
        self._tell("step", done, metrics)
        if self._watch is None:
            return False
        alarms = self._watch.judge(metrics)
        for alarm in alarms:
            self._writer.event(done, "guard", **alarm._asdict())
            logger.warning("step %d: %s", done, alarm)
        if ended := [str(alarm) for alarm in alarms if alarm.action == "stop"]:
            raise GuardStop(f"step {done}: {'; '.join(ended)}")
        rolls_back = any(alarm.action == "rollback" for alarm in alarms)
        if rolls_back:
            self._roll_back(self._watch, done)
        return rolls_back

    def _roll_back(self, watch: Watch, done: int) -> None:
        # The rollout of step n tells how the state after n - 1 steps is: of the first that crossed, that state is bad.
        good = self._go_back(watch, done, lambda: self._newest_calm(done - watch.crossings))
        if good is None:
            raise GuardStop(f"step {done}: no checkpoint of before the trouble is left; keep more of them")

    def _newest_calm(self, before: int) -> int | None:
        steps = (step for step in reversed(self._checkpoints.steps()) if step < before)
        return next((step for step in steps if self._checkpoints.metadata(step)["calm"]), None)

    def _go_back(self, watch: Watch, done: int, choose: Callable[[], int | None]) -> int | None:
        """To the checkpoint that the first process chooses; None where there is none."""
        saved = self._checkpoints

        def chosen() -> int | None:
            good = choose()
            if good is not None:
                saved.check(good)
            return good

        good = from_first("choose what to go back to", chosen)
        if good is None:
            return None
        self.state = watch.gone_back(self.state, restored(saved, good, self.state))
        self._evaluated = False
        rate, beta = float(rate_factor(self.state.train.opt_state)), float(self.state.kl_coef)
        self._writer.event(done, "rollback", to=good, rate_factor=rate, kl_coef=beta)
        self._tell("rollback", done, {"to": good})
        logger.warning("step %d: back to the state of step %d, learning rate x %.3g, beta %.3g", done, good, rate, beta)
        return good

    def write_line(self, done: int, compiled: Compilations) -> dict[str, float]:
        """Log the steps since the last line; FloatingPointError where they cannot go on, before anything is saved."""
        made = not all(self._note_skipped(done))
        rate = float(self._loop.learning_rate(max(int(self.state.train.step) - 1, 0)))
        if self._watch is not None:
            rate *= float(rate_factor(self.state.train.opt_state))
        line = self._window.close() | {"lr": rate}
        line |= {"compile/programs": compiled.programs, "compile/seconds": compiled.seconds}
        self._writer.write(done, line)
        self._tell("line", done, line)
        wrong = sorted(name for name, value in line.items() if not np.isfinite(value))
        # Skipped steps have moved nothing, and are in no mean unless there are none but them.
        if wrong and made:
            raise FloatingPointError(f"step {done}: {', '.join(wrong)} not finite; the state is not saved")
        return line

    def _note_skipped(self, done: int) -> list[bool]:
        """Whether each step was skipped, with an event; FloatingPointError and a dump after too many in a row."""
        skipped = self._window.skipped()
        for number, left_out in enumerate(skipped, done + 1 - len(skipped)):
            self._skipped_in_row = self._skipped_in_row + 1 if left_out else 0
            if left_out:
                self._writer.event(number, "skipped", in_a_row=self._skipped_in_row)
                logger.warning("step %d skipped: its loss or gradient is not finite", number)
            if self._skipped_in_row >= self._loop.max_skipped:
                dump = self._folder / f"skipped-{number}.npz"
                # None of them has moved the state: a rollout is made again as it was, where no later step has.
                batch = self._loop.batch_of(self.state, number - 1)
                if is_first():
                    np.savez(dump, allow_pickle=False, **batch)
                raise FloatingPointError(
                    f"step {number}: loss or gradient not finite, {self._skipped_in_row} steps in a row; nothing was "
                    f"saved since the last good one; what it read is in {dump}"
                )
        return skipped

    def evaluate(self, done: int) -> None:
        with self._window.apart("evaluation", self.state):
            self.last = self._loop.evaluate(self.state, done)
        self._evaluated = True
        self._writer.write(done, self.last)
        self._tell("evaluation", done, self.last)
        if self._canary is not None and self._watch is not None:
            self._heed(self._canary, self._watch, done)

    def _heed(self, canary: Canary, watch: Watch, done: int) -> None:
        """What is done about a regression: the run goes back to its best state, or ends."""
        fall = canary.judge(done, self.last, passes=all_pass(self._loop.gates, self.last))
        if fall is None:
            return
        self._writer.event(done, "canary", **fall._asdict(), action=canary.action)
        logger.warning("step %d: %s", done, fall)
        if canary.action == "warn":
            return
        if canary.action == "rollback" and watch.may_go_back:

            def best_or_calm() -> int | None:
                best = self._checkpoints.best_step()
                return self._newest_calm(done) if best is None else best

            if self._go_back(watch, done, best_or_calm) is not None:
                return
        self.ended = True
        self._writer.event(done, "ended", rollbacks=watch.rollbacks)
        logger.warning("step %d: the run ends here", done)

    def save(self) -> None:
        """The state, and all that a run that goes on from it must know to end as this one."""
        self._saved_at = int(self.state.cursor)
        notes = {"first": self.first, "last": self.last, "seconds": self.seconds(), "window": self._window.keep()}
        notes |= {"skipped_in_row": self._skipped_in_row, "evaluated": self._evaluated, "ended": self.ended}
        if self._canary is not None:
            notes["canary"] = self._canary.keep()
        if self._watch is not None:
            notes |= {"guards": self._watch.keep(), "calm": not self._watch.crossings}
        # A state is as good as its own evaluation says; of one that breaks a gate nothing good is said.
        merits = self.last if self._evaluated and all_pass(self._loop.gates, self.last) else {}
        with self._window.apart("checkpoint", self.state):
            self._writer.sync()
            self._checkpoints.save(
                self._saved_at, saved_part(self.state), metadata=self._metadata | notes, metrics=merits
            )
        self._tell("save", self._saved_at, {})

    def wait(self) -> int:
        """Return when all is saved; how many steps that is."""
        if int(self.state.cursor) != self._saved_at:
            self.save()
        self._checkpoints.wait()
        return self._saved_at

    def outcome(self) -> Outcome:
        """What comes out: the last state, or the best of those saved."""
        seconds = self.seconds()
        chooses = self._canary is not None or bool(self._loop.gates)
        best = from_first("choose the best checkpoint", self._checkpoints.best_step) if chooses else None
        if best is None:
            return Outcome(self.state, self._saved_at, self.first, self.last, seconds)
        state = restored(self._checkpoints, best, self.state)
        return Outcome(state, best, self.first, self._checkpoints.metadata(best)["last"], seconds)
