"""The floors of the house, read from the imports of every file."""

import ast
from pathlib import Path

import pytest

import jrlhf

ROOT = Path(jrlhf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ABOVE_PARALLEL = {"core", "types", "interrupts", "parallel", "paths"}
FLOOR_1 = ABOVE_PARALLEL | {"models"}
CONFIG = {
    "config",
    "config_rewards",
    "config_tools",
    "config_watch",
    "environment",
    "lines",
    "paths",
    "suggest",
    "terminal",
}
# What each part may import besides itself. `steps` sees neither models nor config: any user's model works there.
ALLOWED = {
    "types": set(),
    "core": {"types"},
    "parallel": {"core", "types", "interrupts"},
    "models": ABOVE_PARALLEL | {"suggest"},
    "steps": {"core", "types"},
    "config": {"config_rewards", "config_watch", "paths"},
    "config_rewards": {"paths"},
    "config_watch": {"paths"},
    "config_tools": {"config", "paths"},
    "rules": set(),
    "suggest": set(),
    "environment": {"interrupts", "paths"},
    "early": set(),
    "interrupts": set(),
    "terminal": set(),
    "assets": FLOOR_1 | CONFIG | {"config_io", "data"},
    "checkpoint": FLOOR_1 | CONFIG | {"leaves", "manifest"},
    "leaves": set(),
    "lines": set(),
    "paths": set(),
    "lock": set(),
    "yaml_merge": set(),
    "manifest": set(),
    "gates": set(),
    "config_check": CONFIG | {"gates", "config_rewards_check", "config_watch_check"},
    "config_rewards_check": CONFIG,
    "config_watch_check": CONFIG | {"config_rewards_check"},
    "config_io": CONFIG | {"config_check", "yaml_merge"},
    "data": FLOOR_1 | CONFIG | {"assets"},
    "metrics": CONFIG | {"trackers"},
    "trackers": CONFIG | {"config_check"},
}
# The page where people rank: it starts without JAX (test_purity.py holds it to that).
ALLOWED["rank"] = CONFIG | {"config_check", "config_io"}
STAGES = ALLOWED.keys() - {"stages"}
ALLOWED["stages"] = set(STAGES)
ABOVE_STAGES = ("cli_args", "commands", "cli", "__main__")
for name in ABOVE_STAGES:
    ALLOWED[name] = STAGES | {"stages", *ABOVE_STAGES}


def part(module):
    """``jrlhf.core.masks`` -> ``core``."""
    return module.split(".")[1] if "." in module else ""


def imports(path):
    """Every module a file imports, at its top or inside a function, relative imports resolved."""
    package = ["jrlhf", *path.relative_to(ROOT).parent.parts]
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
        assert own in ALLOWED, f"{own} has no floor: give it one here and in the README"
        allowed = ALLOWED[own] | {own}
    used = {part(m) for m in imports(path) if m.split(".")[0] == "jrlhf"} - {"__version__"}
    assert used <= allowed, f"imports {sorted(used - allowed)}"


@of
def test_rules_import_no_jax(path):
    """They are read in threads, by users too: of strings and numbers alone."""
    if "rules" in path.relative_to(ROOT).parts or path.name.startswith("config"):
        assert not [m for m in imports(path) if m.split(".")[0] in {"jax", "flax", "jaxtyping"}]


@of
def test_only_checkpoint_imports_orbax(path):
    if path.name != "checkpoint.py":
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
