"""Prompts that stand in the answers too: they are taken off, so that no sequence holds one twice."""

from collections.abc import Callable, Sequence
from typing import Any

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import Content, Message, said

Note = Callable[[str], None]
"""Hears what was done to a row."""

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

TAKEN_OFF = "the prompt, which the answers repeat, was taken off them"
LEFT_ON = "all answers begin with the prompt's words, too few to tell whether they repeat it; they are left as they are"

FEWEST_WORDS, FEWEST_CHARACTERS = 3, 16


def apart(
    prompt: Content | None, answers: Sequence[Content], note: Note, *, implied: bool = False
) -> tuple[Content | None, list[Content]]:
    """A prompt and its answers, of which none has it any more; ``implied``: conversations may hold it alone."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    chats = [answer for answer in answers if isinstance(answer, list)]
    if isinstance(prompt, str) and not chats:
        return prompt, [*without_prompt(prompt, texts, note)]
    if isinstance(prompt, list) and not chats and said(prompt[-1]).strip():
        return prompt, [*without_prompt(said(prompt[-1]), texts, note)]
    if not texts and (implied or prompt is not None):
        prompt, split = split_turns(prompt, chats, note)
        return prompt, [*split]
    return prompt, list(answers)


def prompt_in_transcripts(
    prompt: Content | None, chosen: Content, rejected: Content, note: Note
) -> tuple[str, str, str] | None:
    """hh-rlhf: both answers hold the whole dialogue. None where they do not, or where the prompt is no part of it."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return None
    if prompt is None:
        return _transcripts(chosen, rejected)
    # A whole dialogue that is repeated is told as any other text is.
    if not isinstance(prompt, str) or prompt.lstrip().startswith(HUMAN.lstrip()):
        return None
    try:
        parts = _transcripts(chosen, rejected)
    except BadRow:
        return None
    if prompt.strip() not in parts[0]:
        return None
    note(TAKEN_OFF)
    return parts


def without_prompt(prompt: str, answers: Sequence[str], note: Note) -> list[str]:
    """Answers to one prompt, each without the prompt where all of them begin with all of it.

    One answer alone never tells: "Once upon a time" may well follow "Once". Neither do several where the prompt is as
    short as a greeting, which answers return ("Hi" - "Hi, there!"): they stay, and that is noted. A prompt of three
    words, of sixteen characters, of two lines or with a colon at its end is one that nobody says again by chance.
    An answer of nothing tells nothing.
    """
    telling = [answer for answer in answers if answer.strip()]
    if len(telling) < 2 or not all(_rest(prompt, answer) is not None for answer in telling):
        return list(answers)
    asked = prompt.strip()
    unmistakable = (
        len(asked.split()) >= FEWEST_WORDS or len(asked) >= FEWEST_CHARACTERS or "\n" in asked or asked.endswith(":")
    )
    if not unmistakable:
        note(LEFT_ON)
        return list(answers)
    note(TAKEN_OFF)
    return [_rest(prompt, answer) or "" if answer.strip() else answer for answer in answers]


def _transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""The prompt is all up to and with the last shared ``\n\nAssistant:``."""
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    end = chosen.rfind(ASSISTANT, 0, shared)
    if end < 0:
        raise BadRow("chosen", "the transcripts share no turn of the assistant")
    end += len(ASSISTANT)
    if not (chosen[end:].strip() and rejected[end:].strip()):
        raise BadRow("chosen" if rejected[end:].strip() else "rejected", "the last answer is empty")
    return chosen[:end], chosen[end:], rejected[end:]


def _rest(prompt: str, answer: str) -> str | None:
    """The answer after the prompt; white space around either does not count. None where it does not begin with it."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    asked, answer = prompt.strip(), answer.lstrip()
    if not asked or not answer.startswith(asked):
        return None
    # A prompt that ends with a space has the one that the answer has after it.
    rest, end = answer[len(asked) :], prompt[len(prompt.rstrip()) :]
    return rest.removeprefix(end)


def shared_turns(answers: Sequence[list[Message]]) -> int:
    """How many turns all answers begin with, one left over in each, and the last of them not the assistant's."""
    shared, shortest = 0, min(map(len, answers))
    while shared < shortest - 1 and all(_same(answer[shared], answers[0][shared]) for answer in answers):
        shared += 1
    while shared and answers[0][shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def split_turns(
    prompt: Content | None, answers: Sequence[list[Message]], note: Note
) -> tuple[Content | None, list[list[Message]]]:
    """Answers that are conversations may hold the prompt too, beside a column for it or without one."""
    shared = shared_turns(answers)
    common = answers[0][:shared]
    if isinstance(prompt, str) and prompt not in [message["content"] for message in common]:
        raise BadRow("prompt", "a string, but chosen and rejected are messages that do not share it")
    if isinstance(prompt, list) and not (
        _all_same(prompt, common[: len(prompt)]) or _all_same(prompt, common[-len(prompt) :])
    ):
        return prompt, without_turns(prompt, answers, note)
    return (common or None), [answer[shared:] for answer in answers]


def without_turns(prompt: list[Message], answers: Sequence[list[Message]], note: Note) -> list[list[Message]]:
    """The answers without the turns that end the prompt and begin them all; ``BadRow`` where they cannot be told."""
    shortest = min(map(len, answers))
    for count in range(min(len(prompt), shortest - 1), 0, -1):
        if all(_all_same(prompt[-count:], answer[:count]) for answer in answers):
            note(TAKEN_OFF)
            return [answer[count:] for answer in answers]
    first = [answer[: _until_assistant(answer)] for answer in answers]
    if any(_same(prompt[-1], message) for turns in first for message in turns):
        raise BadRow("prompt", "its last turn stands in the answers too, but other turns before it")
    return list(answers)


def _until_assistant(messages: list[Message]) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def _all_same(one: list[Message], other: list[Message]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Message, other: Message) -> bool:
    def words(message: Message) -> list[Any]:
        return [message["role"], message.get("content") or "", message.get("tool_calls")]

    return words(one) == words(other)
