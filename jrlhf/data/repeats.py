"""Removal of prompts that answers repeat, so that no sequence contains its prompt twice."""

from collections.abc import Callable, Sequence
from typing import Any

from jrlhf.data.errors import BadRow
from jrlhf.data.messages import Content, Message, message_text

Note = Callable[[str], None]
"""Function that receives a note on what was changed in a row."""

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

PROMPT_REMOVED = "the prompt, which the answers repeat, was taken off them"
PROMPT_UNCLEAR = (
    "all answers begin with the prompt's words, too few to tell whether they repeat it; they are left as they are"
)

MIN_CLEAR_WORDS, MIN_CLEAR_CHARACTERS = 3, 16


def ignore_note(note: str) -> None:
    """Ignore a note on a row."""


def separate_prompt(
    prompt: Content | None, answers: Sequence[Content], note: Note, *, implied: bool = False
) -> tuple[Content | None, list[Content]]:
    """Return the prompt and the answers without it; with ``implied`` conversations may be the only place of it."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    chats = [answer for answer in answers if isinstance(answer, list)]
    if isinstance(prompt, str) and not chats:
        return prompt, [*without_prompt(prompt, texts, note)]
    if isinstance(prompt, list) and not chats and message_text(prompt[-1]).strip():
        return prompt, [*without_prompt(message_text(prompt[-1]), texts, note)]
    if not texts and (implied or prompt is not None):
        prompt, split = split_turns(prompt, chats, note)
        return prompt, [*split]
    return prompt, list(answers)


def prompt_in_transcripts(
    prompt: Content | None, chosen: Content, rejected: Content, note: Note
) -> tuple[str, str, str] | None:
    """Split hh-rlhf rows, in which both answers contain the whole dialogue, into prompt, chosen and rejected.

    Returns None for other rows, and where the prompt column is not part of the dialogue.
    """
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return None
    if prompt is None:
        return _transcripts(chosen, rejected)
    # A prompt that is a whole dialogue is compared like any other text.
    if not isinstance(prompt, str) or prompt.lstrip().startswith(HUMAN.lstrip()):
        return None
    try:
        parts = _transcripts(chosen, rejected)
    except BadRow:
        return None
    if prompt.strip() not in parts[0]:
        return None
    note(PROMPT_REMOVED)
    return parts


def without_prompt(prompt: str, answers: Sequence[str], note: Note) -> list[str]:
    """Remove the prompt from its answers if all of them begin with it.

    A single answer is no evidence: "Once upon a time" may well follow "Once". Neither are several answers to a prompt
    as short as a greeting, which answers return ("Hi" - "Hi, there!"); they stay unchanged, with a note. Nobody repeats
    by chance a prompt of three words, sixteen characters or two lines, or one that ends with a colon. Empty answers do
    not count.
    """
    nonempty = [answer for answer in answers if answer.strip()]
    if len(nonempty) < 2 or not all(_after_prompt(prompt, answer) is not None for answer in nonempty):
        return list(answers)
    stripped_prompt = prompt.strip()
    clear = (
        len(stripped_prompt.split()) >= MIN_CLEAR_WORDS
        or len(stripped_prompt) >= MIN_CLEAR_CHARACTERS
        or "\n" in stripped_prompt
        or stripped_prompt.endswith(":")
    )
    if not clear:
        note(PROMPT_UNCLEAR)
        return list(answers)
    note(PROMPT_REMOVED)
    return [_after_prompt(prompt, answer) or "" if answer.strip() else answer for answer in answers]


def _transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Split two transcripts after the last ``\n\nAssistant:`` that they share."""
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


def _after_prompt(prompt: str, answer: str) -> str | None:
    """Return the answer after the prompt, or None if it does not begin with it; surrounding white space is ignored."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    stripped_prompt, answer = prompt.strip(), answer.lstrip()
    if not stripped_prompt or not answer.startswith(stripped_prompt):
        return None
    # The space that follows the prompt in the answer belongs to a prompt that ends with a space.
    rest, end = answer[len(stripped_prompt) :], prompt[len(prompt.rstrip()) :]
    return rest.removeprefix(end)


def shared_turns(answers: Sequence[list[Message]]) -> int:
    """Return the number of turns that all answers share at their start.

    At least one turn remains in each answer, and the last shared turn is not the assistant's.
    """
    shared, shortest = 0, min(map(len, answers))
    while shared < shortest - 1 and all(_same(answer[shared], answers[0][shared]) for answer in answers):
        shared += 1
    while shared and answers[0][shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def split_turns(
    prompt: Content | None, answers: Sequence[list[Message]], note: Note
) -> tuple[Content | None, list[list[Message]]]:
    """Move the turns that all answers share to the prompt, which may also stand in a column of its own."""
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
    """Remove the turns that end the prompt and begin all answers; raise ``BadRow`` where they cannot be identified."""
    shortest = min(map(len, answers))
    for count in range(min(len(prompt), shortest - 1), 0, -1):
        if all(_all_same(prompt[-count:], answer[:count]) for answer in answers):
            note(PROMPT_REMOVED)
            return [answer[count:] for answer in answers]
    first = [answer[: _until_assistant(answer)] for answer in answers]
    if any(_same(prompt[-1], message) for turns in first for message in turns):
        raise BadRow("prompt", "the answers repeat its last turn, but after other turns")
    return list(answers)


def _until_assistant(messages: list[Message]) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def _all_same(one: list[Message], other: list[Message]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Message, other: Message) -> bool:
    def words(message: Message) -> list[Any]:
        return [message["role"], message.get("content") or "", message.get("tool_calls")]

    return words(one) == words(other)
