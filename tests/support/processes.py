"""Several processes of one command on this machine, as an engine would start them on several."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import ROOT, WITHOUT_TORCH

WORKER = [str(Path(__file__).with_name("worker.py"))]
JRLHF = ["-m", "jrlhf"]
FIRST_EPHEMERAL = 65536 - 4096
"""JAX takes the coordinator's port of a Slurm or Open MPI job from the job's number, from here on."""

Engine = Callable[[int, int, int], Mapping[str, str]]
"""``(port, processes, process) -> environment``."""


def by_variables(port: int, processes: int, process: int) -> dict[str, str]:
    """What Kubeflow Trainer's jax runtime sets."""
    at = f"127.0.0.1:{port}"
    return {"JAX_COORDINATOR_ADDRESS": at, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(process)}


def by_slurm(port: int, processes: int, process: int) -> dict[str, str]:
    """What srun sets."""
    return {
        "SLURM_JOB_ID": str(port - FIRST_EPHEMERAL),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def by_open_mpi(port: int, processes: int, process: int) -> dict[str, str]:
    """What mpirun (version 4) sets."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(port - FIRST_EPHEMERAL) * 4096}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(processes),
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }


def free_port() -> int:
    """In the range in which JAX looks for a Slurm job's, and bound by nobody now."""
    for port in range(FIRST_EPHEMERAL + os.getpid() % 2000, 65536):
        with socket.socket(socket.AF_INET6) as attempt:
            try:
                attempt.bind(("::", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port")


def compiler_flags() -> str:
    """This process's, which make compiling quick, without its number of devices."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)


def environment(devices: int) -> dict[str, str]:
    """This process's, without whatever cluster it may run in, with so many CPU devices."""
    clusters = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "KUBERNETES_", "TPU_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    return kept | {
        "XLA_FLAGS": f"{compiler_flags()} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(WITHOUT_TORCH)]),
        "PYTHONUNBUFFERED": "1",
    }


class Processes:
    """What was started, and what it wrote."""

    def __init__(self, started: Sequence[subprocess.Popen[str]], logs: Sequence[Path]) -> None:
        self.started, self.logs = started, logs

    def send(self, process: int, number: signal.Signals) -> None:
        self.started[process].send_signal(number)

    def output(self, process: int) -> str:
        return self.logs[process].read_text(encoding="utf-8")

    def code(self, process: int, *, within: float) -> int:
        """Exit code; AssertionError, with what it said, where it does not end in time."""
        try:
            return self.started[process].wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {process} goes on after {within} s: {self.output(process)}") from None

    def succeed(self, *, within: float) -> None:
        deadline = time.monotonic() + within
        for process in range(len(self.started)):
            code = self.code(process, within=max(deadline - time.monotonic(), 0.1))
            assert code == 0, f"process {process} exited with {code}: {self.output(process)}"

    def wait_for(self, condition: Callable[[], bool], *, within: float) -> None:
        deadline = time.monotonic() + within
        while not condition():
            ended = [number for number, one in enumerate(self.started) if one.poll() is not None]
            assert not ended, f"process {ended[0]} has ended: {self.output(ended[0])}"
            assert time.monotonic() < deadline, [self.output(number) for number in range(len(self.started))]
            time.sleep(0.05)


@contextmanager
def running(
    command: Sequence[str], *, processes: int, devices: int, engine: Engine, folder: Path, extra: Mapping[str, str] = {}
) -> Iterator[Processes]:
    """``python COMMAND`` so many times, each with ``devices`` devices; whatever still runs at the end is killed."""
    port, started, logs = free_port(), [], []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for process in range(processes):
            logs.append(folder / f"process-{process}.log")
            with logs[-1].open("w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=environment(devices) | dict(engine(port, processes, process)) | extra,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
        yield Processes(started, logs)
    finally:
        for one in started:
            one.kill()
            one.wait()
