"""What the compilers of TPUs make of every program of every stage: facts that a CPU's compiler does not show."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import pytest

from jrlhf.system.environment import TPU_COMPILER
from tests.support import ROOT
from tests.support.tpu_programs import HIDDEN, LENGTH, ROWS, Scenario

pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason='needs the TPU\'s compiler: pip install -e ".[test,tpu-compiler]"'
)

SLICES = ("v5p:2x2x1", "v5e:2x2", "v6e:2x2")
MESHES = ((1, 4, 1), (2, 2, 1), (1, 2, 2))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"packed": True, "int8": True}, {"lora": True, "shared": True})

# Every stage, family, slice, mesh and option once: an update compiles for 20 to 40 CPU seconds.
FIRST = [
    Scenario("llama", SLICES[0], MESHES[0], **OPTIONS[0], stages=("sft", "dpo")),
    Scenario("gemma3", SLICES[1], MESHES[1], **OPTIONS[1], stages=("reward", "ppo")),
    Scenario("gpt2", SLICES[2], MESHES[2], **OPTIONS[2], stages=("ppo", "grpo")),
]
# Every stage with each pair of family, slice and mesh; with the options in turn.
ALL = [
    Scenario(family, tpus, mesh, **OPTIONS[(i + 2 * j + k) % 3])
    for i, family in enumerate(("llama", "gemma3", "gpt2"))
    for j, tpus in enumerate(SLICES)
    for k, mesh in enumerate(MESHES)
]
PROGRAMS = {
    "sft": {"start", "update", "evaluation", "answers"},
    "reward": {"start", "update", "evaluation"},
    "dpo": {"update"},
    "ppo": {"start", "rollout", "readings", "scores", "update"},
    "grpo": {"update"},
}


def name_of(scenario: Scenario) -> str:
    options = [name for name, value in asdict(scenario).items() if value is True]
    return "-".join((scenario.family, scenario.topology, *map(str, scenario.mesh), *options))


def compiled(scenario: Scenario) -> list[dict[str, Any]]:
    """The facts of all programs, from a process of their own: JAX has started with CPUs in this one."""
    environment = os.environ | TPU_COMPILER | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.tpu_programs", json.dumps(asdict(scenario))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("scenario", FIRST, ids=name_of)
def test_a_tpus_compiler_makes_of_a_program_what_we_expect(scenario: Scenario) -> None:
    check(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ALL, ids=name_of)
def test_so_it_does_for_every_family_slice_and_mesh(scenario: Scenario) -> None:
    check(scenario)


def check(scenario: Scenario) -> None:
    programs = compiled(scenario)
    for stage in scenario.stages:
        assert {facts["program"] for facts in programs if facts["stage"] == stage} == PROGRAMS[stage]
    for facts in programs:
        match facts["program"]:
            case "rollout" | "answers":
                check_sampler(facts)
            case "update":
                check_update(facts, scenario)
            case "evaluation" | "readings" | "scores":
                assert facts["kernels"] >= 1, "attention is the TPU's own kernel"


def check_sampler(facts: dict[str, Any]) -> None:
    """A token sends whether rows go on and, split by heads, its activations; no weight is gathered in the loop."""
    again = facts["sent_again"]
    assert again, "the loop over tokens was not found"
    assert over_rows(again) < 1_000, again
    assert sum(size for kind, size in again.items() if kind.startswith("all-gather")) < 10_000, again


def check_update(facts: dict[str, Any], scenario: Scenario) -> None:
    """Each slice gathers the weights twice in bfloat16 and sums gradients in float32; the new state takes the memory of
    the old one. In the layers a device sends weights and their gradients alone, its part of ``tensor``, and no rows.
    """
    lookup = 16 * ROWS * LENGTH * HIDDEN
    assert 0 < over_rows(facts["sent"]) <= 3 * facts["weights"] * facts["trips"] + lookup, facts
    if facts["trips"] == 1:  # with slices the lookup is in a loop too
        shares = (1 if scenario.lora else 2) / scenario.mesh[2]
        assert over_rows(facts["sent_in_loops"]) <= shares * facts["weights"], facts
    assert facts["kernels"] >= 3, "attention is the TPU's own kernel, and so are its gradients"
    assert facts["aliased"] >= 0.99 * facts["given"]
    assert facts["copied"] <= facts["given"]


def over_rows(sent: dict[str, float]) -> float:
    """Bytes that a device sends to devices that read other rows."""
    return sum(size for kind, size in sent.items() if kind.split()[1:] != ["tensor"])
