"""Importing touches no device, no global JAX config and nothing heavy. Each case in a fresh interpreter."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jrlhf

PACKAGE = Path(jrlhf.__file__).parent


def run(code):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded_by(module):
    return set(run(f"import sys, {module}; print(*sys.modules)"))


@pytest.mark.parametrize("module", ["jrlhf.types", "jrlhf.core", "jrlhf.steps"])
def test_importing_initialises_no_backend_and_sets_no_config(module):
    code = f"""
import jax
before = dict(jax.config.values)
import {module}
from jax._src import xla_bridge
print(not xla_bridge._backends, dict(jax.config.values) == before)
jax.devices("cpu")
print(bool(xla_bridge._backends))
"""
    # The last line shows that the first looks at the right thing.
    assert run(code) == ["True", "True", "True"]


@pytest.mark.parametrize("module", ["jrlhf", "jrlhf.config", "jrlhf.config.files", "jrlhf.cli"])
def test_the_command_line_starts_without_jax(module):
    assert not {"jax", "flax", "orbax", "transformers", "datasets"} & loaded_by(module)


@pytest.mark.parametrize("module", ["jrlhf.rank", "jrlhf.rank.run"])
def test_ranking_needs_neither_jax_nor_what_serves_the_page_until_it_is_served(module):
    assert not {"jax", "flax", "transformers", "datasets", "starlette", "uvicorn", "markdown_it"} & loaded_by(module)


@pytest.mark.parametrize("module", ["app", "argilla", "exchange", "label_studio", "report", "store"])
def test_no_part_of_ranking_needs_jax(module):
    needs = {"app": "starlette", "report": "scipy"}.get(module)
    if needs:
        pytest.importorskip(needs)
    assert not {"jax", "flax", "transformers", "datasets"} & loaded_by(f"jrlhf.rank.{module}")


def test_models_need_pallas_only_once_a_kernel_is_asked_for():
    assert "jax.experimental.pallas" not in loaded_by("jrlhf.models")


def test_steps_need_neither_flax_nor_orbax_nor_transformers():
    loaded = loaded_by("jrlhf.steps")
    assert not {"flax", "orbax", "transformers", "datasets"} & loaded
    assert "jax" in loaded


def process_wide(tree):
    """Calls and assignments that change JAX, the environment or the csv module for the whole process, by line."""
    changes = {"setdefault", "update", "pop", "clear", "popitem"}
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if (
            name in {"jax.config.update", "csv.field_size_limit", "os.putenv", "os.unsetenv"}
            or (name.startswith("os.environ.") and name.rpartition(".")[2] in changes)
            or any(ast.unparse(target).startswith("os.environ[") for target in targets)
        ):
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_set_for_the_whole_process_is_set_in_one_place(path):
    """The third place sets a variable for the call that needs it, and puts back what was there."""
    places = {"system/environment.py", "parallel/settings.py", "parallel/coordination.py"}
    found = [*process_wide(ast.parse(path.read_text(encoding="utf-8")))]
    assert bool(found) == (str(path.relative_to(PACKAGE)) in places), f"lines {found}"


def test_the_reader_of_process_wide_changes_sees_them():
    lines = (
        "os.environ['A'] = 'b'",
        "os.environ.setdefault('A', 'b')",
        "csv.field_size_limit(1)",
        "del os.environ['A']",
    )
    assert sorted(process_wide(ast.parse("\n".join((*lines, "os.environ.get('A')"))))) == [1, 2, 3, 4]
