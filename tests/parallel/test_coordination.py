"""What of JAX's coordination is shown to nobody, and the relay that keeps a broken connection from ending a process."""

import inspect
import os
import socket
import threading
import time

import pytest
from jax._src import distributed

from jrlhf.parallel.coordination import client_through
from jrlhf.parallel.relay import Relay

DIRECT = "no_grpc_proxy"


def test_jax_has_what_is_used_of_it() -> None:
    """As JAX 0.10.2 and 0.12.0 have it: where this fails, coordination.py must learn of another version."""
    state = distributed.global_state
    for name in ("client", "service", "process_id", "num_processes", "coordinator_address"):
        assert name in vars(type(state)), name
    made = distributed._jax.get_distributed_runtime_client
    assert str(made.__doc__).startswith("get_distributed_runtime_client(address: str, node_id: int,")
    source = inspect.getsource(distributed.State.initialize)
    assert "_jax.get_distributed_runtime_client(" in source
    assert "coordinator_address,\n" in source.partition("_jax.get_distributed_runtime_client(")[2][:80]


def test_only_clients_of_another_process_are_led_through_a_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Jaxlib:
        def get_distributed_runtime_client(self, *args: object, **options: object) -> None:
            made.append((args, options))

        def __init__(self) -> None:
            self.get_distributed_runtime_client = Jaxlib.get_distributed_runtime_client.__get__(self)
            self.other = "as it is"

    jaxlib = Jaxlib()
    monkeypatch.setattr(distributed, "_jax", jaxlib)
    monkeypatch.setenv("http_proxy", "http://proxy:80")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    monkeypatch.delenv(DIRECT, raising=False)
    with client_through(lambda address: f"relay to {address}"):
        assert os.environ[DIRECT] == "10.0.0.0/8,127.0.0.1"
        assert distributed._jax.other == "as it is"
        for process in (0, 1):
            distributed._jax.get_distributed_runtime_client("host:1", process, use_compression=True)
    assert distributed._jax is jaxlib
    assert DIRECT not in os.environ
    options = {"use_compression": True}
    assert made == [(("host:1", 0), options), (("relay to host:1", 1), options)]


def connected(relay: Relay) -> socket.socket:
    host, _, port = relay.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_relay_carries_all_and_keeps_the_connection_when_the_coordinator_is_gone(host: str) -> None:
    coordinator = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"{host}:{coordinator.getsockname()[1]}")
    try:
        near = connected(relay)
        far, _ = coordinator.accept()
        sent = bytes(range(256)) * 40_000
        sender = threading.Thread(target=near.sendall, args=(sent,))
        sender.start()
        got = b""
        while len(got) < len(sent):
            got += far.recv(2**20)
        sender.join()
        assert got == sent
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
        assert relay.lost_for() < 0
        far.close()
        deadline = time.monotonic() + 30
        while relay.lost_for() < 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        near.settimeout(0.5)
        near.sendall(b"still there")
        with pytest.raises(TimeoutError):
            near.recv(1)
        near.close()
    finally:
        coordinator.close()
        relay.close()


def test_a_connection_that_this_side_closes_is_not_lost_and_one_that_is_refused_is_closed() -> None:
    coordinator = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"127.0.0.1:{coordinator.getsockname()[1]}")
    try:
        near = connected(relay)
        far, _ = coordinator.accept()
        near.close()
        far.settimeout(30)
        assert far.recv(1) == b""
        far.close()
        coordinator.close()
        with connected(relay) as refused:
            assert refused.recv(1) == b""
        time.sleep(0.5)
        assert relay.lost_for() < 0
    finally:
        coordinator.close()
        relay.close()
