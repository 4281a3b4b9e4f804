"""Conversations as text: the tokenizer's own chat template, and where the answers stand in what it renders.

A template is a program in Jinja; transformers runs it in a sandbox. Where it has ``{% generation %}`` markers they say
what an answer is; else an answer is what the conversation with it has beyond the conversation that asks for it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow, DataError
from jrlhf.data.formats import Message
from jrlhf.data.tokenizer import Tokenizer, end_of_turn

TODAY = datetime(2024, 7, 26)
"""What templates are told today is (Llama 3's own default): with the real date a resumed run would see other tokens."""

MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
BEGIN, END = "\ufdd0", "\ufdd1"
"""Stand around a marked answer for a moment: Unicode keeps both for internal use, so no text has them."""

RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tool", "function", "ipython")
"""Roles whose content a template may write in a form of its own."""

CHANGED = "the chat template changes earlier turns when later ones come, so what is learnt cannot be marked"
LAST_ALONE = "; as prompt and completion the last answer alone is learnt"
UNASKED = "the chat template begins an answer in another way than it asks for one, so it would not follow its prompt"
UNOPENED = "the chat template takes no notice of add_generation_prompt, so the header of the answer would be learnt"
LOST = "the chat template leaves out or changes what a message says, or moves it"
UNMARKED = "the chat template does not put one pair of generation markers around each answer"
UNSTOPPED = "the chat template ends an answer inside the conversation with no stop token, so stopping is not learnt"


class Turn(NamedTuple):
    """Where an assistant's turn stands in a rendered conversation, in characters."""

    asked: int
    """The end of what asks for it: a sampler is given all before."""
    start: int
    """Of the answer: the same place, or later where the template's markers leave something out."""
    end: int
    """Of the answer; its stop token and what the template puts after that stand before it."""


class ChatTemplate:
    """The chat template of a tokenizer, if it has one; ``BadRow`` where it cannot mark exactly what is learnt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer)
        self._marked = _with_marks(self._template) if MARKER.search(self._template) else ""
        ids = (end_of_turn(tokenizer), tokenizer.eos_token_id)
        self._stops: list[str] = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]

    def prompt(self, messages: Sequence[Message], column: str) -> str:
        """What asks for the assistant's next turn."""
        text = self._render(messages, column, opens=True)
        _check_said(text, messages, [], column, first=len(messages))
        return text

    def whole(self, messages: Sequence[Message], column: str, tools: list | None = None) -> str:
        """The conversation to the end of its last message, with all that the template writes behind that."""
        return self._render(messages, column, opens=False)

    def turns(self, messages: Sequence[Message], column: str, *, first: int) -> tuple[str, list[Turn]]:
        """The conversation up to its last assistant turn, and where those from message ``first`` on stand in it."""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if not numbers:
            raise BadRow(column, "no assistant turn, so nothing to learn from")
        if numbers[0] == 0:
            raise BadRow(column, "begins with an assistant turn, which answers nothing; begin with the user's")
        for i in numbers:
            if stop := next((stop for stop in self._stops if stop in messages[i]["content"]), None):
                raise BadRow(column, "an answer holds a stop token, at which it would end", f": {stop} in message {i}")
        text, turns = (self._by_markers if self._marked else self._by_prefixes)(messages, numbers, column)
        _check_said(text, messages[: numbers[-1] + 1], turns, column, first=first)
        return text, turns

    def _by_prefixes(self, messages: Sequence[Message], numbers: list[int], column: str) -> tuple[str, list[Turn]]:
        done, turns = "", list[Turn]()
        for i in numbers:
            opening = self._render(messages[:i], column, opens=True)
            if not opening.startswith(done):
                raise BadRow(column, CHANGED + LAST_ALONE, f" (message {i})")
            done = self._render(messages[: i + 1], column, opens=False)
            said = done.find(messages[i]["content"].strip(), len(opening))
            if not done.startswith(opening) or done[len(opening) : said].strip():
                self._check_asked(messages[:i], opening, done, column)
            turns.append(Turn(len(opening), len(opening), len(done)))
        return done, turns

    def _check_asked(self, before: Sequence[Message], opening: str, done: str, column: str) -> None:
        """``BadRow`` where ``done`` does not begin as ``opening``, or where that asks for nothing."""
        where, history = f" (message {len(before)})", self._render(before, column, opens=False)
        if not done.startswith(opening):
            raise BadRow(column, UNASKED if done.startswith(history) else CHANGED, where)
        if opening == history:
            raise BadRow(column, UNOPENED, where)

    def _by_markers(self, messages: Sequence[Message], numbers: list[int], column: str) -> tuple[str, list[Turn]]:
        """One rendering of the whole; what asks for each answer must be a prefix of it here too."""
        known = messages[: numbers[-1] + 1]
        text, spans = self._render(known, column, opens=False), list[tuple[int, int]]()
        pieces = re.split(f"([{BEGIN}{END}])", self._render(known, column, opens=False, marked=True))
        balanced = pieces[1::2] == [BEGIN, END] * (len(pieces) // 4)
        if "".join(pieces[::2]) != text or not balanced:
            raise BadRow(column, UNMARKED)
        at = 0
        for i, piece in enumerate(pieces[::2]):
            if i % 2:
                spans.append((at, at + len(piece)))
            at += len(piece)
        before = sum(message["role"] == "assistant" for message in messages[: numbers[0]])
        if len(spans) != before + len(numbers):
            raise BadRow(column, UNMARKED, f": {len(spans)} pairs for {before + len(numbers)} answers")
        turns, done = list[Turn](), 0
        for i, (start, end) in zip(numbers, spans[before:], strict=True):
            asked = self._render(messages[:i], column, opens=True)
            if not text.startswith(asked) or not done <= len(asked) <= end:
                raise BadRow(column, UNASKED, f" (message {i})")
            # Markers may leave out the stop token, which is learnt all the same.
            done = end + next((len(stop) for stop in self._stops if text.startswith(stop, end)), 0)
            turns.append(Turn(len(asked), max(start, len(asked)), done))
        return text[:done], turns

    def _render(self, messages: Sequence[Message], column: str, *, opens: bool, marked: bool = False) -> str:
        if not self._template:
            raise BadRow(column, "chat messages, but the tokenizer has no chat template")
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._marked if marked else self._template,
                tokenize=False,
                add_generation_prompt=opens,
            )
        except Exception as error:  # whatever the template raises: it is somebody's program
            raise BadRow(column, "the chat template refuses it", f": {str(error) or type(error).__name__}") from error
        return rendered


def template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template with a calendar that stands still; empty where it has none."""
    if not tokenizer.chat_template:
        return ""
    try:
        template: str = tokenizer.get_chat_template()
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


def _check_said(text: str, messages: Sequence[Message], turns: list[Turn], column: str, *, first: int) -> None:
    """``BadRow`` unless ``text`` says what the messages say, in their order; white space around each may go.

    Of assistant turns those from message ``first`` on count: of earlier ones a template may keep what it likes (Qwen3
    drops their reasoning), as it does so for a sampler too.
    """
    at, coming = 0, iter(turns)
    turn = next(coming, None)
    for i, message in enumerate(messages):
        learnt = message["role"] == "assistant"
        if message["role"] in TOOLS or (learnt and i < first):
            continue
        end = len(text) if turn is None else turn.end if learnt else turn.asked
        at = max(at, turn.start) if turn is not None and learnt else at
        said = [message[key] for key in REASONING if learnt and isinstance(message.get(key), str)][:1]
        for part in (*said, message["content"]):
            found = text.find(part.strip(), at, end)
            if found < 0:
                raise BadRow(column, LOST, f" (message {i}, {message['role']})")
            at = found + len(part.strip())
        turn = next(coming, None) if learnt else turn
