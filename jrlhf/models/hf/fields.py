"""Readers of single fields of a Hugging Face config; a bad value is a ``ValueError`` that names the field."""

from collections.abc import Mapping
from typing import Any

from jrlhf.models.arch import Activation
from jrlhf.system.errors import UsageError

MAX_SIZE = 2**24
"""Upper bound of all sizes, checked because arrays of some sizes are allocated before the weights are read."""


def size(config: Mapping[str, Any], key: str) -> int:
    """Read a positive integer."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f"{key}: expected a positive integer, found {value!r}")
    if value > MAX_SIZE:
        raise UsageError(f"{key}: expected at most {MAX_SIZE}, found {value}")
    return value


def size_or(config: Mapping[str, Any], key: str, default: int) -> int:
    """Read a positive integer, or return ``default`` if the field is missing or null."""
    return default if config.get(key) is None else size(config, key)


def number(config: Mapping[str, Any], key: str, *, field: str | None = None, default: float | None = None) -> float:
    """Read a positive number; ``field`` is the name in errors of a nested field."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"{field or key}: expected a positive number, found {value!r}")
    return float(value)


def number_or_none(config: Mapping[str, Any], key: str) -> float | None:
    """Read a positive number, or return None if the field is missing or null."""
    return None if config.get(key) is None else number(config, key)


def switch(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """Read a boolean, or return ``default`` if the field is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UsageError(f"{key}: expected true or false, found {value!r}")
    return value


def activation(config: Mapping[str, Any], key: str, *, default: str) -> Activation:
    """Read the MLP's activation function."""
    name = config.get(key)
    match default if name is None else name:
        case "silu" | "swish":
            return "silu"
        case "gelu":
            return "gelu"
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
            return "gelu_tanh"
        case _:
            supported = "'silu', 'gelu', 'gelu_new', 'gelu_fast', 'gelu_pytorch_tanh'"
            raise UsageError(f"{key}: {name!r} is not supported; supported: {supported}")


def require(config: Mapping[str, Any], key: str, *, value: bool) -> None:
    """Raise ValueError unless a switch has the only supported ``value``."""
    actual = switch(config, key, default=value)
    if actual is not value:
        raise UsageError(f"{key}: {str(actual).lower()} is not supported")
