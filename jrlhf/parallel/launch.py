"""Start of a run with several processes, which are found by flags or through the engine that launched them."""

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from typing import NamedTuple

import jax

from jrlhf.parallel.coordination import client_through, coordinator_address, runs_service
from jrlhf.parallel.peers import FAILURE, GRACE, watching
from jrlhf.parallel.relay import Relay
from jrlhf.parallel.settings import agree_in_our_own_way
from jrlhf.system.errors import UsageError

LEAVE_TIMEOUT = 10.0
"""Seconds that a process may take to end once the coordinator has ended."""
EXIT_USAGE = 2
"""Exit code of a run whose settings do not let it start."""

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables that srun sets for a task and JAX reads; a shell inside an allocation lacks some of them."""


FLAGS = "flags"
"""Engine of a launch that flags or the environment's JAX_ variables describe completely."""


class Launch(NamedTuple):
    """Arguments of ``jax.distributed.initialize``; None stands for what JAX learns from the engine."""

    engine: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find_launch(
    environment: Mapping[str, str], *, coordinator: str, processes: int, process: int, tpu: bool
) -> Launch | None:
    """Find out how this process was started together with others; return None if it runs alone.

    Arguments (unless "", 0 or -1) override ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    which Kubeflow Trainer sets, and these override Slurm, Open MPI, Cloud TPU and Kubernetes. ``tpu`` tells whether the
    machine has a TPU. Raises UsageError if a value is missing and no engine provides it.
    """
    variables = {name: environment.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _whole_number("JAX_NUM_PROCESSES", variables["JAX_NUM_PROCESSES"], 0)
    process = process if process >= 0 else _whole_number("JAX_PROCESS_ID", variables["JAX_PROCESS_ID"], -1)
    if processes == 1:
        return None
    settings = {"coordinator": coordinator, "processes": processes, "process": process >= 0}
    missing = [name for name in settings if not settings[name]]
    # With complete settings the engine does not matter.
    engine = _engine(environment, tpu=tpu) if missing else FLAGS
    if len(missing) == len(settings):
        return None if engine is None else Launch(engine)
    if engine is None:
        raise UsageError(
            f"distributed.{missing[0]}: is not set, and no engine that provides it was found; several processes need "
            "distributed.coordinator, distributed.processes and distributed.process"
        )
    if coordinator and not coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"distributed.coordinator: must be host:port, got {coordinator!r}")
    if processes and process >= processes:
        raise UsageError(f"distributed.process: must be below distributed.processes ({processes}), got {process}")
    return Launch(engine, coordinator or None, processes or None, process if process >= 0 else None)


def _whole_number(name: str, text: str, missing: int) -> int:
    if text and not text.isdigit():
        raise UsageError(f"{name}: must be a whole number, got {text!r}")
    return int(text) if text else missing


def _engine(environment: Mapping[str, str], *, tpu: bool) -> str | None:
    """Return the engine that started several processes; None for a shell or a job with one task."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if all(name in environment for name in SLURM) and tasks != "1":
        return "Slurm"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if tpu:
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UsageError(
                "distributed: this is a pod of an indexed Job; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID as configs/launch/jobset.yaml does, install jax[k8s] so that JAX asks the cluster, or "
                "set distributed.processes to 1 where each pod runs alone"
            )
        return "Kubernetes"
    return None


def _has_tpu() -> bool:
    """Tell whether JAX will use a TPU of this machine."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    devices = glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*")
    return bool(devices) and platforms in ("", "tpu", "tpu,cpu") and importlib.util.find_spec("libtpu") is not None


@contextmanager
def process_group(
    *,
    coordinator: str,
    processes: int,
    process: int,
    start_timeout: int,
    heartbeat_timeout: int,
    stall_timeout: int,
) -> Iterator[None]:
    """Run the block together with the other processes of the run, if any; enter it before any device is used.

    All processes end together: one that fails or is lost ends the others, with a message. All times are in seconds.
    Raises UsageError for an impossible launch, and PeerLost if another process caused an error in the block.
    """
    launch = find_launch(os.environ, coordinator=coordinator, processes=processes, process=process, tpu=_has_tpu())
    if launch is None:
        yield
        return
    agree_in_our_own_way()
    relays: list[Relay] = []
    with _ending_if_lost(relays, "starting", after=GRACE):
        _initialize(launch, relays, start_timeout=start_timeout, heartbeat_timeout=heartbeat_timeout)
    with watching(heartbeat=heartbeat_timeout, stall=stall_timeout, relay=relays[0] if relays else None):
        yield
    # The coordinator ends when all are about to. Its connection breaks then too, while the others still shut down.
    with _ending_if_lost(relays, "leaving", after=LEAVE_TIMEOUT):
        jax.distributed.shutdown()
    for relay in relays:
        relay.close()


@contextmanager
def _ending_if_lost(relays: Sequence[Relay], phase: str, *, after: float) -> Iterator[None]:
    """End the process if the coordinator has been gone for ``after`` seconds while the block still runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if any(relay.lost_for() >= after for relay in relays):
                at = coordinator_address() or "its address"
                message = f"process 0, the coordinator at {at}, is dead: its connection broke while all were {phase}"
                print(f"jrlhf: {message}", file=sys.stderr, flush=True)
                os._exit(FAILURE)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _initialize(launch: Launch, relays: list[Relay], *, start_timeout: int, heartbeat_timeout: int) -> None:
    """Call ``jax.distributed.initialize``, but print one line and exit before its timeout aborts with a stack trace.

    The relay to the coordinator is appended to ``relays``.
    """

    def add_relay(address: str) -> str:
        relays.append(Relay(address))
        return relays[-1].address

    timer = threading.Timer(start_timeout, _give_up, (launch, start_timeout))
    timer.daemon = True
    timer.start()
    try:
        with client_through(add_relay):
            jax.distributed.initialize(
                launch.coordinator,
                launch.processes,
                launch.process,
                cluster_detection_method="deactivate" if launch.engine == FLAGS else None,
                initialization_timeout=start_timeout + 60,
                # The runtime's own check aborts and may not name the dead process, so jrlhf's check must come first.
                heartbeat_timeout_seconds=2 * heartbeat_timeout,
                shutdown_timeout_seconds=heartbeat_timeout,
            )
        # The processes exchange their devices now; later one of them might be waiting for another.
        jax.devices()
    except Exception as error:
        raise UsageError(f"distributed: {launch.engine}: {error}") from error
    finally:
        timer.cancel()


def _give_up(launch: Launch, seconds: int) -> None:
    at = coordinator_address() or launch.coordinator or f"the address that {launch.engine} names"
    is_first = runs_service()
    subject = "the other processes to reach process 0, this one," if is_first else "process 0, the coordinator,"
    print(f"jrlhf: distributed.start_timeout: waited {seconds} s for {subject} at {at}", file=sys.stderr, flush=True)
    os._exit(EXIT_USAGE)
