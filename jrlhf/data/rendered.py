"""Whether a chat template has written all that a conversation says, calls and offers; ``BadRow`` where it has not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import REASONING, TOOL_ROLES, Message, Tools, said, tool_name

LOST = "the chat template leaves out or changes what a message says, or moves it"
UNCALLED = "the chat template leaves out a tool call or its arguments, so the call would not be learnt"
UNTOOLED = "the chat template takes no tools, so the model would not see them"


class Turn(NamedTuple):
    """Where an assistant's turn stands in a rendered conversation, in characters."""

    asked: int
    """The end of what asks for it: a sampler is given all before."""
    start: int
    """Of the answer: the same place, or later where the template's markers leave something out."""
    end: int
    """Of the answer; its stop token and what the template puts after that stand before it."""


def check_said(text: str, messages: Sequence[Message], turns: list[Turn], column: str, *, first: int) -> None:
    """``BadRow`` unless ``text`` says what the messages say, in their order; white space around each may go.

    Of assistant turns those from message ``first`` on count: of earlier ones a template may keep what it likes (Qwen3
    drops their reasoning), as it does so for a sampler too; but not drop what they called.
    """
    at, coming = 0, iter(turns)
    turn = next(coming, None)
    for i, message in enumerate(messages):
        learnt, where = message["role"] == "assistant", f"(message {i}, {message['role']})"
        if learnt and i < first:
            check_calls(text, message, column, where)
            continue
        end = len(text) if turn is None else turn.end if learnt else turn.asked
        at = max(at, turn.start) if turn is not None and learnt else at
        if learnt:
            check_calls(text[at:end], message, column, where)
        thoughts = [message[key] for key in REASONING if learnt and isinstance(message.get(key), str)][:1]
        for part in (*thoughts, said(message)):
            # What a tool gives a template may write in a form of its own, such as JSON.
            forms = forms_of(part) if message["role"] in TOOL_ROLES else [part.strip()]
            form = next((form for form in forms if text.find(form, at, end) >= 0), None)
            if form is None:
                raise BadRow(column, LOST, " " + where)
            at = text.find(form, at, end) + len(form)
        turn = next(coming, None) if learnt else turn


def check_calls(text: str, message: Message, column: str, where: str) -> None:
    """``BadRow`` unless ``text`` has the name and the arguments of each call of the message."""
    for call in message.get("tool_calls", []):
        function = call["function"]
        for word in (function["name"], *_words(function["arguments"])):
            if not any(form in text for form in forms_of(word)):
                raise BadRow(column, UNCALLED, f": {word!r} {where}")


def check_tools(text: str, without: str, tools: Tools) -> None:
    """``BadRow`` unless ``text`` has every function's name, and differs from what it is without them."""
    if text == without or not all(any(form in text for form in forms_of(tool_name(tool))) for tool in tools):
        raise BadRow("tools", UNTOOLED)


def forms_of(word: str) -> Iterator[str]:
    """A word as it may stand in a text: as it is, and inside JSON."""
    word = word.strip()
    yield word
    yield json.dumps(word, ensure_ascii=False)[1:-1]
    yield json.dumps(word)[1:-1]


def call_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """The words of a message's calls: names, and the fields and values of arguments."""
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        yield from _words(call["function"]["arguments"])


def _words(value: Any) -> Iterator[str]:
    """Names and values of arguments as they are written; true, false and null are not, since each language has its."""
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
