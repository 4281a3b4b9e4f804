"""The form of tool calls that a chat template expects, found by rendering probe messages.

Templates take arguments either as an object (transformers) or as JSON text (OpenAI), and a message that only calls
tools has either null or "" as its content. Each form is tried once per template, and rows use one that works.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import Message, Tools, message_text

PROBE_NAME, PROBE_KEY, PROBE_VALUE = "probing", "keyword", "it said so"
PROBE_MESSAGES = [{"role": "user", "content": "Q"}]
PROBE_FUNCTION = {"name": PROBE_NAME, "description": PROBE_NAME, "parameters": {"type": "object"}}
PROBE_TOOL = {"type": "function", "function": PROBE_FUNCTION}
PROBE_CALL_ID = "abcdefghi"
"""Id of the probe's call: nine letters and digits, which Mistral's templates require."""


class CallForms(NamedTuple):
    """The form of tool calls that one template renders correctly."""

    as_object: bool
    """Arguments are passed as an object; if False, as JSON text."""
    contents: tuple[str | None, ...]
    """Contents that work in a message that only calls tools: null, "", or both."""

    def message(self, message: Message) -> Message:
        """Return the message in the template's form."""
        fields = {key: field for key, field in message.items() if key != "weight"}
        if "tool_calls" not in message:
            return fields
        fields["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if not message_text(message) and message["content"] not in self.contents:
            fields["content"] = self.contents[0]
        return fields

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self.as_object or isinstance(function["arguments"], str):
            return call
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def call_forms(render: Callable[[list[Message], Tools | None], str], *, tools: bool) -> CallForms:
    """Return the best form of calls for a template; ``render`` applies the template and may raise ``BadRow``."""
    probe_tools: Tools | None = [PROBE_TOOL] if tools else None
    try:
        nones = render(PROBE_MESSAGES, probe_tools).count("None")
    except BadRow:
        nones = 0
    for as_object in (True, False):
        contents = [c for c in (None, "") if _renders(render, probe_tools, as_object, c, nones)]
        if contents:
            return CallForms(as_object, tuple(contents))
    return CallForms(as_object=True, contents=("",))


def _renders(
    render: Callable[[list[Message], Tools | None], str],
    tools: Tools | None,
    as_object: bool,
    content: str | None,
    nones: int,
) -> bool:
    """Tell whether the template renders a call in this form without Python reprs, doubly encoded JSON or "None"."""
    arguments = {PROBE_KEY: PROBE_VALUE} if as_object else json.dumps({PROBE_KEY: PROBE_VALUE})
    call = {"type": "function", "id": PROBE_CALL_ID, "function": {"name": PROBE_NAME, "arguments": arguments}}
    message = {"role": "assistant", "content": content, "tool_calls": [call]}
    try:
        text = render([*PROBE_MESSAGES, message], tools)
    except BadRow:
        return False
    wrong_forms = (f"'{PROBE_KEY}'", f'\\"{PROBE_KEY}\\"')
    complete = PROBE_NAME in text and PROBE_KEY in text and PROBE_VALUE in text
    return complete and text.count("None") == nones and not any(form in text for form in wrong_forms)
