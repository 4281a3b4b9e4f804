"""Conversations as text: the tokenizer's own chat template, and where the answers stand in what it renders.

A template is a program in Jinja; transformers runs it in a sandbox. Where it has ``{% generation %}`` markers they say
what an answer is; else an answer is what the conversation with it has beyond the conversation that asks for it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from jrlhf.data.calls import CallForms, call_forms
from jrlhf.data.errors import BadRow, DataError
from jrlhf.data.messages import Message, Tools, said
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.rendered import Turn, call_texts, check_said, check_tools
from jrlhf.data.tokenizer import end_of_turn

TODAY = datetime(2024, 7, 26)
"""What templates are told today is (Llama 3's own default): with the real date a resumed run would see other tokens."""

MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
BEGIN, END = "\ufdd0", "\ufdd1"
"""Stand around a marked answer for a moment: Unicode keeps both for internal use, so no text has them."""

RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")

CHANGED = "the chat template changes earlier turns when later ones come, so what is learnt cannot be marked"
LAST_ALONE = "; as prompt and completion the last answer alone is learnt"
UNASKED = "the chat template begins an answer in another way than it asks for one, so it would not follow its prompt"
UNOPENED = "the chat template takes no notice of add_generation_prompt, so the header of the answer would be learnt"
UNMARKED = "the chat template does not put one pair of generation markers around each answer"
UNSTOPPED = "the chat template ends an answer inside the conversation with no stop token, so stopping is not learnt"


class Variant(NamedTuple):
    """One of a tokenizer's templates: the one for rows with tools may be another."""

    template: str
    marked: str
    """With ``BEGIN`` and ``END`` inside its generation markers; empty where it has none."""
    calls: CallForms


class Chat(NamedTuple):
    """A row's conversation, its tools, and the column that is blamed for it."""

    messages: Sequence[Message]
    column: str
    tools: Tools | None


class ChatTemplate:
    """The chat template of a tokenizer, if it has one; ``BadRow`` where it cannot mark exactly what is learnt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.exists = bool(template_of(tokenizer))
        ids = (end_of_turn(tokenizer), tokenizer.eos_token_id)
        self.stops: list[str] = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
        self._variant = cache(self._made)

    def prompt(self, messages: Sequence[Message], column: str, tools: Tools | None = None) -> str:
        """What asks for the assistant's next turn."""
        chat = Chat(messages, column, tools)
        text = self._render(chat, opens=True)
        self._check_tools(text, chat, opens=True)
        check_said(text, messages, [], column, first=len(messages))
        return text

    def whole(self, messages: Sequence[Message], column: str, tools: Tools | None = None) -> str:
        """The conversation to the end of its last message, with all that the template writes behind that."""
        chat = Chat(messages, column, tools)
        text = self._render(chat, opens=False)
        self._check_tools(text, chat, opens=False)
        return text

    def turns(
        self, messages: Sequence[Message], column: str, *, first: int, tools: Tools | None = None
    ) -> tuple[str, list[Turn]]:
        """The conversation up to its last assistant turn, and where those from message ``first`` on stand in it."""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if not numbers:
            raise BadRow(column, "no assistant turn, so nothing to learn from")
        if numbers[0] == 0:
            raise BadRow(column, "begins with an assistant turn, which answers nothing; begin with the user's")
        for i in numbers:
            words = (said(messages[i]), *call_texts(messages[i]))
            if stop := next((stop for stop in self.stops for word in words if stop in word), None):
                raise BadRow(column, "an answer holds a stop token, at which it would end", f": {stop} in message {i}")
        chat = Chat(messages[: numbers[-1] + 1], column, tools)
        text, turns = (self._by_markers if self._variant(bool(tools)).marked else self._by_prefixes)(chat, numbers)
        self._check_tools(text, chat, opens=False)
        check_said(text, chat.messages, turns, column, first=first)
        return text, turns

    def _by_prefixes(self, chat: Chat, numbers: list[int]) -> tuple[str, list[Turn]]:
        done, turns = "", list[Turn]()
        for i in numbers:
            opening = self._render(chat, i, opens=True)
            if not opening.startswith(done):
                raise BadRow(chat.column, CHANGED + LAST_ALONE, f" (message {i})")
            done = self._render(chat, i + 1, opens=False)
            words = said(chat.messages[i]).strip()
            begun = done.find(words, len(opening)) if words else len(done)
            if not done.startswith(opening) or done[len(opening) : begun].strip():
                self._check_asked(chat, i, opening, done)
            turns.append(Turn(len(opening), len(opening), len(done)))
        return done, turns

    def _check_asked(self, chat: Chat, i: int, opening: str, done: str) -> None:
        """``BadRow`` where ``done`` does not begin as ``opening``, or where that asks for nothing."""
        where, history = f" (message {i})", self._render(chat, i, opens=False)
        if not done.startswith(opening):
            raise BadRow(chat.column, UNASKED if done.startswith(history) else CHANGED, where)
        if opening == history:
            raise BadRow(chat.column, UNOPENED, where)

    def _by_markers(self, chat: Chat, numbers: list[int]) -> tuple[str, list[Turn]]:
        """One rendering of the whole; what asks for each answer must be a prefix of it here too."""
        column = chat.column
        text, spans = self._render(chat, opens=False), list[tuple[int, int]]()
        pieces = re.split(f"([{BEGIN}{END}])", self._render(chat, opens=False, marked=True))
        balanced = pieces[1::2] == [BEGIN, END] * (len(pieces) // 4)
        if "".join(pieces[::2]) != text or not balanced:
            raise BadRow(column, UNMARKED)
        at = 0
        for i, piece in enumerate(pieces[::2]):
            if i % 2:
                spans.append((at, at + len(piece)))
            at += len(piece)
        before = sum(message["role"] == "assistant" for message in chat.messages[: numbers[0]])
        if len(spans) != before + len(numbers):
            raise BadRow(column, UNMARKED, f": {len(spans)} pairs for {before + len(numbers)} answers")
        turns, done = list[Turn](), 0
        for i, (start, end) in zip(numbers, spans[before:], strict=True):
            asked = self._render(chat, i, opens=True)
            if not text.startswith(asked) or not done <= len(asked) <= end:
                raise BadRow(column, UNASKED, f" (message {i})")
            # Markers may leave out the stop token, which is learnt all the same.
            done = end + next((len(stop) for stop in self.stops if text.startswith(stop, end)), 0)
            turns.append(Turn(len(asked), max(start, len(asked)), done))
        return text[:done], turns

    def _check_tools(self, text: str, chat: Chat, *, opens: bool) -> None:
        if chat.tools:
            try:
                without = self._render(chat, opens=opens, offered=False)[: len(text)]
            except BadRow:  # it cannot do without them
                without = ""
            check_tools(text, without, chat.tools)

    def _render(
        self, chat: Chat, count: int | None = None, *, opens: bool, marked: bool = False, offered: bool = True
    ) -> str:
        """The first ``count`` messages, or all of them; ``offered``: with the row's tools."""
        if not self.exists:
            raise BadRow(chat.column, "chat messages, but the tokenizer has no chat template")
        variant = self._variant(bool(chat.tools))
        messages = [variant.calls.message(message) for message in chat.messages[:count]]
        template = variant.marked if marked else variant.template
        return self._rendered(template, messages, chat.column, chat.tools if offered else None, opens=opens)

    def _rendered(
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
        except Exception as error:  # whatever the template raises: it is somebody's program
            raise BadRow(column, "the chat template refuses it", f": {str(error) or type(error).__name__}") from error
        return rendered

    def _made(self, tools: bool) -> Variant:
        """The template for rows with tools, or without; the forms of calls are tried with it."""
        template = template_of(self._tokenizer, tools=tools)
        marked = _with_marks(template) if MARKER.search(template) else ""

        def render(messages: list[Message], offered: Tools | None) -> str:
            return self._rendered(template, messages, "tool_calls", offered, opens=False)

        return Variant(template, marked, call_forms(render, tools=tools))


def template_of(tokenizer: Tokenizer, *, tools: bool = False) -> str:
    """The tokenizer's chat template with a calendar that stands still; empty where it has none.

    ``tools``: the one for conversations with functions, which some models have besides.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        template: str = tokenizer.get_chat_template(tools=[] if tools else None)
    except ValueError as error:  # several, and none is the default
        raise DataError(f"the tokenizer's chat template: {error}") from error
    if found := RANDOM.search(template):
        raise DataError(f"the tokenizer's chat template draws at random ({found[0]!r}): no two runs would see the same")
    return _calendar() + template if "strftime_now" in template else template


def _calendar() -> str:
    """A macro in the place of transformers' ``strftime_now``, which knows ``TODAY`` alone.

    The line's end counts: Jinja drops it, and reads what follows as the beginning of a line, as it was before.
    """
    values = {f"%{kind}": TODAY.strftime(f"%{kind}") for kind in "aAwdbBmyYHIMSpfjUWcxXGuVFTD"}
    values |= {f"%-{kind}": str(int(TODAY.strftime(f"%{kind}"))) for kind in "dmyHIMSj"}
    steps = "".join(f" | replace('{kind}', '{value}')" for kind, value in values.items())
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}\n"


def _with_marks(template: str) -> str:
    """The template, writing ``BEGIN`` and ``END`` inside its generation markers; white space is cut as before."""

    def around(found: re.Match[str]) -> str:
        left, end, right = found.groups()
        if end:
            return f"{{%{left} print '{END}' %}}{{% endgeneration {right}%}}"
        return f"{{%{left} generation %}}{{% print '{BEGIN}' {right}%}}"

    return MARKER.sub(around, template)
