"""The shapes in which people keep their data, each brought to one form.

TRL's names: ``{"text"}``, ``{"messages"}``, ``{"prompt", "completion"}``,
``{"prompt"?, "chosen", "rejected", "margin"?}``, ``{"prompt"}``; ours besides:
``{"prompt"?, "completions": [...], "ranks": [...], "margin"?}``. Prompts and answers are strings or chat messages;
conversations and hh-rlhf transcripts imply their prompt.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow

Message = dict[str, Any]
Content = str | list[Message]

LARGEST = 2**31
"""Ranks and margins stay below it, as they become int32 and float32."""

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Answered(NamedTuple):
    """A prompt, if there is one, and an answer to it. A text or conversation alone is an answer without a prompt."""

    prompt: Content | None
    completion: Content


class Ranking(NamedTuple):
    """Answers to one prompt and their ranks: 0 is best, equal ranks are ties."""

    prompt: Content | None
    completions: list[Content]
    ranks: list[int]
    margin: float


def parse_sft(row: Mapping[str, Any]) -> Answered:
    """A row to learn from; of a preference, the chosen answer."""
    if _has(row, "messages"):
        return Answered(None, _messages(row))
    if _has(row, "completion"):
        return Answered(_prompt(row), _content(row, "completion"))
    if _has(row, "text"):
        return Answered(None, _string(row, "text"))
    if _has(row, "chosen"):
        prompt, chosen, _ = _preference(row)
        return Answered(prompt, chosen)
    raise BadRow("text", f"no such column, nor messages, completion or chosen; the row has {_columns(row)}")


def parse_ranking(row: Mapping[str, Any]) -> Ranking:
    """A preference is a ranking of two. ``BadRow`` where no answer is strictly better than another."""
    margin = _margin(row.get("margin"))
    if _has(row, "chosen") or _has(row, "rejected"):
        prompt, chosen, rejected = _preference(row)
        if chosen == rejected:
            raise BadRow("chosen", "the same as rejected")
        return Ranking(prompt, [chosen, rejected], [0, 1], margin)
    if not _has(row, "completions"):
        raise BadRow("chosen", f"no such column, nor completions; the row has {_columns(row)}")
    completions = row["completions"]
    if not isinstance(completions, list):
        raise BadRow("completions", f"expected a list, found {type(completions).__name__}")
    if len(completions) < 2:
        raise BadRow("completions", "fewer than two, so there is nothing to rank")
    answers = [_checked(answer, f"completions[{i}]") for i, answer in enumerate(completions)]
    ranks = _ranks(row, len(answers))
    if len(set(ranks)) == 1:
        raise BadRow("ranks", "all tied, so there is no pair")
    if any(a == b and r != s for a, r in zip(answers, ranks, strict=True) for b, s in zip(answers, ranks, strict=True)):
        raise BadRow("completions", "two of them are the same and of unequal rank")
    return Ranking(_prompt(row) if _has(row, "prompt") else None, answers, ranks, margin)


def parse_prompt(row: Mapping[str, Any]) -> Content:
    """The prompt that ``parse_sft`` would see; of a conversation, all before its last assistant turn."""
    if _has(row, "messages"):
        messages = _messages(row)
        return messages[: last_assistant(messages)] or _checked([], "messages")
    if _has(row, "chosen") and _has(row, "rejected"):
        prompt, _, _ = _preference(row)
        if prompt is not None:
            return prompt
        raise BadRow("prompt", "no such column, and chosen and rejected do not imply one")
    if _has(row, "prompt"):
        return _prompt(row)
    raise BadRow("prompt", f"no such column, nor messages or chosen and rejected; the row has {_columns(row)}")


def parse_answers(row: Mapping[str, Any]) -> list[Answered]:
    """Every answer in a row, to be scored one by one. A policy may answer with nothing: that has a score too."""
    if _has(row, "completions"):
        prompt = _prompt(row) if _has(row, "prompt") else None
        completions = row["completions"]
        if not isinstance(completions, list) or not completions:
            raise BadRow("completions", "expected a list with at least one answer")
        silent = [prompt is not None and isinstance(answer, str) and not answer.strip() for answer in completions]
        return [
            Answered(prompt, answer if silent[i] else _checked(answer, f"completions[{i}]"))
            for i, answer in enumerate(completions)
        ]
    if _has(row, "chosen") and _has(row, "rejected"):
        prompt, chosen, rejected = _preference(row)
        return [Answered(prompt, chosen), Answered(prompt, rejected)]
    return [parse_sft(row)]


def _preference(row: Mapping[str, Any]) -> tuple[Content | None, Content, Content]:
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _conversations(row, chosen, rejected)
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise BadRow("rejected", "chosen and rejected are not of one kind (string or messages)")
    if _has(row, "prompt"):
        return _prompt(row), chosen, rejected
    return _transcripts(chosen, rejected)


def _conversations(
    row: Mapping[str, Any], chosen: list[Message], rejected: list[Message]
) -> tuple[Content | None, Content, Content]:
    """Both may hold the prompt too, beside a column for it or without one; then it is what they share."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if _has(row, "prompt"):
        prompt = _prompt(row)
        if isinstance(prompt, list) and prompt != chosen[:shared][: len(prompt)]:
            return prompt, chosen, rejected
        if isinstance(prompt, str) and prompt not in [message["content"] for message in chosen[:shared]]:
            raise BadRow("prompt", "a string, but chosen and rejected are messages that do not share it")
    return (chosen[:shared] or None), chosen[shared:], rejected[shared:]


def _transcripts(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    r"""hh-rlhf: both hold the whole dialogue; the prompt is all up to and with the last shared ``\n\nAssistant:``."""
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return None, chosen, rejected
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


def _margin(value: Any) -> float:
    """A number, also as CSV has it; 0 where there is none."""
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        margin = None
    if margin is None or not abs(margin) < LARGEST:
        raise BadRow("margin", "expected a number", f", found {value!r}")
    return margin


def _ranks(row: Mapping[str, Any], count: int) -> list[int]:
    ranks = row.get("ranks")
    if ranks is None:
        raise BadRow("ranks", "no such column; give each completion its rank, 0 for the best")
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadRow("ranks", f"expected {count} ranks, one a completion")
    if any(isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < LARGEST for rank in ranks):
        raise BadRow("ranks", "expected whole numbers, 0 for the best", f", found {ranks}")
    return ranks


def _has(row: Mapping[str, Any], column: str) -> bool:
    # A column that only some rows have comes as None in the others.
    return row.get(column) is not None


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(column for column in row if _has(row, column)) or "no columns"


def _prompt(row: Mapping[str, Any]) -> Content:
    prompt = _content(row, "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow("prompt", "ends with an assistant turn, so there is nothing left to answer")
    return prompt


def _messages(row: Mapping[str, Any]) -> list[Message]:
    messages = _content(row, "messages")
    if isinstance(messages, str):
        raise BadRow("messages", "expected a list of messages, found a string")
    return messages


def last_assistant(messages: list[Message]) -> int:
    """Its index; the number of messages where there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))


def _content(row: Mapping[str, Any], column: str) -> Content:
    if not _has(row, column):
        raise BadRow(column, f"no such column; the row has {_columns(row)}")
    return _checked(row[column], column)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = _content(row, column)
    if not isinstance(value, str):
        raise BadRow(column, "expected a string, found messages")
    return value


def _checked(value: Any, column: str) -> Content:
    if isinstance(value, str):
        return _text(value, column)
    if not isinstance(value, list):
        raise BadRow(column, f"expected a string or a list of messages, found {type(value).__name__}")
    if not value:
        raise BadRow(column, "is empty")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{column}[{i}]", 'expected a message {"role", "content"}')
        if not isinstance(message.get("content"), str):
            raise BadRow(f"{column}[{i}].content", "expected a string")
        # Some data sets give every conversation a system turn that says nothing.
        if message["content"] or message["role"] != "system":
            _text(message["content"], f"{column}[{i}].content")
    return [{key: field for key, field in message.items() if field is not None} for message in value]


def _text(value: str, column: str) -> str:
    if not value.strip():
        raise BadRow(column, "is empty")
    if "\x00" in value:
        raise BadRow(column, "holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(column, "holds half of a surrogate pair, which is no text") from None
    return value
