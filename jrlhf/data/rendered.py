"""Checks that a chat template has rendered all messages, calls and tools of a conversation."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import REASONING, TOOL_ROLES, Message, Tools, message_text, tool_name

TEXT_LOST = "the chat template leaves out or changes what a message says, or moves it"
CALL_LOST = "the chat template leaves out a tool call or its arguments, so the call would not be learnt"
TOOLS_LOST = "the chat template takes no tools, so the model would not see them"


class Turn(NamedTuple):
    """The position of an assistant's turn in a rendered conversation, in characters."""

    prompt_end: int
    """End of the prompt with its generation prompt, which is what a sampler receives."""
    start: int
    """Start of the answer: ``prompt_end``, or later if the template's markers exclude something."""
    end: int
    """End of the answer, after its stop token and what the template writes after that."""


def check_messages(text: str, messages: Sequence[Message], turns: list[Turn], column: str, *, first: int) -> None:
    """Raise ``BadRow`` unless ``text`` contains all messages in order; white space around each may be lost.

    Assistant turns before message ``first`` need only their calls: a template may drop the rest (Qwen3 drops their
    reasoning), since a sampler sees the same text.
    """
    position, remaining = 0, iter(turns)
    turn = next(remaining, None)
    for i, message in enumerate(messages):
        learnt, where = message["role"] == "assistant", f"(message {i}, {message['role']})"
        if learnt and i < first:
            check_calls(text, message, column, where)
            continue
        end = len(text) if turn is None else turn.end if learnt else turn.prompt_end
        position = max(position, turn.start) if turn is not None and learnt else position
        if learnt:
            check_calls(text[position:end], message, column, where)
        thoughts = [message[key] for key in REASONING if learnt and isinstance(message.get(key), str)][:1]
        for part in (*thoughts, message_text(message)):
            # A template may render a tool's result in another form, such as JSON.
            forms = forms_of(part) if message["role"] in TOOL_ROLES else [part.strip()]
            form = next((form for form in forms if text.find(form, position, end) >= 0), None)
            if form is None:
                raise BadRow(column, TEXT_LOST, " " + where)
            position = text.find(form, position, end) + len(form)
        turn = next(remaining, None) if learnt else turn


def check_calls(text: str, message: Message, column: str, where: str) -> None:
    """Raise ``BadRow`` unless ``text`` contains the name and the arguments of each call of the message."""
    for call in message.get("tool_calls", []):
        function = call["function"]
        for word in (function["name"], *_words(function["arguments"])):
            if not any(form in text for form in forms_of(word)):
                raise BadRow(column, CALL_LOST, f": {word!r} {where}")


def check_tools(text: str, without: str, tools: Tools) -> None:
    """Raise ``BadRow`` unless ``text`` contains every function's name and differs from the text without tools."""
    if text == without or not all(any(form in text for form in forms_of(tool_name(tool))) for tool in tools):
        raise BadRow("tools", TOOLS_LOST)


def forms_of(word: str) -> Iterator[str]:
    """Yield the forms in which a word may appear in a text: as it is, and escaped in JSON."""
    word = word.strip()
    yield word
    yield json.dumps(word, ensure_ascii=False)[1:-1]
    yield json.dumps(word)[1:-1]


def call_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a message's calls: function names, and the names and values of arguments."""
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        yield from _words(call["function"]["arguments"])


def _words(value: Any) -> Iterator[str]:
    """Yield the names and values of arguments as text, except true, false and null, whose spelling differs."""
    match value:
        case str():
            yield value
        case bool() | None:
            return
        case int() | float():
            yield json.dumps(value)
        case Mapping():
            for key, item in value.items():
                yield str(key)
                yield from _words(item)
        case Sequence():
            for item in value:
                yield from _words(item)
