"""Starting the processes of a run: found through whatever engine launched them, or by flags."""

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

LEAVING = 10.0
"""Seconds that a process may take to leave once the coordinator has left."""
USAGE = 2
"""The exit code of a run that cannot start as it is asked to."""

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What srun sets for a task, and JAX goes by; a shell inside an allocation lacks some of it."""


FLAGS = "flags"
"""The engine of a launch that flags, or the environment's JAX_ variables, tell all of."""


class Launch(NamedTuple):
    """Arguments of ``jax.distributed.initialize``; None is what JAX learns from the engine itself."""

    engine: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find_launch(
    environment: Mapping[str, str], *, coordinator: str, processes: int, process: int, tpu: bool
) -> Launch | None:
    """How this process was started beside others; None where it runs alone.

    What is given ("", 0 and -1 are not) wins over ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``, which Kubeflow Trainer sets, and these over Slurm, Open MPI, Cloud TPU and Kubernetes. ``tpu``:
    this machine has one. UsageError where something is missing that no engine tells.
    """
    told = {name: environment.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _whole("JAX_NUM_PROCESSES", told["JAX_NUM_PROCESSES"], 0)
    process = process if process >= 0 else _whole("JAX_PROCESS_ID", told["JAX_PROCESS_ID"], -1)
    if processes == 1:
        return None
    given = {"coordinator": coordinator, "processes": processes, "process": process >= 0}
    missing = [name for name in given if not given[name]]
    # Where all is told, whatever else this process may be part of is of no interest.
    engine = _engine(environment, tpu=tpu) if missing else FLAGS
    if len(missing) == len(given):
        return None if engine is None else Launch(engine)
    if engine is None:
        raise UsageError(
            f"distributed.{missing[0]}: is not set, and no engine that tells it was found; several processes need "
            "distributed.coordinator, distributed.processes and distributed.process"
        )
    if coordinator and not coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"distributed.coordinator: must be host:port, got {coordinator!r}")
    if processes and process >= processes:
        raise UsageError(f"distributed.process: must be below distributed.processes ({processes}), got {process}")
    return Launch(engine, coordinator or None, processes or None, process if process >= 0 else None)


def _whole(name: str, text: str, missing: int) -> int:
    if text and not text.isdigit():
        raise UsageError(f"{name}: must be a whole number, got {text!r}")
    return int(text) if text else missing


def _engine(environment: Mapping[str, str], *, tpu: bool) -> str | None:
    """Who started several processes, None where nobody did: a shell or a job of one task is no cluster."""
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
    """Whether JAX will use a TPU of this machine."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    devices = glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*")
    return bool(devices) and wanted in ("", "tpu", "tpu,cpu") and importlib.util.find_spec("libtpu") is not None


@contextmanager
def joined(
    *,
    coordinator: str,
    processes: int,
    process: int,
    start_timeout: int,
    heartbeat_timeout: int,
    stall_timeout: int,
) -> Iterator[None]:
    """Run the block together with the other processes of the run, if there are any; before any device is used.

    They leave together: one that fails or is lost ends the others, which say so. All times are in seconds.
    UsageError for a launch that cannot be; PeerLost where an error in the block is another process's doing.
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
    # The coordinator leaves when all are about to: its connection breaks then too, and the others go on to leave.
    with _ending_if_lost(relays, "leaving", after=LEAVING):
        jax.distributed.shutdown()
    for relay in relays:
        relay.close()


@contextmanager
def _ending_if_lost(relays: Sequence[Relay], phase: str, *, after: float) -> Iterator[None]:
    """End the process where the coordinator has been gone for so many seconds while the block still runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if any(relay.lost_for() >= after for relay in relays):
                at = coordinator_address() or "its address"
                said = f"process 0, the coordinator at {at}, is dead: its connection broke while all were {phase}"
                print(f"jrlhf: {said}", file=sys.stderr, flush=True)
                os._exit(FAILURE)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _initialize(launch: Launch, relays: list[Relay], *, start_timeout: int, heartbeat_timeout: int) -> None:
    """``jax.distributed.initialize``, which past its timeout aborts with a stack trace: a line comes before that.

    The relay through which the coordinator is reached is added to ``relays``.
    """

    def relayed(address: str) -> str:
        relays.append(Relay(address))
        return relays[-1].address

    late = threading.Timer(start_timeout, _give_up, (launch, start_timeout))
    late.daemon = True
    late.start()
    try:
        with client_through(relayed):
            jax.distributed.initialize(
                launch.coordinator,
                launch.processes,
                launch.process,
                cluster_detection_method="deactivate" if launch.engine == FLAGS else None,
                initialization_timeout=start_timeout + 60,
                # The runtime's own check aborts the process and may leave out who is dead: ours comes first.
                heartbeat_timeout_seconds=2 * heartbeat_timeout,
                shutdown_timeout_seconds=heartbeat_timeout,
            )
        # They tell each other of their devices: left for later, it could be while one waits for another.
        jax.devices()
    except Exception as error:
        raise UsageError(f"distributed: {launch.engine}: {error}") from error
    finally:
        late.cancel()


def _give_up(launch: Launch, seconds: int) -> None:
    at = coordinator_address() or launch.coordinator or f"the address that {launch.engine} names"
    is_first = runs_service()
    waited = "the other processes to reach process 0, this one," if is_first else "process 0, the coordinator,"
    print(f"jrlhf: distributed.start_timeout: waited {seconds} s for {waited} at {at}", file=sys.stderr, flush=True)
    os._exit(USAGE)
