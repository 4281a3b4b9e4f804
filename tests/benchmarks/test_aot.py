"""The benchmark of programs for absent devices: its table of cases, its lines, and one real compilation."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import jax
import pytest

from jrlhf.parallel.devices.topology import parse_topology
from tests.support import ROOT

FOLDER = ROOT / "benchmarks"
KEYS = {"case", "program", "estimated_ms", "work_ms", "sync_ms", "hbm_gb", "sent_gb", "mfu", "compile_s", "compiler"}


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("aot")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("aot_cases")


def test_every_case_has_its_own_name_and_known_devices(aot: ModuleType, cases: ModuleType) -> None:
    jobs = [aot.own_jobs(), aot.peer_jobs("maxtext", "python"), aot.peer_jobs("tunix", "python")]
    names = [(job.case, job.program) for part in jobs for job in part]
    assert len({*names}) == len(names) >= 12
    assert {parse_topology(job.topology).platform() for part in jobs for job in part} == {"tpu", "gpu"}
    assert {case.stage for case in cases.CASES} == {"sft", "reward", "ppo"}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_programs_of_a_case_are_those_of_a_plan(stage: str, cases: ModuleType, tmp_path: Path) -> None:
    case = next(case for case in cases.CASES if case.stage == stage)
    planned = cases.planned_stage(replace(case, model="tiny"), parse_topology("cpu:8"), tmp_path)
    assert planned.batch == 8 * case.rows
    assert {*case.programs} <= {program.name for program in planned.programs}


@pytest.mark.parametrize(("model", "parameters"), [("1b", 1_235_814_400), ("8b", 8_030_261_248)])
def test_models_have_the_sizes_of_llama_3(model: str, parameters: int, cases: ModuleType, tmp_path: Path) -> None:
    case = cases.Case("x", "sft", model, "cpu", rows=1, length=128)
    planned = cases.planned_stage(case, parse_topology("cpu:8"), tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(planned.held["trained"])) == parameters


PROGRAM = """\
HloModule jit_step, num_partitions=4

%body (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} copy(%c), metadata={op_name="jit(f)/shuffle"}, backend_config={"estimated_cycles":"1750000"}
}

%goes (d: f32[8]) -> pred[] {
  %d = f32[8]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %t = f32[8]{0} while(%p), condition=%goes, body=%body, metadata={op_name="jit(f)/tail/while"}
  %w = f32[8]{0} while(%t), condition=%goes, body=%body, metadata={op_name="jit(f)/decode/while"}
  ROOT %g = f32[45000000]{0} all-gather(%w), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def pretended(aot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str) -> list[str]:
    """What the benchmark prints with a child that runs ``script``."""
    job = aot.Job("case", "update", "v5p:2x2x1", [sys.executable, "-c", script])
    aot.show([job], aot.arguments(["--top", "1", "--save-hlo", str(tmp_path / "hlo")]))
    got = capsys.readouterr()
    return [*got.out.splitlines(), *got.err.splitlines()]


def test_a_line_has_the_estimate_of_what_the_child_compiled(
    aot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"bytes": 3.5e9, "flops": 4 * 459e12 * 0.01, "devices": 4, "compile_s": 1.5, "compiler": "c"}
    figures |= {"trips": 20, "loops": {"tail": 0.0}}
    script = f"import sys; open(sys.argv[1], 'w').write({PROGRAM!r}); print('noise'); print({json.dumps(figures)!r})"
    line, place = pretended(aot, tmp_path, capsys, script)
    # 20 ms of work; 135 MB over two links of 100 GB/s at 90 %.
    assert json.loads(line) == {
        "case": "case",
        "program": "update",
        "estimated_ms": 20.75,
        "work_ms": 20.0,
        "sync_ms": 0.75,
        "hbm_gb": 3.5,
        "sent_gb": 0.14,
        "mfu": 0.482,
        "compile_s": 1.5,
        "compiler": "c",
    }
    assert place.split() == ["20.00", "ms", "96.4%", "copy", "shuffle"]
    assert (tmp_path / "hlo" / "case-update.hlo.gz").is_file()


def test_a_child_that_fails_leaves_its_error(
    aot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = pretended(aot, tmp_path, capsys, "raise MemoryError('20.00G of 15.75G hbm\\nof which: much')")
    assert json.loads(line) == {"case": "case", "program": "update", "error": "MemoryError: 20.00G of 15.75G hbm"}


def test_a_pattern_is_of_cases_or_of_programs(aot: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, programs in (("ppo-1b-v5p", 4), ("ppo-1b-v5p/rollout", 1), ("ppo-1b-v5p/re*", 1), ("sft-tiny*", 1)):
        aot.main(["--list", "--cases", pattern])
        assert len(capsys.readouterr().out.splitlines()) == programs
    with pytest.raises(SystemExit, match="no case matches nothing"):
        aot.main(["--list", "--cases", "nothing"])


@pytest.mark.skipif(find_spec("libtpu") is None, reason='needs the TPU\'s compiler: pip install -e ".[tpu-compiler]"')
def test_the_compiler_of_a_tpu_compiles_a_step() -> None:
    command = [sys.executable, str(FOLDER / "aot.py"), "--cases", "sft-tiny-v5p"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    [line] = map(json.loads, run.stdout.splitlines())
    assert line.keys() == KEYS
    assert line["estimated_ms"] == pytest.approx(line["work_ms"] + line["sync_ms"], abs=0.02)
    assert min(line["work_ms"], line["sync_ms"], line["hbm_gb"], line["sent_gb"], line["mfu"]) > 0
    assert line["compiler"].startswith("libtpu ")
