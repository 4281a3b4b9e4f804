"""Columns of rows, and fields of chat messages, that nothing reads: what people wrote there has no effect.

The tables say what ``formats`` and ``chat`` read. What a row has besides is counted while rows are made, named once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jinja2

from jrlhf.data.chat import template_of
from jrlhf.data.foreign import INPUTS, OUTPUTS
from jrlhf.data.labels import is_verdict
from jrlhf.data.messages import FIELDS
from jrlhf.data.protocol import Tokenizer

Shapes = Mapping[tuple[str, ...], frozenset[str]]
"""The columns that are read of a row, by the columns that decide its shape: the first of these that it has all of."""

_SHAREGPT = frozenset({"conversations", "system", "tools"})
_ALPACA = frozenset({"instruction", *INPUTS, "system", "tools"})
_ANSWERS: Shapes = {
    ("messages",): frozenset({"messages", "tools"}),
    ("completion",): frozenset({"prompt", "completion", "tools"}),
    ("conversations",): _SHAREGPT,
    ("instruction", "output"): _ALPACA | set(OUTPUTS),
    ("instruction", "response"): _ALPACA | set(OUTPUTS),
    ("text",): frozenset({"text"}),
}
_LEARNT: Shapes = {shape: columns if shape == ("text",) else columns | {"label"} for shape, columns in _ANSWERS.items()}
_PAIR = frozenset({"chosen", "rejected"})


def _asked(*columns: str, reads: Set[str] = frozenset()) -> Shapes:
    """Shapes that need these columns, by where their prompt stands; ``reads``: what is read besides."""
    own = frozenset(columns) | reads
    return {
        (*columns, "conversations"): own | _SHAREGPT,
        (*columns, "prompt"): own | {"prompt", "tools"},
        (*columns, "instruction"): own | _ALPACA,
        columns: own | {"tools"},
    }


READ_COLUMNS: Mapping[str, Shapes] = {
    "sft": {
        ("messages",): _LEARNT[("messages",)],
        ("completion",): _LEARNT[("completion",)],
        ("conversations", "chosen"): _SHAREGPT | _PAIR,
        **_LEARNT,
        ("chosen", "prompt"): _PAIR | {"prompt", "tools"},
        ("chosen", "instruction"): _PAIR | _ALPACA,
        ("chosen",): _PAIR | {"tools"},
    },
    "rankings": {
        **_asked("chosen", reads=_PAIR | {"margin"}),
        **_asked("completions", reads=frozenset({"ranks", "margin"})),
    },
    "prompts": {
        ("messages",): _ANSWERS[("messages",)],
        **_asked("chosen", "rejected"),
        ("conversations",): _SHAREGPT,
        ("prompt",): frozenset({"prompt", "tools"}),
        ("instruction",): _ALPACA,
    },
    "texts": {
        **_asked("completions"),
        **_asked("chosen", "rejected"),
        **_ANSWERS,
    },
}
"""What each kind of rows reads, in the order in which its parser looks for a row's shape."""

MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "completions")
MESSAGE_FIELDS: Mapping[str, frozenset[str]] = {
    kind: FIELDS | {"from", "value"} | ({"weight"} if kind == "sft" else set()) for kind in READ_COLUMNS
}
"""What each kind of rows reads of a message itself. A chat template reads others, see ``template_fields``."""

EMPTY = (None, "", [], {})
"""Values in which nothing can be lost. A field that only some rows have comes as None in the others."""

MOST_SHAPES = 1000
"""Sets of columns of which it is remembered what is read."""


def unread_of(kind: str, tokenizer: Tokenizer, also: Iterable[str] = ()) -> Callable[[Mapping[str, Any]], list[str]]:
    """A function from a row to the names in it that nothing reads, such as ``id`` and ``messages[].name``.

    ``also``: columns that are read besides those of ``READ_COLUMNS[kind]``.
    """
    shapes = {shape: columns | frozenset(also) for shape, columns in READ_COLUMNS[kind].items()}
    templates = (template_of(tokenizer), template_of(tokenizer, tools=True))
    fields = MESSAGE_FIELDS[kind].union(*map(template_fields, templates))

    known: dict[tuple[str, ...], _Shape] = {}

    def unread(row: Mapping[str, Any]) -> list[str]:
        present = tuple([column for column, value in row.items() if value is not None])
        if (shape := known.get(present)) is None:
            shape = _shape(present, _columns(row, shapes))
            if len(known) < MOST_SHAPES:
                known[present] = shape
        names = [column for column in shape.others if row[column] not in EMPTY]
        if shape.labelled and not is_verdict(row["label"]):
            names.append("label")
        for column in shape.messages:
            if isinstance(value := row[column], list | dict):
                messages = value if isinstance(value, list) else [value]
                names.extend(dict.fromkeys(_fields(f"{column}[]", messages, fields)))
        return names

    return unread


class _Shape(NamedTuple):
    """Of rows that have the same columns: which are not read, which may hold messages."""

    others: list[str]
    messages: list[str]
    labelled: bool
    """A label beside a conversation, which may be a class: then nothing reads it."""


def _shape(present: Sequence[str], read: Set[str]) -> _Shape:
    others = [column for column in present if column not in read]
    messages = [column for column in MESSAGE_COLUMNS if column in read and column in present]
    return _Shape(others, messages, "label" in present and "label" in read and "completion" not in read)


def _columns(row: Mapping[str, Any], shapes: Shapes) -> frozenset[str]:
    for shape, columns in shapes.items():
        if all(row.get(column) is not None for column in shape):
            return columns
    return frozenset()


def _fields(path: str, messages: list[Any], read: Set[str]) -> Iterator[str]:
    for message in messages:
        if isinstance(message, list):
            yield from _fields(f"{path}[]", message, read)
        elif isinstance(message, dict) and not message.keys() <= read:
            yield from (f"{path}.{field}" for field in message if field not in read and message[field] not in EMPTY)


def template_fields(template: str) -> frozenset[str]:
    """The fields that a chat template names: ``m.name``, ``m['name']``, ``m.get('name')``, ``'name' in m``."""
    fields, before = set[str](), ""
    try:
        for _, token, text in jinja2.Environment().lex(template):
            if token == "string" or (token == "name" and before == "."):
                fields.add(text.strip("'\""))
            before = text if token != "whitespace" else before
    except jinja2.TemplateSyntaxError:  # whoever renders it says so
        return frozenset()
    return frozenset(fields)
