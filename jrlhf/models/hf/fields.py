"""Reading single fields of a Hugging Face config: what does not fit is a ``UsageError`` that names the field."""

from collections.abc import Mapping
from typing import Any

from jrlhf.models.arch import Activation
from jrlhf.system.errors import UsageError

LARGEST = 2**24
"""Of all sizes: no model has more of anything, and arrays are made of some before the weights are looked at."""


def size(config: Mapping[str, Any], key: str) -> int:
    """A positive integer."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f"{key}: expected a positive integer, found {value!r}")
    if value > LARGEST:
        raise UsageError(f"{key}: expected at most {LARGEST}, found {value}")
    return value


def size_or(config: Mapping[str, Any], key: str, default: int) -> int:
    """``default`` where the field is missing or null."""
    return default if config.get(key) is None else size(config, key)


def number(config: Mapping[str, Any], key: str, *, field: str | None = None, default: float | None = None) -> float:
    """A positive number; ``field`` is its name in errors where it stands inside another one."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"{field or key}: expected a positive number, found {value!r}")
    return float(value)


def number_or_none(config: Mapping[str, Any], key: str) -> float | None:
    """None where the field is missing or null."""
    return None if config.get(key) is None else number(config, key)


def switch(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """true, false, or ``default`` where the field is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UsageError(f"{key}: expected true or false, found {value!r}")
    return value


def activation(config: Mapping[str, Any], key: str, *, default: str) -> Activation:
    """The MLP's non-linearity."""
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
    """A switch whose other position is not built."""
    found = switch(config, key, default=value)
    if found is not value:
        raise UsageError(f"{key}: {str(found).lower()} is not supported")
