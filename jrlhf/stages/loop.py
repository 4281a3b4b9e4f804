"""The loop that all stages share: step, log, evaluate, save; and come back where it left."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.checkpoint import BestMode, Checkpoints
from jrlhf.config import CheckpointConfig, LogConfig
from jrlhf.metrics import MetricsLog, progress
from jrlhf.parallel import AnyProcess, counted_compilations, from_first, is_first
from jrlhf.types import Key, Metrics, TrainState


class RunState(NamedTuple):
    """All state of a run. What is not in here is not in the checkpoint, and does not exist."""

    train: TrainState
    key: Key
    """The run's key; step i uses ``fold_in(key, i)``."""
    cursor: Int[Array, ""]
    """Steps (PPO: iterations) done; with the seed it decides the next batch."""
    kl_coef: Float[Array, ""]
    """PPO's beta; 0 in the other stages."""


class Rate(NamedTuple):
    """A metric that counts, summed over the steps of a log line, as so many ``unit`` a second; it is not logged."""

    of: str
    name: str
    unit: float = 1.0
    during: str | None = None
    """The metric of seconds that it is divided by; None: wall time."""


class Loop(NamedTuple):
    """What differs between stages."""

    title: str
    total: int
    advance: Callable[[RunState, int], tuple[RunState, Metrics]]
    """Step number i. It may return before the device is done: nothing here waits except to log."""
    evaluate: Callable[[RunState, int], dict[str, float]]
    """Held-out metrics after i steps; empty where there is nothing to evaluate on."""
    learning_rate: Callable[[int], Any]
    rates: tuple[Rate, ...]
    best_metric: str
    best_mode: BestMode
    shown: tuple[str, ...]
    """The metrics that the progress bar shows."""


class Outcome(NamedTuple):
    state: RunState
    first: dict[str, float]
    """Evaluation before the first step."""
    last: dict[str, float]
    seconds: float
    """Wall time of the loop over all attempts, compilation and evaluation included."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state."""


@contextmanager
def _stop_request() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM until the step in progress is whole; a second one stops at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_loop(
    loop: Loop, state: RunState, *, folder: Path, log: LogConfig, checkpoint: CheckpointConfig, metadata: dict[str, Any]
) -> Outcome:
    """Take ``state`` to ``loop.total`` steps, or from the newest checkpoint in ``folder`` where there is one.

    ``metadata`` is saved with every checkpoint. Raises ``FloatingPointError`` when a logged metric is not finite (such
    a state is not saved) and ``Interrupted`` on SIGINT or SIGTERM (the state is).
    """
    saved = Checkpoints(
        folder / "checkpoints",
        keep=checkpoint.keep,
        keep_best=checkpoint.keep_best,
        best_metric=loop.best_metric,
        best_mode=loop.best_mode,
    )
    with saved as checkpoints, _stop_request() as stop, counted_compilations() as compiled:
        state, past = _resume(checkpoints, state)
        start = int(state.cursor)
        first, last, spent = past["first"], past["last"], past["seconds"]
        with (
            MetricsLog(folder, tensorboard=log.tensorboard, resume_step=start or None, enabled=is_first()) as writer,
            progress(loop.total, loop.title, start=start, enabled=log.progress and is_first()) as bar,
        ):
            clock = time.perf_counter
            began = clock() - spent
            if not first:
                first = last = loop.evaluate(state, start)
                writer.write(start, first)
            window, asked = Window(loop.rates), AnyProcess()
            for done in range(start + 1, loop.total + 1):
                state, metrics = loop.advance(state, done - 1)
                window.add(metrics)
                stopping = asked(bool(stop))
                ends = done == loop.total or stopping
                saves = ends or done % checkpoint.every == 0
                # What is saved is looked at first: a state that is not finite must not get there.
                if saves or done % log.every == 0:
                    line = window.close() | {"lr": float(loop.learning_rate(int(state.train.step) - 1))}
                    line |= {"compile/programs": compiled.programs, "compile/seconds": compiled.seconds}
                    writer.write(done, line)
                    bar.update(done, {name: line[name] for name in loop.shown if name in line})
                    _refuse_non_finite(line, done)
                if done == loop.total or done % log.eval_every == 0:
                    with window.apart("evaluation", state):
                        last = loop.evaluate(state, done)
                    writer.write(done, last)
                if saves:
                    past = {"first": first, "last": last, "seconds": clock() - began}
                    with window.apart("checkpoint", state):
                        checkpoints.save(done, saved_part(state), metadata=metadata | past, metrics=last)
                if stopping and done < loop.total:
                    checkpoints.wait()
                    # An engine may end all as soon as one has left: none leaves before the state is whole.
                    from_first("save its state", lambda: None)
                    raise Interrupted(f"stopped at step {done} of {loop.total}, saved in {folder / 'checkpoints'}")
            checkpoints.wait()
            return Outcome(state, first, last, clock() - began)


def _resume(checkpoints: Checkpoints, state: RunState) -> tuple[RunState, dict[str, Any]]:
    """The newest saved state and what was known then, or ``state`` and nothing."""
    newest = from_first("find its newest checkpoint", checkpoints.latest_step)
    if newest is None:
        return state, {"first": {}, "last": {}, "seconds": 0.0}
    restored: RunState = checkpoints.restore(newest, abstract(saved_part(state)))
    train = restored.train._replace(frozen=state.train.frozen)
    return restored._replace(train=train), checkpoints.metadata(newest)


def saved_part(state: RunState) -> RunState:
    """Without the frozen weights: they are those of the model that the config names, and never change."""
    return state._replace(train=state.train._replace(frozen=None))


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Window:
    """The steps since the last log line: means, maxima, counts as rates, and what share of the time went where."""

    def __init__(self, rates: tuple[Rate, ...], clock: Callable[[], float] = time.perf_counter) -> None:
        self._rates = rates
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._steps: list[Metrics] = []
        self._apart: dict[str, float] = {}
        self._since = self._clock()

    def add(self, metrics: Metrics) -> None:
        self._steps.append(metrics)

    @contextmanager
    def apart(self, name: str, state: Any) -> Iterator[None]:
        """What the block takes is no part of any rate; ``state`` is awaited first, which belongs to the steps."""
        jax.block_until_ready(state)
        start = self._clock()
        yield
        self._apart[name] = self._apart.get(name, 0.0) + self._clock() - start

    def close(self) -> dict[str, float]:
        """Wait for the device, and start anew."""
        steps = jax.device_get(self._steps)
        whole = self._clock() - self._since
        columns = {name: np.asarray([step[name] for step in steps], np.float64) for name in steps[0]}
        counts = {rate.of for rate in self._rates}
        line = {
            name: float(values.max() if "max" in name else values.mean())
            for name, values in columns.items()
            if name not in counts
        }
        training = whole - sum(self._apart.values())
        for rate in self._rates:
            seconds = training if rate.during is None else columns[rate.during].sum()
            line[rate.name] = float(columns[rate.of].sum() / seconds / rate.unit)
        phases = {name: columns[name].sum() for name in columns if name.startswith("seconds/")}
        phases |= {f"seconds/{name}": seconds for name, seconds in self._apart.items()}
        line |= {name.replace("seconds/", "share/"): float(seconds / whole) for name, seconds in phases.items()}
        self._restart()
        return line


def _refuse_non_finite(line: Mapping[str, float], step: int) -> None:
    wrong = sorted(name for name, value in line.items() if not np.isfinite(value))
    if wrong:
        raise FloatingPointError(f"step {step}: {', '.join(wrong)} not finite; the state is not saved")
