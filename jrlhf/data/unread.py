"""Detection of row columns and message fields that nothing reads, so that a user learns that they have no effect.

The tables list what ``formats`` and ``chat`` read. Everything else is counted while rows are encoded and logged once.
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
"""The columns that are read, by the columns that decide a row's shape; the first key that the row has fully applies."""

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


def _prompt_shapes(*columns: str, reads: Set[str] = frozenset()) -> Shapes:
    """Return the shapes with these columns for every place of the prompt; ``reads`` adds columns that are read."""
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
        **_prompt_shapes("chosen", reads=_PAIR | {"margin"}),
        **_prompt_shapes("completions", reads=frozenset({"ranks", "margin"})),
    },
    "unpaired": {
        **_prompt_shapes("chosen", reads=_PAIR),
        **{shape: columns for shape, columns in _LEARNT.items() if shape != ("text",)},
    },
    "prompts": {
        ("messages",): _ANSWERS[("messages",)],
        **_prompt_shapes("chosen", "rejected"),
        ("conversations",): _SHAREGPT,
        ("prompt",): frozenset({"prompt", "tools"}),
        ("instruction",): _ALPACA,
    },
    "texts": {
        **_prompt_shapes("completions"),
        **_prompt_shapes("chosen", "rejected"),
        **_ANSWERS,
    },
}
"""The columns that each kind of rows reads, in the order in which its parser tests a row's shape."""

MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "completions")
MESSAGE_FIELDS: Mapping[str, frozenset[str]] = {
    kind: FIELDS | {"from", "value"} | ({"weight"} if kind == "sft" else set()) for kind in READ_COLUMNS
}
"""The message fields that each kind of rows reads. A chat template reads more, see ``template_fields``."""

EMPTY = (None, "", [], {})
"""Values without content, which are not reported. A field that only some rows have is None in the others."""

MAX_CACHED_SHAPES = 1000
"""Maximum number of different column sets whose shapes are cached."""


def unread_of(kind: str, tokenizer: Tokenizer, extra: Iterable[str] = ()) -> Callable[[Mapping[str, Any]], list[str]]:
    """Return a function from a row to the names in it that nothing reads, such as ``id`` and ``messages[].name``.

    ``extra`` names columns that are read in addition to ``READ_COLUMNS[kind]``.
    """
    shapes = {shape: columns | frozenset(extra) for shape, columns in READ_COLUMNS[kind].items()}
    templates = (template_of(tokenizer), template_of(tokenizer, tools=True))
    fields = MESSAGE_FIELDS[kind].union(*map(template_fields, templates))

    shape_cache: dict[tuple[str, ...], _Shape] = {}

    def unread(row: Mapping[str, Any]) -> list[str]:
        present = tuple([column for column, value in row.items() if value is not None])
        if (shape := shape_cache.get(present)) is None:
            shape = _shape(present, _columns(row, shapes))
            if len(shape_cache) < MAX_CACHED_SHAPES:
                shape_cache[present] = shape
        names = [column for column in shape.unread if row[column] not in EMPTY]
        if kind == "sft" and shape.class_label and not is_verdict(row["label"]):
            names.append("label")
        for column in shape.messages:
            if isinstance(value := row[column], list | dict):
                messages = value if isinstance(value, list) else [value]
                names.extend(dict.fromkeys(_fields(f"{column}[]", messages, fields)))
        return names

    return unread


class _Shape(NamedTuple):
    """The columns of rows of one shape that are not read, and those that may hold messages."""

    unread: list[str]
    messages: list[str]
    class_label: bool
    """True if the label may be a class, as beside a conversation; then nothing reads it."""


def _shape(present: Sequence[str], read: Set[str]) -> _Shape:
    unread = [column for column in present if column not in read]
    messages = [column for column in MESSAGE_COLUMNS if column in read and column in present]
    return _Shape(unread, messages, "label" in present and "label" in read and "completion" not in read)


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
    """Return the fields that a chat template names: ``m.name``, ``m['name']``, ``m.get('name')``, ``'name' in m``."""
    fields, before = set[str](), ""
    try:
        for _, token, text in jinja2.Environment().lex(template):
            if token == "string" or (token == "name" and before == "."):
                fields.add(text.strip("'\""))
            before = text if token != "whitespace" else before
    except jinja2.TemplateSyntaxError:  # rendering the template reports the error
        return frozenset()
    return frozenset(fields)
