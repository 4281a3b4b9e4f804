"""Mutual monitoring of a run's processes: one that dies, fails or stalls ends all others, which name it.

Each process writes a row into the coordinator's table every few seconds and reads the rows of the others. It measures
ages by its own clock from when it saw a row change, so the clocks of the hosts need not agree.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jrlhf.parallel.coordination import client, coordinator_address, process_count, process_number
from jrlhf.parallel.relay import Relay
from jrlhf.system.errors import RunError, UsageError, reason_of
from jrlhf.system.interrupts import set_farewell

GRACE = 2.0
"""Seconds that a process gets to learn by itself that another one has failed."""
BEAT = 2.0
"""Maximum number of seconds between two beats."""
TABLE = "jrlhf/peers/"
FAILURE = 1


class PeerLost(RunError):
    """Another process of the run has died, failed or been silent for too long."""


class PeerRefused(UsageError):
    """Process 0 has refused the user's settings."""


class Row(NamedTuple):
    """The row that a process writes about itself."""

    name: str
    """Host and process id."""
    beat: int
    """Counter that rises while the process is alive."""
    marks: int
    """Counter of progress, which rises with every batch and every meeting."""
    ended: str | None
    """Why the process ended; empty: it is done; None: it is running."""


class PeerStatus(NamedTuple):
    """A process's row and the times, in seconds, at which its fields last changed."""

    row: Row
    beat_at: float
    marks_at: float
    ended_at: float


def update_status(before: PeerStatus | None, row: Row, now: float) -> PeerStatus:
    """Return the status after reading ``row`` at time ``now``; ``before`` is the previous status."""
    if before is None:
        return PeerStatus(row, now, now, now)
    return PeerStatus(
        row,
        before.beat_at if before.row.beat == row.beat else now,
        before.marks_at if before.row.marks == row.marks else now,
        before.ended_at if before.row.ended == row.ended else now,
    )


def find_silent(table: Mapping[int, PeerStatus], *, process: int, now: float, heartbeat: float) -> str:
    """Describe the first other process that has been silent for too long; return an empty text if there is none."""
    for number, peer in table.items():
        if number != process and peer.row.ended is None and now - peer.beat_at >= heartbeat:
            return (
                f"process {number} ({peer.row.name}) is dead or stopped: not heard of for {heartbeat:g} s "
                "(distributed.heartbeat_timeout)"
            )
    return ""


def find_failed(table: Mapping[int, PeerStatus], *, process: int, before: float, own: str | None) -> str:
    """Describe the other process that failed first, by the time ``before``; one with the same error does not count."""
    candidates = [
        (peer.ended_at, number, peer.row)
        for number, peer in table.items()
        if number != process and peer.row.ended and peer.row.ended != own and peer.ended_at <= before
    ]
    _, number, row = min(candidates, default=(0.0, -1, None))
    return "" if row is None else f"process {number} ({row.name}) failed: {row.ended}"


def find_stalled(table: Mapping[int, PeerStatus], *, now: float, stall: float) -> str:
    """Describe the process that holds up all others; return an empty text unless none has progressed for too long."""
    if not table or any(now - peer.marks_at < stall for peer in table.values()):
        return ""
    last = min(table, key=lambda number: table[number].row.marks)
    equal = all(peer.row.marks == table[last].row.marks for peer in table.values())
    who = "all are as far" if equal else f"process {last} ({table[last].row.name}) is behind the others"
    return f"no process has come any further for {stall:g} s (distributed.stall_timeout); {who}"


class Peers:
    """This process's access to the table; threads write and read it while the main thread works or waits."""

    def __init__(
        self,
        client: Any,
        *,
        process: int,
        processes: int,
        heartbeat: float,
        stall: float,
        relay: Relay | None = None,
    ) -> None:
        self.client, self.process, self.heartbeat, self.stall = client, process, heartbeat, stall
        self._relay = relay
        self.interval = min(heartbeat / 5, BEAT)
        self._row = Row(f"{platform.node()}, pid {os.getpid()}", 0, 0, None)
        now = time.monotonic()
        unknown = Row("nothing heard of it yet", -1, 0, None)
        self._table = {number: update_status(None, unknown, now) for number in range(processes)}
        self._last_answer = now
        self._stopped = False
        self._wake = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start to write this process's row and to read the others'."""
        self._exchange_thread = threading.Thread(target=self._exchange_rows, daemon=True)
        self._exchange_thread.start()

    def guard(self) -> None:
        """From now on end this process, even if it is waiting, once another one is gone or all have stalled."""
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Stop writing and reading the table."""
        self._stopped = True
        self._wake.set()
        self._exchange_thread.join(self.heartbeat)

    def mark(self) -> None:
        """Record that the main thread has made progress."""
        with self._lock:
            self._row = self._row._replace(marks=self._row.marks + 1)

    def name_of(self, process: int) -> str:
        """Return a process's number, host and process id for messages."""
        return f"process {process} ({self._table[process].row.name})"

    def leave(self, ended: str) -> str:
        """Write why this process ends (empty: it is done); return a description of the process at fault, if another.

        An error in a collective comes from a lost peer. To know which one, this waits until every live peer has beaten
        once more, at most for the heartbeat timeout.
        """
        start = time.monotonic()
        while not self.end(ended):
            # The watching thread has written the reason and is ending the process.
            time.sleep(1)
        return self.fault_of_others(ended, start) if ended else ""

    def fault_of_others(self, ended: str, start: float) -> str:
        """Describe the process that caused this one to end at ``start``; return an empty text if this one did.

        It returns once every other process has ended, has beaten again, or has been silent for too long.
        """
        beats: dict[int, int] | None = None
        while True:
            if fault := self._silent(time.monotonic()):
                return fault
            others = self._others()
            if beats is None and self._last_answer > start:
                # Beats up to now may be old; later ones prove that a process is alive.
                beats = {number: peer.row.beat for number, peer in others.items()}
            elif beats is not None and all(p.row.ended is not None or p.row.beat > beats[n] for n, p in others.items()):
                return find_failed(others, process=self.process, before=start, own=ended)
            time.sleep(0.05)

    def stay_for_the_others(self) -> None:
        """Let process 0, which holds the table, wait until the others have ended, at most for a few seconds."""
        deadline = time.monotonic() + self.interval + GRACE + 1
        while self.process == 0 and (now := time.monotonic()) < deadline:
            others = self._others().values()
            if all(peer.row.ended is not None or now - peer.beat_at >= self.heartbeat for peer in others):
                break
            time.sleep(0.05)
        # The others have written that they end but need a moment to do so.
        time.sleep(1.0 if self.process == 0 else 0.2)

    def _others(self) -> dict[int, PeerStatus]:
        return {number: peer for number, peer in self._table.items() if number != self.process}

    def end(self, why: str) -> bool:
        """Write why this process ends; return False if the other thread has already written a reason."""
        with self._lock:
            if self._row.ended is not None:
                return False
            self._row = self._row._replace(ended=why)
        self._wake.set()
        return True

    def _silent(self, now: float) -> str:
        coordinator = f"{self.name_of(0)}, the coordinator at {coordinator_address()}, is dead"
        # A coordinator that ends with a reason closes the connection too.
        if self._relay is not None and self._relay.lost_for() >= GRACE and self._table[0].row.ended is None:
            return f"{coordinator}: its connection broke"
        if self.process != 0 and now - self._last_answer >= self.heartbeat:
            return f"{coordinator} or stopped: no answer for {self.heartbeat:g} s (distributed.heartbeat_timeout)"
        return find_silent(dict(self._table), process=self.process, now=now, heartbeat=self.heartbeat)

    def _exchange_rows(self) -> None:
        while not self._stopped:
            request_time = time.monotonic()
            with self._lock:
                self._row = self._row._replace(beat=self._row.beat + 1)
                row = self._row
            try:
                self.client.key_value_set(f"{TABLE}{self.process}", json.dumps(row), allow_overwrite=True)
                rows = self.client.key_value_dir_get(TABLE)
            except Exception:
                # An unanswered request counts as silence, which _silent measures.
                rows = []
                request_time = self._last_answer
            for key, text in rows:
                number = int(key.rpartition("/")[2])
                self._table[number] = update_status(self._table[number], Row(*json.loads(text)), time.monotonic())
            # The time of the last request that was answered.
            self._last_answer = request_time
            self._wake.wait(self.interval if row.ended is None else 0.1)
            self._wake.clear()

    def _watch(self) -> None:
        """End the process on another's failure, because the main thread may wait forever."""
        while self._row.ended is None:
            time.sleep(min(self.interval, 1.0))
            now, table = time.monotonic(), dict(self._table)
            fault = (
                self._silent(now)
                or find_failed(table, process=self.process, before=now - GRACE, own=None)
                or find_stalled(table, now=now, stall=self.stall)
            )
            if fault and self.end(fault):
                print(f"jrlhf: {fault}", file=sys.stderr, flush=True)
                self.stay_for_the_others()
                os._exit(FAILURE)


_current: Peers | None = None


def current() -> Peers | None:
    """Return the monitor of this run's processes; None if it runs alone."""
    return _current


@contextmanager
def watching(*, heartbeat: float, stall: float, relay: Relay | None) -> Iterator[None]:
    """Take part in the monitoring while the block runs; raise PeerLost if another process caused an error in it.

    ``relay`` is this process's relay to the coordinator; None for the coordinator itself.
    """
    global _current
    peers = _current = Peers(
        client(),
        process=process_number(),
        processes=process_count(),
        heartbeat=heartbeat,
        stall=stall,
        relay=relay,
    )
    peers.start()
    peers.guard()
    set_farewell(lambda: _interrupted(peers))
    try:
        yield
    except (PeerLost, PeerRefused) as error:
        peers.leave(str(error))
        raise
    except BaseException as error:
        if fault := peers.leave(reason_of(error).partition("\n")[0]):
            raise PeerLost(fault) from error
        raise
    finally:
        set_farewell(None)
    peers.leave("")
    peers.stop()


def _interrupted(peers: Peers) -> None:
    """Tell the others that a signal ends this process, so that they need not wait for its silence."""
    if peers.end("interrupted"):
        peers.fault_of_others("interrupted", time.monotonic())
        peers.stay_for_the_others()


def leave_at_once(code: int) -> None:
    """End a failed process of several with an exit code; a normal end would make JAX wait for the others."""
    if _current is not None and code:
        _current.stay_for_the_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
