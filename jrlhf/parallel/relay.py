"""Carries a process's talk with the coordinator, and does not let on where that is gone.

JAX's client aborts the process, with a stack trace that names nobody, as soon as its connection to the coordinator
breaks. Behind a relay the connection stays and falls silent, and the relay says that it is broken: there is time to say
whose fault it is and to end in good order. It is a process of its own, as a thread would wait for the interpreter where
JAX waits for the coordinator; so this file runs alone, and imports nothing of the package.
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
"""Seconds to reach the coordinator in; JAX asks again."""


class Relay:
    """A relay to ``address`` (host:port), as its parent sees it. It ends with this process."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip().decode()
        if not port:
            raise OSError(f"no relay to {address} could be started")
        self.address = f"127.0.0.1:{port}"
        """What to connect to in the coordinator's place."""
        self._lost_at = float("inf")
        threading.Thread(target=self._listen, daemon=True).start()

    def lost_for(self) -> float:
        """Seconds since the coordinator closed the connection, or its host did; below 0 while it stands."""
        return time.monotonic() - self._lost_at

    def close(self) -> None:
        """End it."""
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
    """Print the port and relay until stdin ends, as it does with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Meant for the parent, which says goodbye through this process.
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
    # Where this end has not closed it, the other one has: the near connection stays as it is.
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
