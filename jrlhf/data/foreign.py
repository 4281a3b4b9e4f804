"""Parsers of two widespread row formats beside TRL's: ShareGPT conversations and Alpaca instructions."""

import json
from collections.abc import Mapping
from typing import Any

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import Content, Message, checked_content, checked_text

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
"""Role of each ShareGPT speaker."""
CALLERS = ("function_call", "tool_call")
"""ShareGPT speakers whose turn is a tool call, or a list of calls, as JSON text."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts that Alpaca was trained on (github.com/tatsu-lab/stanford_alpaca), as in column ``text`` of its data."""

INPUTS, OUTPUTS = ("input", "context"), ("output", "response")
"""Names of the input and output columns in Alpaca's and Dolly's data."""


def sharegpt(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the messages of ``{"conversations": [{"from", "value"}], "system"?}``.

    Turns may have ``role`` and ``content`` instead. The column ``system`` becomes a system turn before them.
    """
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRow(column, f"expected a list of turns, found {type(turns).__name__}")
    messages = checked_content(turns_of(turns, column), column)
    assert isinstance(messages, list)
    return [*_system(row, messages), *messages]


def turns_of(value: Any, column: str) -> Any:
    """Convert ShareGPT turns, or a single turn, to unchecked messages; return anything else unchanged."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: Any, place: str) -> Any:
    if not isinstance(turn, dict) or turn.get("from") is None:
        return turn
    speaker, value = str(turn["from"]).lower(), turn.get("value")
    fields = {key: field for key, field in turn.items() if key not in ("from", "value")}
    if isinstance(value, str) and speaker in CALLERS:
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{place}.value", f"{speaker} without the JSON of a call", f": {error}") from None
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": calls if isinstance(calls, list) else [calls],
        } | fields
    if speaker not in SPEAKERS:
        raise BadRow(f"{place}.from", "unknown speaker", f": {turn['from']!r}; expected human, gpt, system or tool")
    if not isinstance(value, str):
        raise BadRow(f"{place}.value", "expected a string")
    return {"role": SPEAKERS[speaker], "content": value} | fields


def is_instruction(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has an Alpaca instruction."""
    return row.get("instruction") is not None


def output_column(row: Mapping[str, Any]) -> str | None:
    """Return the name of the column that answers an instruction, or None."""
    return _first(row, OUTPUTS)


def instruction(row: Mapping[str, Any], *, chat: bool) -> Content:
    """Return the prompt of ``{"instruction", "input"?, "system"?}``: instruction, blank line, input.

    With ``chat`` it is a user message; otherwise it is a string in Alpaca's own prompt, ``ALPACA``.
    """
    task, column = _string(row, "instruction"), _first(row, INPUTS)
    context = "" if column is None else row[column]
    if not isinstance(context, str):
        raise BadRow(column, f"expected a string, found {type(context).__name__}")
    context = checked_text(context, str(column)) if context.strip() else ""
    if chat:
        messages: list[Message] = [{"role": "user", "content": f"{task}\n\n{context}" if context else task}]
        return [*_system(row, messages), *messages]
    head = "".join(message["content"] + "\n\n" for message in _system(row, []))
    return head + (
        ALPACA_WITH_INPUT.format(instruction=task, input=context) if context else ALPACA.format(instruction=task)
    )


def _system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the column ``system`` as a turn, or nothing if it is empty or the messages begin with the same turn."""
    if not row.get("system"):
        return []
    turn = {"role": "system", "content": _string(row, "system")}
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == turn["content"]:
            return []
        raise BadRow("system", "differs from the system turn of the conversation")
    return [turn]


def _string(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise BadRow(column, f"expected a string, found {type(row[column]).__name__}")
    return checked_text(row[column], column)


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)
