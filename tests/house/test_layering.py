"""The floors of the house, read from the imports of every file."""

import ast
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import jrlhf
from tests.support import ROOT as CHECKOUT

ROOT = Path(jrlhf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TESTS = sorted((CHECKOUT / "tests").rglob("*.py"))

# What each part may import besides itself. `steps` sees neither models nor config: any user's model works there.
FLOORS: dict[str, set[str]] = {
    "types": set(),
    "core": {"types"},
    "system": set(),
    "rules": {"system"},
    "assets": {"system"},
    "config": {"system"},
    # The page where people rank: it starts without JAX (test_purity.py holds it to that).
    "rank": {"config", "system"},
    "parallel": {"core", "types", "system"},
    "steps": {"core", "types"},
    "models": {"core", "types", "system", "parallel"},
}
FLOORS["data"] = {"models", "config", "assets", *FLOORS["models"]}
FLOORS["runs"] = {"data", "rules", *FLOORS["data"]}
FLOORS["train"] = {"runs", "steps", *FLOORS["runs"]}
FLOORS["report"] = {"runs", "config", "system"}
FLOORS["rollout"] = {"train", *FLOORS["train"]}
FLOORS["stages"] = {"rollout", "report", *FLOORS["rollout"]}
FLOORS["plan"] = {"stages", *FLOORS["stages"]}
FLOORS["tools"] = {"plan", "rank", *FLOORS["plan"]}
FLOORS["cli"] = {"tools", *FLOORS["tools"]}
FLOORS["__main__"] = {"cli"}


def part(module):
    """``jrlhf.core.masks`` -> ``core``."""
    return module.split(".")[1] if "." in module else ""


def imports(path, root=ROOT):
    """Every module a file imports, at its top or inside a function, relative imports resolved."""
    package = [*(["jrlhf"] if root == ROOT else []), *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from jrlhf import core` names the part in the alias.
            yield from (f"jrlhf.{alias.name}" for alias in node.names) if module == "jrlhf" else (module,)


def of(name):
    return pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))(name)


@of
def test_a_file_imports_only_from_lower_floors(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        allowed = set()
    else:
        assert own in FLOORS, f"{own} has no floor: give it one here and in docs/architecture.md"
        allowed = FLOORS[own] | {own}
    used = {part(m) for m in imports(path) if m.split(".")[0] == "jrlhf"} - {"__version__"}
    assert used <= allowed, f"imports {sorted(used - allowed)}"


def file_imports(path):
    """The files of the package that a file imports at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a module of that package.
            names = [name for alias in node.names for name in (f"{node.module}.{alias.name}", node.module)]
        else:
            continue
        for name in names:
            place = ROOT.parent.joinpath(*name.split("."))
            if (file := place.with_suffix(".py")) in FILES or (file := place / "__init__.py") in FILES:
                yield file


def circle(edges):
    """A circle in a graph, as the list of its nodes, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for following in edges.get(node, ()):
            if found := visit(following):
                return found
        done.add(path.pop())
        return None

    return next((found for node in edges if (found := visit(node))), None)


def test_no_file_imports_itself_by_way_of_others():
    found = circle({path: sorted({*file_imports(path)} - {path}) for path in FILES})
    assert found is None, " -> ".join(str(path.relative_to(ROOT)) for path in found)


def test_the_floors_are_in_order():
    assert circle(FLOORS) is None
    assert circle({1: [2], 2: [3], 3: [2]}) == [2, 3, 2]
    assert len({*file_imports(ROOT / "stages" / "ppo.py")}) > 5


def test_no_module_takes_the_name_of_what_its_package_exports():
    """A module that is imported later takes the place of a function of its name in the package."""
    for found in pkgutil.walk_packages(jrlhf.__path__, "jrlhf."):
        package = importlib.import_module(found.name) if found.ispkg else None
        for name in getattr(package, "__all__", ()):
            if importlib.util.find_spec(f"{found.name}.{name}"):
                # Its own module is there before it.
                assert getattr(package, name).__module__ == f"{found.name}.{name}"


def test_nothing_is_loose_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "types.py"}


def test_every_floor_is_there():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__"} == {*FLOORS}


def test_tests_mirror_the_package():
    folders = {path.name for path in (CHECKOUT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"benchmarks", "examples", "fixtures", "house", "support"} <= {*FLOORS}
    assert {path.name for path in (CHECKOUT / "tests").glob("test_*.py")} == set()


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_test_module_imports_from_no_other(path):
    """What they share is in tests/support; a fixture comes from a conftest by its name."""
    found = [module for module in imports(path, CHECKOUT) if module.split(".")[0] == "tests"]
    assert [module for module in found if not f"{module}.".startswith("tests.support.")] == []
    # A program for a process of its own stands in a string.
    assert not re.findall(r"^ +(?:from|import) tests\.(?!support)", path.read_text(encoding="utf-8"), re.MULTILINE)


@of
def test_rules_import_no_jax(path):
    """They are read in threads, by users too: of strings and numbers alone."""
    if path.relative_to(ROOT).parts[0] in ("config", "rules", "system"):
        assert not [m for m in imports(path) if m.split(".")[0] in {"jax", "flax", "jaxtyping"}]


@of
def test_only_checkpoints_imports_orbax(path):
    if path != ROOT / "runs" / "checkpoints.py":
        assert not [m for m in imports(path) if m.split(".")[0] == "orbax"]


def slices_off_the_last_token(node):
    """``x[:, :-1]``, with or without more axes: the shift by one."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    return any(isinstance(s, ast.Slice) and s.upper and ast.unparse(s.upper) == "-1" for s in node.slice.elts)


@of
def test_the_shift_by_one_is_in_core_logprobs_alone(path):
    found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if slices_off_the_last_token(node)]
    if path == ROOT / "core" / "logprobs.py":
        assert len(found) == 1
    else:
        assert not found


@of
def test_no_getattr_on_a_config_and_no_utils(path):
    assert path.stem not in {"utils", "util", "helpers", "misc"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "setattr"}:
            target = ast.unparse(node.args[0])
            assert "cfg" not in target, f"line {node.lineno}"
            assert "config" not in target, f"line {node.lineno}"


def test_the_reader_sees_what_it_should():
    """The rules above are only as good as ``imports`` and ``slices_off_the_last_token``."""
    source = ROOT / "core" / "_made_up.py"
    fake = type("Fake", (), {"relative_to": source.relative_to, "read_text": lambda self: TEXT})()
    inside = ["jrlhf.models", "jrlhf.config", "jrlhf.core.masks", "jrlhf.steps"]
    assert list(imports(fake)) == ["orbax.checkpoint", *inside]
    shifts = [ast.parse(text).body[0].value for text in ("x[:, :-1]", "x[..., :-1, :]", "x[:-1]", "x[:, 1:]")]
    assert [slices_off_the_last_token(node) for node in shifts] == [True, True, False, False]


TEXT = """
import orbax.checkpoint
def late():
    from jrlhf import models, config
    from .masks import masked_mean
    from ..steps import make_sft_step
"""
