"""Plans by the compilers of the devices, which are not there: which one is asked, and what it says."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import ConfigError, PlanConfig
from jrlhf.parallel.devices import topology as topologies
from jrlhf.plan import run as plan_run
from jrlhf.plan.programs import needed_bytes
from jrlhf.plan.run import planned_target
from jrlhf.system.errors import UsageError
from tests.support import ROOT
from tests.support.tpu_programs import FAMILIES

CONFIG = PlanConfig(topology="v5e-8")


def absent(topology: topologies.Topology) -> topologies.Topology:
    raise UsageError(f"{topology.name} needs a compiler")


@pytest.mark.parametrize("compile", ["auto", "simulated"])
def test_without_their_compiler_devices_are_simulated(
    compile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_run, "described_topology", absent)
    target = planned_target(replace(CONFIG, compile=compile))
    assert target.topology.simulated
    assert ("v5e-8 needs a compiler" in capsys.readouterr().err) == (compile == "auto"), "it says why"


def test_a_compiler_that_is_required_and_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_run, "described_topology", absent)
    with pytest.raises(ConfigError, match="compile: device: v5e-8 needs a compiler"):
        planned_target(replace(CONFIG, compile="device"))


@pytest.mark.parametrize(
    ("refusal", "gibibytes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (320.00G) exceeds available HBM (15.75G). HLO module: jit_update.",
            320.0,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.13G of 15.75G hbm. Exceeded", 22.13),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.1M of 128.0M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_for_want_of_memory_says_how_much_is_needed(refusal: str, gibibytes: float | None) -> None:
    assert needed_bytes(refusal) == (None if gibibytes is None else gibibytes * 2**30)


NEEDS_LIBTPU = pytest.mark.skipif(
    find_spec("libtpu") is None, reason='needs the TPU\'s compiler: pip install -e ".[test,tpu-compiler]"'
)


def planned(folder: Path, compiler: str, *flags: str) -> tuple[dict[str, Any], str]:
    """Plan the SFT of a model of 8 layers in a process of its own; return the figures of SFT and what was printed."""
    (folder / "model").mkdir()
    source = FAMILIES["llama"] | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8}
    (folder / "model/config.json").write_text(json.dumps(source), encoding="utf-8")
    out = folder / "plan.json"
    settings = [f"--sft.model.path={folder / 'model'}", "--sft.data.train=absent.jsonl", "--sft.data.max_length=256"]
    command = [sys.executable, "-m", "jrlhf", "plan", "--compile=device", f"--out={out}", *settings, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    plan = json.loads(out.read_text(encoding="utf-8"))
    assert plan["compiler"].startswith(compiler)
    return plan["stages"][0], run.stdout


@NEEDS_LIBTPU
def test_a_tpus_compiler_says_memory_and_an_estimate(tmp_path: Path) -> None:
    stage, printed = planned(
        tmp_path, "libtpu ", "--topology=v5e-4", "--mesh.fsdp=4", "--sft.batch_size=32", "--sft.model.dtype=bfloat16"
    )
    assert (stage["fits"], stage["memory"]) == (True, 15.75 * 2**30)
    assert stage["fitting_batch"] > 32
    # The state, and one array of the tokens' vectors a layer.
    parameters = stage["held"]["trained"]
    assert stage["peak"] > 3 * parameters + 8 * (8 * 256 * 256 * 2)
    assert 0 < stage["estimate"] < 1
    update = next(program for program in stage["programs"] if program["name"] == "update")
    assert update["estimate"] == stage["estimate"]
    assert all(words in printed for words in ("libtpu", "seconds a step: estimate", "not a measurement"))


@NEEDS_LIBTPU
def test_a_program_that_a_tpus_compiler_refuses_says_what_it_needs(tmp_path: Path) -> None:
    """Two million tokens at once, whose layers are stored: some times more than a chip has."""
    stage, printed = planned(
        tmp_path,
        "libtpu ",
        "--topology=v5e-1",
        "--sft.batch_size=8192",
        "--sft.model.remat=false",
        "--sft.model.dtype=bfloat16",
    )
    assert not stage["fits"]
    assert stage["peak"] > stage["memory"]
    assert stage["estimate"] is None
    assert "no: needs" in printed


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None, reason='needs XLA\'s CUDA compiler: pip install "jax[cuda13]"'
)
def test_the_compiler_of_gpus_says_memory_and_an_estimate(tmp_path: Path) -> None:
    stage, printed = planned(
        tmp_path,
        "jax-cuda13-plugin ",
        *("--topology=h100x8", "--mesh.fsdp=8", "--sft.batch_size=64", "--sft.model.dtype=bfloat16"),
    )
    assert (stage["fits"], stage["memory"]) == (True, 0.9 * 80e9)
    assert stage["peak"] > 3 * stage["held"]["trained"]
    assert 0 < stage["estimate"] < 1
    assert "not a measurement" in printed
