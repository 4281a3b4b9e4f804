"""Chat messages, tool calls and tool definitions as rows have them, checked and brought to one form.

All fields of a message go on to the chat template but ``weight``, which says whether a turn is learnt.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jrlhf.data.errors import BadRow

Message = dict[str, Any]
Content = str | list[Message]
Tools = list[dict[str, Any]]
"""JSON schemas of functions, as ``apply_chat_template`` takes them."""

TOOL_ROLES = ("tool", "function", "ipython")
"""Roles in which a function's result comes: a template may write it in a form of its own."""

REASONING = ("reasoning_content", "reasoning", "thinking")
FIELDS = frozenset({"role", "content", "tool_calls", *REASONING})
"""Fields of a message whose words must stand in what a template writes; it is given all others too."""


def checked_content(value: Any, column: str) -> Content:
    """A text that is one, or messages; ``BadRow`` for anything else."""
    if isinstance(value, str):
        return checked_text(value, column)
    if not isinstance(value, list):
        raise BadRow(column, f"expected a string or a list of messages, found {type(value).__name__}")
    if not value:
        raise BadRow(column, "is empty")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def checked_text(value: str, column: str) -> str:
    """The text, where it says something that UTF-8 can hold."""
    if not value.strip():
        raise BadRow(column, "is empty")
    _check_characters(value, column)
    return value


def said(message: Mapping[str, Any]) -> str:
    """What a message says; nothing where it only calls tools."""
    return message.get("content") or ""


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn may be learnt: its weight is not 0."""
    return message.get("weight") != 0


def has_weights(content: Content | None) -> bool:
    """Whether a turn of it is not to be learnt."""
    return isinstance(content, list) and not all(map(is_learnt, content))


def tools_of(row: Mapping[str, Any]) -> Tools | None:
    """The functions that a row's conversation may call: a list of their JSON schemas, or such a list as JSON text."""
    value = row.get("tools")
    if isinstance(value, str):
        value = _decoded(value, "tools") if value.strip() else None
    # Where rows have no tools, Arrow has an empty list and CSV an empty cell.
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise BadRow("tools", f"expected a list of functions, found {type(value).__name__}")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(value)]


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a function, given as ``{"type": "function", "function": {...}}`` or bare."""
    return tool.get("function", tool)["name"]


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, the names of fields included."""
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
    """The row without the None that Arrow puts into tools and tool calls for what only other rows have.

    A column of structs has the fields of all its rows: ``{"city": "Oslo"}`` comes back as ``{"city": "Oslo", "expr":
    None}`` where another call has an ``expr``. In JSON null is there because somebody wrote it, and stays.
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
        raise BadRow(f"{place}.function_call", 'is the old form of "tool_calls"; give those')
    _check_weight(fields, place)
    if odd := next((key for key in REASONING if not isinstance(fields.get(key, ""), str)), None):
        raise BadRow(f"{place}.{odd}", "expected a string")
    fields["content"] = _content(message.get("content"), fields, f"{place}.content")
    return fields


def _content(value: Any, fields: Message, place: str) -> str | None:
    """A string, maybe put together of parts. A turn that calls tools may say nothing, and so may what tools give."""
    if isinstance(value, list):
        value = "".join(_part(part, place) for part in value)
    if "tool_calls" in fields and (value is None or value == ""):
        return value
    if not isinstance(value, str):
        raise BadRow(place, "expected a string")
    # Some data sets give every conversation a system turn that says nothing.
    if value or fields["role"] not in ("system", *TOOL_ROLES):
        checked_text(value, place)
    return value


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(place, "expected a string, or a list of parts")
    kind = part.get("type", "text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(place, f"a part of type {kind!r}; only text can be read")
    return part["text"]


def _check_weight(fields: Message, place: str) -> None:
    weight = fields.get("weight")
    if weight is None:
        return
    if fields["role"] != "assistant":
        raise BadRow(f"{place}.weight", "only an assistant's turn is learnt, so no other has a weight")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"{place}.weight", "expected 0 or 1", f", found {weight!r}")


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a message, maybe as JSON text; none where there is nothing, which each format writes its own way."""
    value = _decoded(value, place) if isinstance(value, str) and value.strip() else value
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        raise BadRow(place, f"expected a list of calls, found {type(value).__name__}")
    return [checked_call(call, f"{place}[{i}]") for i, call in enumerate(value)]


def checked_call(call: Any, place: str) -> dict[str, Any]:
    """A call as ``{"function": {"name", "arguments"}, ...}``, the arguments as an object where they are one."""
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
    """As an object, which transformers asks for; OpenAI has its JSON text. What is no such text stays as it is."""
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
        raise BadRow(place, "a text that is no JSON", f": {error}") from None


def _check_characters(value: str, column: str) -> None:
    if "\x00" in value:
        raise BadRow(column, "holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(column, "holds half of a surrogate pair, which is no text") from None
