"""The parent's half of the protocol: a side is a process of its own, in its own environment."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from peers.cases import RAGGED_PPO, ROLLOUTS

BENCHMARKS = Path(__file__).parent.parent
MODULES = {
    "jrlhf": "peers.jrlhf_steps",
    "before": "peers.jrlhf_steps",
    "trl": "peers.trl_steps",
    "trl-ppo": "peers.trl_steps",
    "tunix": "peers.tunix_steps",
    "vllm": "peers.vllm_steps",
}
ROLLOUT_MODULE = "peers.jrlhf_rollouts"
"""jrlhf's side of rollouts, which runs earlier commits too."""
TRAINING = ("sft", "reward", "ppo", "rollout")
"""How works begin in which `jrlhf` sets variables for itself."""
SHOWN_VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS", "LD_PRELOAD")


class SideEnded(Exception):
    """A side's process is gone; the message is the last it said."""


class Side:
    """A running child, warm once it is entered, and idle between calls."""

    def __init__(self, command: list[str], variables: dict[str, str], folder: Path = BENCHMARKS) -> None:
        self._command, self._variables, self._folder = command, variables, folder
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "Side":
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env=os.environ | self._variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.facts = self._read()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def go(self, calls: int) -> dict[str, Any]:
        """The line that answers ``go N``."""
        try:
            self._process.stdin.write(f"go {calls}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideEnded(self._last_words()) from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            # A library may have printed something before the streams were told apart.
            if line.startswith("{"):
                return json.loads(line)
        raise SideEnded(self._last_words())

    def _last_words(self) -> str:
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return said[-1] if said else f"ended with code {self._process.wait()}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def command(side: str, python: str, spec: dict[str, Any]) -> list[str]:
    return [python, "-m", module(side, spec["work"]), json.dumps(spec)]


def module(side: str, work: str) -> str:
    rollout = work in ROLLOUTS | RAGGED_PPO and side in ("jrlhf", "before")
    return ROLLOUT_MODULE if rollout else MODULES[side]


def variables(side: str, work: str, given: dict[str, str]) -> dict[str, str]:
    """What `jrlhf` sets for itself when it trains; of all sides, what the caller gives them."""
    trains = side in ("jrlhf", "before") and work.startswith(TRAINING)
    return ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if trains else {}) | given


def shown(variables: dict[str, str]) -> str:
    """The variables that change speed, as a shell would be given them."""
    environment = os.environ | variables
    return " ".join(f"{name}={environment[name]}" for name in SHOWN_VARIABLES if environment.get(name))
