"""JAX's private client of the coordinator; only this module imports it.

It is written for JAX 0.10.2 and 0.12.0, and ``tests/parallel/test_coordination.py`` checks every later version.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax._src import distributed

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
LOOPBACK = "127.0.0.1"


def client() -> Any:
    """Return the client, whose key-value table all processes share, after ``jax.distributed.initialize``."""
    return distributed.global_state.client


def process_number() -> int:
    """Return the number of this process, from 0."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Return the number of processes of the run."""
    return distributed.global_state.num_processes or 1


def coordinator_address() -> str | None:
    """Return the address of process 0 as host:port; None before it is known."""
    return distributed.global_state.coordinator_address


def runs_service() -> bool:
    """Tell whether this process is the coordinator."""
    return distributed.global_state.service is not None


@contextmanager
def client_through(relay: Callable[[str], str]) -> Iterator[None]:
    """Make clients connect to ``relay(address)`` instead of the coordinator while the block runs, except process 0."""
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
    """Bypass the user's proxies for the relay, which runs on this machine."""
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
