"""A relay between a process and the coordinator, which hides a broken connection from JAX and reports it to jrlhf.

JAX's client aborts the process with an anonymous stack trace as soon as its connection to the coordinator breaks.
Behind a relay the connection stays open and silent, and the relay reports the break, so that the run can name the
culprit and end properly. The relay is a process, because a thread could not run while JAX holds the interpreter and
waits for the coordinator. So this file runs as a script and imports nothing of the package.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

LOST = b"lost\n"
CONNECT = 10.0
"""Seconds to wait for a connection to the coordinator; JAX tries again."""


class Relay:
    """The parent's handle of a relay to ``address`` (host:port). The relay ends with this process."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip().decode()
        if not port:
            raise OSError(f"the relay to {address} could not be started")
        self.address = f"127.0.0.1:{port}"
        """Address to connect to instead of the coordinator's."""
        self._lost_at = float("inf")
        threading.Thread(target=self._listen, daemon=True).start()

    def lost_for(self) -> float:
        """Return the seconds since the connection to the coordinator broke; negative while it is open."""
        return time.monotonic() - self._lost_at

    def close(self) -> None:
        """End the relay."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            if self._process.stdout.readline() == LOST:
                self._lost_at = time.monotonic()


def main(address: str) -> None:
    """Print the port, then relay until stdin ends, which happens when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Signals are for the parent, which sends its last messages through this process.
        signal.signal(number, signal.SIG_IGN)
    host, _, port = address.rpartition(":")
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_serve, args=(listening, (host.strip("[]"), int(port))), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def _serve(listening: socket.socket, coordinator: tuple[str, int]) -> None:
    while True:
        local, _ = listening.accept()
        threading.Thread(target=_carry, args=(local, coordinator), daemon=True).start()


def _carry(local: socket.socket, coordinator: tuple[str, int]) -> None:
    try:
        far = socket.create_connection(coordinator, timeout=CONNECT)
    except OSError:
        local.close()
        return
    far.settimeout(None)
    for end in (local, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    closed = threading.Event()
    threading.Thread(target=_send, args=(local, far, closed), daemon=True).start()
    with contextlib.suppress(OSError):
        while data := far.recv(2**16):
            local.sendall(data)
    # If this end has not closed the connection, the coordinator has; the local connection stays open.
    if not closed.is_set():
        os.write(1, LOST)


def _send(local: socket.socket, far: socket.socket, closed: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := local.recv(2**16):
            with contextlib.suppress(OSError):
                far.sendall(data)
    closed.set()
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main(sys.argv[1])
