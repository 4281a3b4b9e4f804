"""Rendering of conversations with the tokenizer's chat template, and the positions of answers in the text.

A template is a Jinja program that transformers runs in a sandbox. Its ``{% generation %}`` markers, if any, delimit the
answers. Without markers an answer is the text that the conversation gains when the answer is added to it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from jrlhf.data.calls import CallForms, call_forms
from jrlhf.data.errors import BadRow, DataError
from jrlhf.data.messages import Message, Tools, message_text
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.rendered import Turn, call_texts, check_messages, check_tools
from jrlhf.data.tokenizer import end_of_turn

TODAY = datetime(2024, 7, 26)
"""The date that templates see as today (Llama 3's default); with the real date a resumed run would see other tokens."""

MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
MARK_BEGIN, MARK_END = "\ufdd0", "\ufdd1"
"""Temporary marks around an answer. Unicode reserves both characters for internal use, so no text contains them."""

RANDOM_DRAW = re.compile(r"\|\s*random\b|\blipsum\b")

HISTORY_CHANGED = "the chat template changes earlier turns when later ones come, so what is learnt cannot be marked"
SPLIT_ADVICE = "; give the row as prompt and completion to learn its last answer alone"
PROMPT_DIFFERS = "the chat template begins an answer unlike its generation prompt, so it would not follow its prompt"
PROMPT_IGNORED = "the chat template ignores add_generation_prompt, so the header of the answer would be learnt"
BAD_MARKERS = "the chat template does not put one pair of generation markers around each answer"
NO_STOP_TOKEN = "the chat template ends an answer inside the conversation with no stop token, so stopping is not learnt"


class Variant(NamedTuple):
    """A tokenizer's chat template for rows with tools or for rows without."""

    template: str
    marked_template: str
    """The template with ``MARK_BEGIN`` and ``MARK_END`` inside its generation markers; empty if it has no markers."""
    calls: CallForms


class Chat(NamedTuple):
    """A row's conversation, its tools, and the column that errors name."""

    messages: Sequence[Message]
    column: str
    tools: Tools | None


class ChatTemplate:
    """A tokenizer's chat template, if any; raises ``BadRow`` where the learnt tokens cannot be marked exactly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.exists = bool(template_of(tokenizer))
        ids = (end_of_turn(tokenizer), tokenizer.eos_token_id)
        self.stops: list[str] = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
        self._variant = cache(self._build_variant)

    def prompt(self, messages: Sequence[Message], column: str, tools: Tools | None = None) -> str:
        """Render the messages with the generation prompt for the assistant's next turn."""
        chat = Chat(messages, column, tools)
        text = self._render(chat, opens=True)
        self._check_tools(text, chat, opens=True)
        check_messages(text, messages, [], column, first=len(messages))
        return text

    def conversation(self, messages: Sequence[Message], column: str, tools: Tools | None = None) -> str:
        """Render the whole conversation, with everything that the template writes after the last message."""
        chat = Chat(messages, column, tools)
        text = self._render(chat, opens=False)
        self._check_tools(text, chat, opens=False)
        return text

    def turns(
        self, messages: Sequence[Message], column: str, *, first: int, tools: Tools | None = None
    ) -> tuple[str, list[Turn]]:
        """Render the conversation up to its last assistant turn, and locate the assistant turns from ``first`` on."""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if not numbers:
            raise BadRow(column, "no assistant turn, so nothing to learn from")
        if numbers[0] == 0:
            raise BadRow(column, "begins with an assistant turn, which answers nothing; begin with a user turn")
        for i in numbers:
            words = (message_text(messages[i]), *call_texts(messages[i]))
            if stop := next((stop for stop in self.stops for word in words if stop in word), None):
                raise BadRow(column, "an answer contains a stop token, which would end it", f": {stop} in message {i}")
        chat = Chat(messages[: numbers[-1] + 1], column, tools)
        locate = self._by_markers if self._variant(bool(tools)).marked_template else self._by_prefixes
        text, turns = locate(chat, numbers)
        self._check_tools(text, chat, opens=False)
        check_messages(text, chat.messages, turns, column, first=first)
        return text, turns

    def _by_prefixes(self, chat: Chat, numbers: list[int]) -> tuple[str, list[Turn]]:
        rendered, turns = "", list[Turn]()
        for i in numbers:
            opening = self._render(chat, i, opens=True)
            if not opening.startswith(rendered):
                raise BadRow(chat.column, HISTORY_CHANGED + SPLIT_ADVICE, f" (message {i})")
            rendered = self._render(chat, i + 1, opens=False)
            words = message_text(chat.messages[i]).strip()
            answer_start = rendered.find(words, len(opening)) if words else len(rendered)
            if not rendered.startswith(opening) or rendered[len(opening) : answer_start].strip():
                self._check_generation_prompt(chat, i, opening, rendered)
            turns.append(Turn(len(opening), len(opening), len(rendered)))
        return rendered, turns

    def _check_generation_prompt(self, chat: Chat, i: int, opening: str, rendered: str) -> None:
        """Raise ``BadRow`` if ``rendered`` does not begin with ``opening``, or ``opening`` has no generation prompt."""
        where, history = f" (message {i})", self._render(chat, i, opens=False)
        if not rendered.startswith(opening):
            raise BadRow(chat.column, PROMPT_DIFFERS if rendered.startswith(history) else HISTORY_CHANGED, where)
        if opening == history:
            raise BadRow(chat.column, PROMPT_IGNORED, where)

    def _by_markers(self, chat: Chat, numbers: list[int]) -> tuple[str, list[Turn]]:
        """Locate the answers by markers in one rendering, of which each answer's prompt must be a prefix."""
        column = chat.column
        text, spans = self._render(chat, opens=False), list[tuple[int, int]]()
        pieces = re.split(f"([{MARK_BEGIN}{MARK_END}])", self._render(chat, opens=False, with_marks=True))
        balanced = pieces[1::2] == [MARK_BEGIN, MARK_END] * (len(pieces) // 4)
        if "".join(pieces[::2]) != text or not balanced:
            raise BadRow(column, BAD_MARKERS)
        position = 0
        for i, piece in enumerate(pieces[::2]):
            if i % 2:
                spans.append((position, position + len(piece)))
            position += len(piece)
        before = sum(message["role"] == "assistant" for message in chat.messages[: numbers[0]])
        if len(spans) != before + len(numbers):
            raise BadRow(column, BAD_MARKERS, f": {len(spans)} pairs for {before + len(numbers)} answers")
        turns, turn_end = list[Turn](), 0
        for i, (start, end) in zip(numbers, spans[before:], strict=True):
            prompt = self._render(chat, i, opens=True)
            if not text.startswith(prompt) or not turn_end <= len(prompt) <= end:
                raise BadRow(column, PROMPT_DIFFERS, f" (message {i})")
            # Markers may exclude the stop token, which is learnt all the same.
            turn_end = end + next((len(stop) for stop in self.stops if text.startswith(stop, end)), 0)
            turns.append(Turn(len(prompt), max(start, len(prompt)), turn_end))
        return text[:turn_end], turns

    def _check_tools(self, text: str, chat: Chat, *, opens: bool) -> None:
        if chat.tools:
            try:
                without = self._render(chat, opens=opens, offered=False)[: len(text)]
            except BadRow:  # the template requires tools
                without = ""
            check_tools(text, without, chat.tools)

    def _render(
        self, chat: Chat, count: int | None = None, *, opens: bool, with_marks: bool = False, offered: bool = True
    ) -> str:
        """Render the first ``count`` messages (None: all), with the row's tools if ``offered``."""
        if not self.exists:
            raise BadRow(chat.column, "chat messages, but the tokenizer has no chat template")
        variant = self._variant(bool(chat.tools))
        messages = [variant.calls.message(message) for message in chat.messages[:count]]
        template = variant.marked_template if with_marks else variant.template
        return self._apply_template(template, messages, chat.column, chat.tools if offered else None, opens=opens)

    def _apply_template(
        self, template: str, messages: list[Message], column: str, tools: Tools | None, *, opens: bool
    ) -> str:
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=opens,
            )
        except Exception as error:  # a template is a user's program and may raise anything
            raise BadRow(column, "the chat template refuses it", f": {str(error) or type(error).__name__}") from error
        return rendered

    def _build_variant(self, tools: bool) -> Variant:
        """Build the variant for rows with or without tools; probe messages decide the form of its calls."""
        template = template_of(self._tokenizer, tools=tools)
        marked_template = _with_marks(template) if MARKER.search(template) else ""

        def render(messages: list[Message], offered: Tools | None) -> str:
            return self._apply_template(template, messages, "tool_calls", offered, opens=False)

        return Variant(template, marked_template, call_forms(render, tools=tools))


def template_of(tokenizer: Tokenizer, *, tools: bool = False) -> str:
    """Return the tokenizer's chat template with a fixed date; an empty string if it has no template.

    ``tools`` selects the template for conversations with functions, where a model has a separate one.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        template: str = tokenizer.get_chat_template(tools=[] if tools else None)
    except ValueError as error:  # several, and none is the default
        raise DataError(f"the tokenizer's chat template: {error}") from error
    if draw := RANDOM_DRAW.search(template):
        raise DataError(f"the tokenizer's chat template draws at random ({draw[0]!r}), so no run is repeatable")
    return _calendar() + template if "strftime_now" in template else template


def _calendar() -> str:
    """Return a Jinja macro that replaces transformers' ``strftime_now`` and always formats ``TODAY``.

    It must end with a newline. Jinja drops the newline and then reads the template as the start of a line, as before.
    """
    values = {f"%{kind}": TODAY.strftime(f"%{kind}") for kind in "aAwdbBmyYHIMSpfjUWcxXGuVFTD"}
    values |= {f"%-{kind}": str(int(TODAY.strftime(f"%{kind}"))) for kind in "dmyHIMSj"}
    steps = "".join(f" | replace('{kind}', '{value}')" for kind, value in values.items())
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}\n"


def _with_marks(template: str) -> str:
    """Return the template with ``MARK_BEGIN`` and ``MARK_END`` inside its generation markers; trimming is unchanged."""

    def with_mark(marker: re.Match[str]) -> str:
        left, end, right = marker.groups()
        if end:
            return f"{{%{left} print '{MARK_END}' %}}{{% endgeneration {right}%}}"
        return f"{{%{left} generation %}}{{% print '{MARK_BEGIN}' {right}%}}"

    return MARKER.sub(with_mark, template)
