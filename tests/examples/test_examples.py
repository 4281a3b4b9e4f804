"""The examples, each run as a script: what it learns is better at the end, and all it needs are the three packages."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jrlhf
from tests.support import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = {"jrlhf.core", "jrlhf.steps", "jrlhf.types"}
MARGIN = {"sft_any_model": 0.5, "reward_any_model": 0.3, "ppo_any_model": 3.0}
"""The least that each figure must gain."""


def test_every_example_has_a_margin():
    assert {path.stem for path in EXAMPLES} == MARGIN.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_improves(path: Path) -> None:
    # Without what conftest.py sets: strict promotion and eight devices are ours, not a user's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(jrlhf.__file__).parent.parent)}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.findall(r"(\d+\.\d+) -> (\d+\.\d+)$", run.stdout.strip())[0])
    assert after > before + MARGIN[path.stem], run.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_imports_the_public_floors_alone(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert {module for module in modules if module and module.startswith("jrlhf")} <= PUBLIC
