"""JAX's client of the coordinator, as far as JAX shows it to nobody: the one place that imports it.

Written against JAX 0.10.2 and 0.12.0; ``tests/parallel/test_coordination.py`` holds every later one to it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax._src import distributed

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
LOOPBACK = "127.0.0.1"


def client() -> Any:
    """The client, with a table that all processes share; after ``jax.distributed.initialize``."""
    return distributed.global_state.client


def process_number() -> int:
    return distributed.global_state.process_id


def process_count() -> int:
    return distributed.global_state.num_processes or 1


def coordinator_address() -> str | None:
    """Where process 0 listens, host:port; None before it is known."""
    return distributed.global_state.coordinator_address


def runs_service() -> bool:
    """Whether this process is the coordinator."""
    return distributed.global_state.service is not None


@contextmanager
def client_through(relay: Callable[[str], str]) -> Iterator[None]:
    """While the block runs a client connects to ``relay(address)`` in the coordinator's place; process 0, itself."""
    jaxlib = distributed._jax

    class Through:
        def __getattr__(self, name: str) -> Any:
            return vars(jaxlib)[name]

        @staticmethod
        def get_distributed_runtime_client(address: str, node_id: int, *args: Any, **options: Any) -> Any:
            at = address if node_id == 0 else relay(address)
            return jaxlib.get_distributed_runtime_client(at, node_id, *args, **options)

    distributed._jax = Through()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _no_proxy_here():
            yield
    finally:
        distributed._jax = jaxlib


@contextmanager
def _no_proxy_here() -> Iterator[None]:
    """No proxy that the user has for the network leads to the relay, which is on this machine."""
    name = "no_grpc_proxy"
    before = os.environ.get(name)
    if any(os.environ.get(proxy) for proxy in PROXIES):
        direct = before or os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ[name] = ",".join(filter(None, (direct, LOOPBACK)))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
