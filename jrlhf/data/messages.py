"""Checks of chat messages, tool calls and tool definitions, which bring them to one form.

The chat template receives every field of a message except ``weight``, which says whether a turn is learnt.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jrlhf.data.errors import BadRow

Message = dict[str, Any]
Content = str | list[Message]
Tools = list[dict[str, Any]]
"""JSON schemas of functions, in the form of ``apply_chat_template``."""

TOOL_ROLES = ("tool", "function", "ipython")
"""Roles of a function's result, which a template may render in a form of its own."""

REASONING = ("reasoning_content", "reasoning", "thinking")
FIELDS = frozenset({"role", "content", "tool_calls", *REASONING})
"""Fields of a message whose text must appear in what a template renders; the template receives all others too."""


def checked_content(value: Any, column: str) -> Content:
    """Return a non-empty text or checked messages; raise ``BadRow`` for anything else."""
    if isinstance(value, str):
        return checked_text(value, column)
    if not isinstance(value, list):
        raise BadRow(column, f"expected a string or a list of messages, found {type(value).__name__}")
    if not value:
        raise BadRow(column, "is empty")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def checked_text(value: str, column: str) -> str:
    """Return the text; raise ``BadRow`` if it is blank or UTF-8 cannot encode it."""
    if not value.strip():
        raise BadRow(column, "is empty")
    _check_characters(value, column)
    return value


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message; an empty string if it only calls tools."""
    return message.get("content") or ""


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Tell whether an assistant's turn may be learnt, that is, whether its weight is not 0."""
    return message.get("weight") != 0


def last_assistant(messages: list[Message]) -> int:
    """Return the index of the last assistant turn, or the number of messages if there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))


def has_weights(content: Content | None) -> bool:
    """Tell whether the content has a turn of weight 0."""
    return isinstance(content, list) and not all(map(is_learnt, content))


def tools_of(row: Mapping[str, Any]) -> Tools | None:
    """Return the functions that a row's conversation may call, from a list of JSON schemas or from its JSON text."""
    value = row.get("tools")
    if isinstance(value, str):
        value = _decoded(value, "tools") if value.strip() else None
    # A row without tools has an empty list in Arrow and an empty cell in CSV.
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise BadRow("tools", f"expected a list of functions, found {type(value).__name__}")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(value)]


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a function in the form ``{"type": "function", "function": {...}}`` or ``{"name": ...}``."""
    return tool.get("function", tool)["name"]


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value, including the names of fields."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from strings_in(item)
        case dict():
            for key, item in value.items():
                yield str(key)
                yield from strings_in(item)


def without_fill(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without the None values that Arrow adds to tools and tool calls.

    Arrow gives each struct of a column the fields of all others: ``{"city": "Oslo"}`` is read as ``{"city": "Oslo",
    "expr": None}`` if another call has an ``expr``. A null in JSON was written on purpose and stays.
    """
    return {column: _unfilled(value, inside=column == "tools") for column, value in row.items()}


def _unfilled(value: Any, *, inside: bool) -> Any:
    match value:
        case list():
            return [_unfilled(item, inside=inside) for item in value]
        case dict():
            return {
                key: _unfilled(item, inside=inside or key == "tool_calls")
                for key, item in value.items()
                if item is not None or not inside
            }
        case _:
            return value


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow(place, 'expected a message {"role", "content"}')
    fields = {key: field for key, field in message.items() if field is not None}
    if calls := _calls(fields.pop("tool_calls", None), f"{place}.tool_calls"):
        if message["role"] != "assistant":
            raise BadRow(f"{place}.tool_calls", f"only an assistant calls tools, not {message['role']}")
        fields["tool_calls"] = calls
    if "function_call" in fields:
        raise BadRow(f"{place}.function_call", 'is an outdated form; use "tool_calls"')
    _check_weight(fields, place)
    if odd := next((key for key in REASONING if not isinstance(fields.get(key, ""), str)), None):
        raise BadRow(f"{place}.{odd}", "expected a string")
    fields["content"] = _content(message.get("content"), fields, f"{place}.content")
    return fields


def _content(value: Any, fields: Message, place: str) -> str | None:
    """Return a message's content as one string, joining parts; turns that call tools and tool results may be empty."""
    if isinstance(value, list):
        value = "".join(_part(part, place) for part in value)
    if "tool_calls" in fields and (value is None or value == ""):
        return value
    if not isinstance(value, str):
        raise BadRow(place, "expected a string")
    # Some data sets give every conversation an empty system turn.
    if value or fields["role"] not in ("system", *TOOL_ROLES):
        checked_text(value, place)
    return value


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(place, "expected a string, or a list of parts")
    kind = part.get("type", "text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(place, f"a part has type {kind!r}, but only text is supported")
    return part["text"]


def _check_weight(fields: Message, place: str) -> None:
    weight = fields.get("weight")
    if weight is None:
        return
    if fields["role"] != "assistant":
        raise BadRow(f"{place}.weight", "only an assistant's turn can have a weight, since no other turn is learnt")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"{place}.weight", "expected 0 or 1", f", found {weight!r}")


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return a message's calls from a list or its JSON text; null, an empty list and a blank text mean no calls."""
    value = _decoded(value, place) if isinstance(value, str) and value.strip() else value
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        raise BadRow(place, f"expected a list of calls, found {type(value).__name__}")
    return [checked_call(call, f"{place}[{i}]") for i, call in enumerate(value)]


def checked_call(call: Any, place: str) -> dict[str, Any]:
    """Return a call as ``{"function": {"name", "arguments"}, ...}``, parsing arguments that are JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(place, 'expected a call {"function": {"name", "arguments"}}')
    outer = {key: field for key, field in call.items() if field is not None} if "function" in call else {}
    inner = {key: field for key, field in function.items() if field is not None}
    arguments = _arguments(function.get("arguments"), f"{place}.arguments")
    for text in strings_in([inner, outer, arguments]):
        _check_characters(text, place)
    return {"type": "function", **outer, "function": {**inner, "arguments": arguments}}


def _arguments(value: Any, place: str) -> dict[str, Any] | str:
    """Return arguments as an object (transformers' form); OpenAI's JSON text is parsed, any other text is unchanged."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, dict):
        raise BadRow(place, f"expected an object, found {type(value).__name__}")
    return value


def _tool(tool: Any, place: str) -> dict[str, Any]:
    tool = _decoded(tool, place) if isinstance(tool, str) else tool
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(place, 'expected a function {"name", "description", "parameters"}')
    for text in strings_in(tool):
        _check_characters(text, place)
    return tool


def _decoded(value: str, place: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(place, "is not valid JSON", f": {error}") from None


def _check_characters(value: str, column: str) -> None:
    if "\x00" in value:
        raise BadRow(column, "contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(column, "contains half of a surrogate pair, which UTF-8 cannot encode") from None
