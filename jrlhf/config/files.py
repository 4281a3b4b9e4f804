"""Reads YAML files and command-line flags into the config dataclasses, strictly, and writes YAML. Imports no JAX.

The same functions read both as YAML nodes, so errors have the same text for both. Nodes are read but never
constructed: no tag (`!!python/object`) has any effect, and `1e-5`, which YAML takes for a string, becomes a float.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from jrlhf.config.check import check, leaves
from jrlhf.config.errors import ConfigError
from jrlhf.config.methods import method_advice
from jrlhf.config.schema import Sources, Switch, WeightCap
from jrlhf.config.stages import Config
from jrlhf.config.yaml_merge import MergeError, merged_pairs
from jrlhf.system.paths import expanded, expanded_value
from jrlhf.system.suggest import did_you_mean, either

__all__ = ["ConfigError", "apply_flags", "check", "config_path", "diff_configs", "flag_types", "load_config", "to_yaml"]

T = TypeVar("T")
TAG = "tag:yaml.org,2002:"
SOURCES = get_args(Sources)[0]
"""Type of sources without the mark that their texts are paths."""
EXPECTED: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    Switch: "true, false or auto",
    int: "a whole number",
    float: "a finite number",
    WeightCap: "a finite number or auto",
}
ANCHORS = (".", "x-")
"""Prefixes of top-level keys that only hold an anchor: ``.common: &common {lr: 1e-4}``."""
MAX_QUOTED = 200
"""Maximum number of characters that an error quotes of a wrong value, and of digits in a whole number."""
KINDS = {"str": "a string", "bool": "a boolean", "int": "a whole number", "float": "a number", "timestamp": "a date"}


def load_config(path: str | Path, flags: Mapping[str, Sequence[str]] | None = None) -> Config:
    """Load a YAML file over the defaults, apply `flags` over both, and check the result.

    An empty file gives the defaults. ConfigError names the file, line and key of every mistake, one a line.
    """
    try:
        path = Path(expanded(str(path)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = _load_unchecked(path)
    config = apply_flags(config, flags or {})
    check(config)
    return config


def apply_flags(config: T, flags: Mapping[str, Sequence[str]]) -> T:
    """Set values as typed on a command line: `{"seed": ["1"], "sft.sampling.stop": ["a", "b"]}`.

    The names come from `flag_types`. ConfigError names every value of a wrong type, one a line.
    """
    types, problems = flag_types(type(config)), []
    for name, texts in flags.items():
        try:
            value = _read_value(_flag_node(texts, types[name]), types[name])
        except _WrongValueError as error:
            problems.append(f"--{name}: {error}")
        else:
            config = _replace_at(config, name.split("."), value)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def to_yaml(config: Any) -> str:
    """Write every field of a config, defaults included; `load_config` reads it back to an equal config."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def diff_configs(old: T, new: T) -> list[str]:
    """Return `path: old -> new` for every field that differs."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [f"{path}: {before[path]!r} -> {value!r}" for path, value in after.items() if before[path] != value]


def config_path(name: str) -> Path:
    """Return the path of a shipped recipe, such as `quickstart/full.yaml`, in a checkout or an installed package."""
    package = Path(__file__).resolve().parents[1]
    # pyproject.toml puts the checkout's configs/ into the wheel under the first name.
    for folder in (package / "recipes", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name}: there is no such recipe in {package / 'recipes'} or {package.parent / 'configs'}")


def schema(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map the dotted path of every section (`mesh`) and every value in it (`mesh.fsdp`) to its type."""
    types: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=True)
    # Fields alone: a class variable is no value of a config.
    for name, hint in ((f.name, hints[f.name]) for f in fields(cls)):
        types[prefix + name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            types |= schema(hint, f"{prefix}{name}.")
    return types


def flag_types(cls: type) -> dict[str, Any]:
    """Map the dotted path of every value that a command line can set to its type."""
    return {path: hint for path, hint in schema(cls).items() if not is_dataclass(hint)}


class _WrongValueError(ValueError):
    """A wrong value: the message has the expected and the actual value, but not the place."""


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, so that no Python tag is needed, and quotes characters that YAML reads as line ends."""


def _quoted(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if re.search("[\x85\u2028\u2029]", value) else None
    return dumper.represent_scalar(TAG + "str", value, style=style)


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))
_Dumper.add_representer(str, _quoted)


def _load_unchecked(path: Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{mark.line + 1}:{mark.column + 1}" if mark else "1"
        raise ConfigError(f"{path}:{line}: bad YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: bad YAML: {error.reason} (#x{error.character:04x})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: bad YAML: nested too deeply") from error
    problems: list[str] = []
    config = _read_section(node, Config(), "", str(path), problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _read_section(node: yaml.Node | None, current: T, path: str, file: str, problems: list[str]) -> T:
    """Return `current` with the values of a YAML mapping. A section without values stays as it is."""
    if node is None or node.tag == TAG + "null":
        return current
    if not isinstance(node, yaml.MappingNode) or node.tag != TAG + "map":
        where = f"{file}:{node.start_mark.line + 1}: {path + ': ' if path else ''}"
        problems.append(f"{where}expected a section of keys, got {_describe(node)}")
        return current
    try:
        pairs = merged_pairs(node)
    except MergeError as error:
        problems.append(f"{file}:{error.line}: {path + ': ' if path else ''}{error}")
        return current
    hints = get_type_hints(type(current), include_extras=True)
    changes: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in pairs:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _describe(key_node)
        line, name = key_node.start_mark.line + 1, f"{path}.{key}" if path else key
        where = f"{file}:{line}: {name}"
        if key in lines:
            problems.append(f"{where}: set twice, first on line {lines[key]}")
        elif not path and key.startswith(ANCHORS):
            pass
        elif key not in hints:
            advice = method_advice(name)
            guess = f"; {advice}" if advice else did_you_mean(name, schema(Config))
            problems.append(f"{where}: unknown key{guess}")
        elif is_dataclass(hints[key]):
            changes[key] = _read_section(value_node, vars(current)[key], name, file, problems)
        else:
            try:
                changes[key] = _read_value(value_node, hints[key])
            except _WrongValueError as error:
                problems.append(f"{where}: {error}")
        lines.setdefault(key, line)
    return replace(current, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _read_value(node: yaml.Node, hint: Any) -> Any:
    """Return the value of a field; the error names the expected type."""
    if get_origin(hint) is Annotated:
        return _read_path(node, get_args(hint)[0])
    if hint == SOURCES:
        return _read_weights(node) if isinstance(node, yaml.MappingNode) else _read_value(node, str)
    if get_origin(hint) is tuple:
        if not isinstance(node, yaml.SequenceNode) or node.tag != TAG + "seq":
            raise _WrongValueError(f"expected a list, got {_describe(node)}")
        return tuple(_read_value(item, get_args(hint)[0]) for item in node.value)
    options = get_args(hint) if get_origin(hint) is Literal else ()
    if hint in (Switch, WeightCap) and isinstance(node, yaml.ScalarNode) and node.value == "auto":
        return node.value
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(TAG):
        raise _WrongValueError(f"expected {either(options) if options else EXPECTED[hint]}, got {_describe(node)}")
    if options:
        if node.value in options:
            return node.value
        raise _WrongValueError(f"expected {either(options)}, got {_describe(node)}")
    value = _scalar(node, hint)
    if value is None:
        hint_text = "; put it in quotes" if hint is str and node.value else ""
        raise _WrongValueError(f"expected {EXPECTED[hint]}, got {_describe(node)}{hint_text}")
    return value


def _read_path(node: yaml.Node, hint: Any) -> Any:
    value = _read_value(node, hint)
    try:
        return expanded_value(value)
    except ValueError as error:
        raise _WrongValueError(str(error)) from error


def _read_weights(node: yaml.MappingNode) -> dict[str, float]:
    """Read sources with their weights: ``{a.jsonl: 3, b.jsonl: 1}``."""
    if node.tag != TAG + "map":
        raise _WrongValueError(f"expected a string, or strings with weights, got {_describe(node)}")
    weights: dict[str, float] = {}
    try:
        pairs = merged_pairs(node)
    except MergeError as error:
        raise _WrongValueError(str(error)) from error
    for key_node, value_node in pairs:
        source = _read_value(key_node, str)
        if source in weights:
            raise _WrongValueError(f"{source!r} appears twice")
        weight = _scalar(value_node, float) if isinstance(value_node, yaml.ScalarNode) else None
        if not isinstance(weight, float):
            raise _WrongValueError(
                f"expected {EXPECTED[float]} as the weight of {source!r}, got {_describe(value_node)}"
            )
        weights[source] = weight
    return weights


def _scalar(node: yaml.ScalarNode, hint: Any) -> str | bool | int | float | None:
    """Return the value, or None if the text is not of the type. Quoted text is a string, never a number."""
    if hint is str:
        return node.value if node.tag == TAG + "str" else None
    if hint in (bool, Switch):
        return yaml.SafeLoader.bool_values[node.value.lower()] if node.tag == TAG + "bool" else None
    if node.style is not None:
        return None
    if hint is int:
        # YAML's own rule reads 010 as 8 and 1:30 as 90. Python refuses more than 4,300 digits.
        is_whole = re.fullmatch(r"[-+]?\d+(_\d+)*", node.value) and len(node.value) <= MAX_QUOTED
        return int(node.value) if is_whole else None
    try:
        value = float(node.value)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _flag_node(texts: Sequence[str], hint: Any) -> yaml.Node:
    if get_origin(hint) is Annotated:
        return _flag_node(texts, get_args(hint)[0])
    if get_origin(hint) is tuple:
        items = [_flag_node([text], get_args(hint)[0]) for text in texts]
        return yaml.SequenceNode(TAG + "seq", items)
    [text] = texts
    if hint == SOURCES and text.lstrip().startswith("{"):
        return _composed(text)
    # The shell has removed the quotes, so the type of the field decides: a run may have the name 2026.
    is_text = hint in (str, SOURCES) or get_origin(hint) is Literal
    tag = TAG + "str" if is_text else yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def _composed(text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _WrongValueError(
            f"expected sources with weights, such as {{a.jsonl: 3, b.jsonl: 1}}, got {text!r}"
        ) from error
    assert node is not None  # it begins with a brace
    return node


def _describe(node: yaml.Node) -> str:
    kind = node.tag.removeprefix(TAG)
    if isinstance(node, yaml.ScalarNode) and kind in KINDS:
        cut = "..." if len(node.value) > MAX_QUOTED else ""
        return f"{node.value[:MAX_QUOTED]!r}{cut} ({KINDS[kind]})"
    plain = {"null": "nothing", "seq": "a list", "map": "a section"}
    return plain.get(kind, f"the tag {node.tag.replace(TAG, '!!')}, which is not allowed")


def _replace_at(config: Any, path: Sequence[str], value: Any) -> Any:
    head, *rest = path
    return replace(config, **{head: _replace_at(vars(config)[head], rest, value) if rest else value})
