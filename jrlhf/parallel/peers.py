"""The processes of a run watch over each other: one that dies, fails or stands still ends the others, and is named.

Each writes a row into the coordinator's table every few seconds and reads the others'. Ages are taken by this
process's own clock, from when it saw a row change: the hosts' clocks need not agree.
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
from jrlhf.system.errors import UsageError
from jrlhf.system.interrupts import set_farewell

GRACE = 2.0
"""Seconds that a process gets to find out by itself what another one has failed of."""
BEAT = 2.0
"""Seconds between beats, at most."""
TABLE = "jrlhf/peers/"
FAILURE = 1


class PeerLost(RuntimeError):
    """Another process of the run has died, failed or been silent for too long."""


class PeerRefused(UsageError):
    """Process 0 cannot run what was asked for."""


class Row(NamedTuple):
    """What a process says of itself."""

    name: str
    """Host and process id."""
    beat: int
    """Rises as long as the process is alive."""
    marks: int
    """Rises with every batch and every meeting: how far the process is."""
    ended: str | None
    """Why it ended; empty: it is done."""


class Seen(NamedTuple):
    """A row, and when it was last seen to change, in seconds."""

    row: Row
    beat_at: float
    marks_at: float
    ended_at: float


def seen(before: Seen | None, row: Row, now: float) -> Seen:
    """``row`` as read at ``now``, after ``before``."""
    if before is None:
        return Seen(row, now, now, now)
    return Seen(
        row,
        before.beat_at if before.row.beat == row.beat else now,
        before.marks_at if before.row.marks == row.marks else now,
        before.ended_at if before.row.ended == row.ended else now,
    )


def silent(table: Mapping[int, Seen], *, me: int, now: float, heartbeat: float) -> str:
    """The first other process that has not been heard of for too long; empty where there is none."""
    for number, peer in table.items():
        if number != me and peer.row.ended is None and now - peer.beat_at >= heartbeat:
            return (
                f"process {number} ({peer.row.name}) is dead or stopped: not heard of for {heartbeat:g} s "
                "(distributed.heartbeat_timeout)"
            )
    return ""


def failed(table: Mapping[int, Seen], *, me: int, before: float, own: str | None) -> str:
    """The other process that failed first, and that before a time; one that failed of just the same does not count."""
    found = [
        (peer.ended_at, number, peer.row)
        for number, peer in table.items()
        if number != me and peer.row.ended and peer.row.ended != own and peer.ended_at <= before
    ]
    _, number, row = min(found, default=(0.0, -1, None))
    return "" if row is None else f"process {number} ({row.name}) failed: {row.ended}"


def standing(table: Mapping[int, Seen], *, now: float, stall: float) -> str:
    """Which process holds up all; empty unless none has come any further for too long."""
    if not table or any(now - peer.marks_at < stall for peer in table.values()):
        return ""
    last = min(table, key=lambda number: table[number].row.marks)
    equal = all(peer.row.marks == table[last].row.marks for peer in table.values())
    who = "all are as far" if equal else f"process {last} ({table[last].row.name}) is behind the others"
    return f"no process has come any further for {stall:g} s (distributed.stall_timeout); {who}"


class Peers:
    """This process's side of the table. Threads write and read it, whatever the main thread waits for."""

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
        unheard = Row("nothing heard of it yet", -1, 0, None)
        self._table = {number: seen(None, unheard, now) for number in range(processes)}
        self._answered = now
        self._stopped = False
        self._wake = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self._talker.start()

    def guard(self) -> None:
        """From now on end this process, whatever it waits for, once another one is gone or all stand still."""
        threading.Thread(target=self._judge, daemon=True).start()

    def stop(self) -> None:
        """Nothing is said after this."""
        self._stopped = True
        self._wake.set()
        self._talker.join(self.heartbeat)

    def mark(self) -> None:
        """The main thread has come further."""
        with self._lock:
            self._row = self._row._replace(marks=self._row.marks + 1)

    def name_of(self, process: int) -> str:
        return f"process {process} ({self._table[process].row.name})"

    def leave(self, ended: str) -> str:
        """Say why this process ends (empty: it is done); returns whose fault it was, if not its own.

        An error in a collective comes from a peer that is gone, and it takes until its silence is long enough to know
        which: so all that are alive must be heard of once more. Bounded by the heartbeat's timeout.
        """
        start = time.monotonic()
        while not self.end(ended):
            # The other thread has said why, and ends the process.
            time.sleep(1)
        return self.fault_of_others(ended, start) if ended else ""

    def fault_of_others(self, ended: str, start: float) -> str:
        """Whose fault it is, if not its own, that this process ends since ``start``; once all others know of it."""
        heard: dict[int, int] | None = None
        while True:
            if fault := self._silent(time.monotonic()):
                return fault
            others = self._others()
            if heard is None and self._answered > start:
                # The last beats from before; the next ones come of the living.
                heard = {number: peer.row.beat for number, peer in others.items()}
            elif heard is not None and all(p.row.ended is not None or p.row.beat > heard[n] for n, p in others.items()):
                return failed(others, me=self.process, before=start, own=ended)
            time.sleep(0.05)

    def stay_for_the_others(self) -> None:
        """The table is in process 0, which leaves last: the others must have read it, or be gone."""
        deadline = time.monotonic() + self.interval + GRACE + 1
        while self.process == 0 and (now := time.monotonic()) < deadline:
            others = self._others().values()
            if all(peer.row.ended is not None or now - peer.beat_at >= self.heartbeat for peer in others):
                break
            time.sleep(0.05)
        # They have said that they end, and are about to.
        time.sleep(1.0 if self.process == 0 else 0.2)

    def _others(self) -> dict[int, Seen]:
        return {number: peer for number, peer in self._table.items() if number != self.process}

    def end(self, why: str) -> bool:
        """Whether this was said first: by the main thread or by the one that judges."""
        with self._lock:
            if self._row.ended is not None:
                return False
            self._row = self._row._replace(ended=why)
        self._wake.set()
        return True

    def _silent(self, now: float) -> str:
        coordinator = f"{self.name_of(0)}, the coordinator at {coordinator_address()}, is dead"
        # One that says why it ends closes the connection too.
        if self._relay is not None and self._relay.lost_for() >= GRACE and self._table[0].row.ended is None:
            return f"{coordinator}: its connection broke"
        if self.process != 0 and now - self._answered >= self.heartbeat:
            return f"{coordinator} or stopped: no answer for {self.heartbeat:g} s (distributed.heartbeat_timeout)"
        return silent(dict(self._table), me=self.process, now=now, heartbeat=self.heartbeat)

    def _talk(self) -> None:
        while not self._stopped:
            asked = time.monotonic()
            with self._lock:
                self._row = self._row._replace(beat=self._row.beat + 1)
                row = self._row
            try:
                self.client.key_value_set(f"{TABLE}{self.process}", json.dumps(row), allow_overwrite=True)
                rows = self.client.key_value_dir_get(TABLE)
            except Exception:
                # Silence is what counts, and that is measured elsewhere.
                rows = []
                asked = self._answered
            for key, text in rows:
                number = int(key.rpartition("/")[2])
                self._table[number] = seen(self._table[number], Row(*json.loads(text)), time.monotonic())
            # When it asked last and was answered.
            self._answered = asked
            self._wake.wait(self.interval if row.ended is None else 0.1)
            self._wake.clear()

    def _judge(self) -> None:
        """End the process where the main thread cannot: it may be waiting for ever."""
        while self._row.ended is None:
            time.sleep(min(self.interval, 1.0))
            now, table = time.monotonic(), dict(self._table)
            fault = (
                self._silent(now)
                or failed(table, me=self.process, before=now - GRACE, own=None)
                or standing(table, now=now, stall=self.stall)
            )
            if fault and self.end(fault):
                print(f"jrlhf: {fault}", file=sys.stderr, flush=True)
                self.stay_for_the_others()
                os._exit(FAILURE)


_current: Peers | None = None


def current() -> Peers | None:
    """The other processes of this run; None where it runs alone."""
    return _current


@contextmanager
def watching(*, heartbeat: float, stall: float, relay: Relay | None) -> Iterator[None]:
    """Take part in the table while the block runs. PeerLost where an error in it is another process's doing.

    ``relay``: through which this process reaches the coordinator; None for the coordinator itself.
    """
    global _current
    me = _current = Peers(
        client(),
        process=process_number(),
        processes=process_count(),
        heartbeat=heartbeat,
        stall=stall,
        relay=relay,
    )
    me.start()
    me.guard()
    set_farewell(lambda: _interrupted(me))
    try:
        yield
    except (PeerLost, PeerRefused) as error:
        me.leave(str(error))
        raise
    except BaseException as error:
        if fault := me.leave(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"):
            raise PeerLost(fault) from error
        raise
    finally:
        set_farewell(None)
    me.leave("")
    me.stop()


def _interrupted(me: Peers) -> None:
    """A signal ends this process: the others need not wait until it has been silent for long."""
    if me.end("interrupted"):
        me.fault_of_others("interrupted", time.monotonic())
        me.stay_for_the_others()


def leave_at_once(code: int) -> None:
    """End a process that others can no longer meet: at a normal end JAX would wait for them."""
    if _current is not None and code:
        _current.stay_for_the_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
