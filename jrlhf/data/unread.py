"""Columns of rows, and fields of chat messages, that nothing reads: what people wrote there has no effect.

A row's own parser says which columns it reads. What a row has besides is counted while rows are made, and named once.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import jinja2

from jrlhf.data.chat import template_of
from jrlhf.data.errors import Row
from jrlhf.data.tokenizer import Tokenizer

MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "completions")
MESSAGE_FIELDS = frozenset({"role", "content"})
"""What is read of every message; a chat template reads others, see ``template_fields``."""

EMPTY = (None, "", [], {})
"""Values in which nothing can be lost. A field that only some rows have comes as None in the others."""
Parser = Callable[[Row], Any]
SHAPES = 1000
"""Kinds of rows, by the columns that they have, of which it is remembered what is read."""


def unread_of(parse: Parser, tokenizer: Tokenizer, also: Iterable[str] = ()) -> Callable[[Row], list[str]]:
    """A function from a good row to the names in it that nothing reads, such as ``id`` and ``messages[].name``.

    ``also``: columns that are read besides those that ``parse`` reads.
    """
    fields = MESSAGE_FIELDS | template_fields(template_of(tokenizer))
    known: dict[tuple[str, ...], frozenset[str]] = {}

    def unread(row: Row) -> list[str]:
        columns = tuple(column for column in row if row[column] not in EMPTY)
        if (read := known.get(columns)) is None:
            read = columns_read(row, parse).union(also)
            if len(known) < SHAPES:
                known[columns] = read
        names = [column for column in columns if column not in read]
        for column in MESSAGE_COLUMNS:
            if column in read and isinstance(value := row.get(column), list):
                names.extend(dict.fromkeys(_fields(f"{column}[]", value, fields)))
        return names

    return unread


def columns_read(row: Row, parse: Parser) -> frozenset[str]:
    """The columns of a good row at which its parser looks."""
    recorder = _Recorder(row)
    parse(recorder)
    return frozenset(recorder.read)


class _Recorder(dict[str, Any]):
    """A row that remembers which of its columns were looked at."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read = set[str]()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.read.add(column)
        return super().get(column, default)


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
