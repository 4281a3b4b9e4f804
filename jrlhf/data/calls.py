"""Tool calls in the form that a chat template writes.

Templates differ in what they take: arguments as an object (transformers' way) or as JSON text (OpenAI's), and beside
calls a content of null or of "". What a template makes of each is tried once; a row is given in a form that works.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import Message, Tools, said

NAME, KEY, VALUE = "probing", "keyword", "it said so"
PROBE = [{"role": "user", "content": "Q"}]
TOOL = {"type": "function", "function": {"name": NAME, "description": NAME, "parameters": {"type": "object"}}}
ID = "abcdefghi"
"""Nine letters and digits, as Mistral's templates want them."""


class CallForms(NamedTuple):
    """The form of calls for one template."""

    as_object: bool
    """Arguments are given as an object, else as JSON text."""
    contents: tuple[str | None, ...]
    """The content that stands beside calls in a message without text: null, "", or either."""

    def message(self, message: Message) -> Message:
        """The message as the template takes it."""
        fields = {key: field for key, field in message.items() if key != "weight"}
        if "tool_calls" not in message:
            return fields
        fields["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if not said(message) and message["content"] not in self.contents:
            fields["content"] = self.contents[0]
        return fields

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self.as_object or isinstance(function["arguments"], str):
            return call
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def call_forms(render: Callable[[list[Message], Tools | None], str], *, tools: bool) -> CallForms:
    """The form that a template writes best; ``render`` is the template, which may raise ``BadRow``."""
    offered: Tools | None = [TOOL] if tools else None
    try:
        nones = render(PROBE, offered).count("None")
    except BadRow:
        nones = 0
    for as_object in (True, False):
        contents = [c for c in (None, "") if _writes(render, offered, as_object, c, nones)]
        if contents:
            return CallForms(as_object, tuple(contents))
    return CallForms(as_object=True, contents=("",))


def _writes(
    render: Callable[[list[Message], Tools | None], str],
    offered: Tools | None,
    as_object: bool,
    content: str | None,
    nones: int,
) -> bool:
    """Whether the template writes a call given so, as neither Python's text nor JSON inside JSON, and no "None"."""
    arguments = {KEY: VALUE} if as_object else json.dumps({KEY: VALUE})
    call = {"type": "function", "id": ID, "function": {"name": NAME, "arguments": arguments}}
    try:
        text = render([*PROBE, {"role": "assistant", "content": content, "tool_calls": [call]}], offered)
    except BadRow:
        return False
    odd = (f"'{KEY}'", f'\\"{KEY}\\"')
    written = NAME in text and KEY in text and VALUE in text
    return written and text.count("None") == nones and not any(form in text for form in odd)
