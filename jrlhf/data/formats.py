"""Parsers that bring the common row formats to one form.

TRL's formats are ``{"text"}``, ``{"messages"}``, ``{"prompt", "completion", "label"?}``,
``{"prompt"?, "chosen", "rejected", "margin"?}`` and ``{"prompt"}``; jrlhf adds
``{"prompt"?, "completions": [...], "ranks": [...], "margin"?}``. Answers with a ``label`` are also read one by one
(``jrlhf.data.unpaired``). Prompts and answers are strings or chat messages.
Conversations and hh-rlhf transcripts imply their prompt. ShareGPT's ``{"conversations"}`` stand for messages, Alpaca's
``{"instruction", "input"?}`` for a prompt and its ``output`` for a completion (``jrlhf.data.foreign``). ``tools`` are
the functions that messages may call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow, ExcludedRow, missing_value
from jrlhf.data.foreign import instruction, is_instruction, output_column, sharegpt, turns_of
from jrlhf.data.labels import UNPAIRED, is_verdict, label_of, margin_of, ranks_of
from jrlhf.data.messages import Content, Message, Tools, checked_content, last_assistant, tools_of
from jrlhf.data.repeats import Note, ignore_note, prompt_in_transcripts, separate_prompt, without_turns

SFT_FORMS = "messages, conversations, prompt and completion, instruction and output, or chosen and rejected"
BAD_ANSWER = "false, so the answer is not learnt"
COMPARED = ("chosen", "rejected", "completions")
ANSWERS = ("text", "messages", "conversations", "completion", "output", "response")
PROMPTS = ("messages", "conversations", "instruction")
PROMPT_FORMS = "messages, conversations, instruction, or chosen and rejected"


class Example(NamedTuple):
    """An answer and its prompt; a lone text or conversation is an answer without a prompt."""

    prompt: Content | None
    completion: Content
    tools: Tools | None = None


class Ranking(NamedTuple):
    """Answers to one prompt and their ranks: 0 is best, equal ranks are ties."""

    prompt: Content | None
    completions: list[Content]
    ranks: list[int]
    margin: float
    tools: Tools | None = None


def parse_sft(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> Example:
    """Parse a row for SFT; of a preference take the chosen answer.

    ``chat`` tells whether there is a chat template, which decides the prompt of an Alpaca row. ``note`` receives what
    was changed in the row. Raises ``ExcludedRow`` if a label says that the answer is bad.
    """
    return _parse_example(row, chat, note, use_label=True)


def parse_ranking(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> Ranking:
    """Parse a row for a reward model; a preference is a ranking of two answers.

    Raises ``BadRow`` if no answer is strictly better than another.
    """
    margin = margin_of(row.get("margin"))
    if _has(row, "chosen") or _has(row, "rejected"):
        prompt, chosen, rejected = _preference(row, chat, note)
        if chosen == rejected:
            raise BadRow("chosen", "is the same as rejected")
        return Ranking(prompt, [chosen, rejected], [0, 1], margin, _tools(row, prompt, chosen))
    if not _has(row, "completions"):
        if _has(row, "label"):
            raise BadRow("label", UNPAIRED)
        raise missing_value(row, *COMPARED, rest=f", nor completions; the row has {_columns(row)}")
    completions = row["completions"]
    if not isinstance(completions, list):
        raise BadRow("completions", f"expected a list, found {type(completions).__name__}")
    if len(completions) < 2:
        raise BadRow("completions", "fewer than two, so there is nothing to rank")
    answers = [_answer(answer, f"completions[{i}]") for i, answer in enumerate(completions)]
    ranks = ranks_of(row, len(answers))
    if len(set(ranks)) == 1:
        raise BadRow("ranks", "all tied, so there is no pair")
    prompt, answers = separate_prompt(_prompt_beside_answers(row, chat), answers, note)
    for i, answer in enumerate(answers):
        _check_not_empty(answer, f"completions[{i}]")
    if any(a == b and r != s for a, r in zip(answers, ranks, strict=True) for b, s in zip(answers, ranks, strict=True)):
        raise BadRow("completions", "two completions are the same but have different ranks")
    return Ranking(prompt, answers, ranks, margin, _tools(row, prompt, answers[0]))


def parse_prompt(row: Mapping[str, Any], *, chat: bool = True) -> Content:
    """Parse the prompt that ``parse_sft`` would return; of a conversation, the turns before its last assistant turn."""
    if _has(row, "messages"):
        return _before_answer(row, "messages")
    if _has(row, "chosen") and _has(row, "rejected"):
        prompt, _, _ = _preference(row, chat, ignore_note)
        if prompt is not None:
            return prompt
        raise missing_value(row, "prompt", rest=", and chosen and rejected do not imply one")
    if _has(row, "conversations"):
        return _before_answer(row, "conversations")
    if (prompt := _prompt_beside_answers(row, chat)) is not None:
        return prompt
    raise missing_value(row, "prompt", *PROMPTS, *COMPARED, rest=f", nor {PROMPT_FORMS}; the row has {_columns(row)}")


def parse_tools(row: Mapping[str, Any], prompt: Content) -> Tools | None:
    """Parse the functions that an answer to the prompt of ``parse_prompt`` may call."""
    return _tools(row, prompt)


def parse_answers(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> list[Example]:
    """Parse every answer in a row, for scoring one by one; an empty answer counts, since a policy may sample one."""
    if _has(row, "completions"):
        prompt, completions = _prompt_beside_answers(row, chat), row["completions"]
        if not isinstance(completions, list) or not completions:
            raise BadRow("completions", "expected a list with at least one answer")
        empty = [prompt is not None and isinstance(answer, str) and not answer.strip() for answer in completions]
        answers = [answer if empty[i] else _answer(answer, f"completions[{i}]") for i, answer in enumerate(completions)]
        prompt, answers = separate_prompt(prompt, answers, note)
        return [Example(prompt, answer, _tools(row, prompt, answer)) for answer in answers]
    if _has(row, "chosen") and _has(row, "rejected"):
        return parse_pair(row, chat=chat, note=note)
    return [parse_answer(row, chat=chat, note=note)]


def parse_pair(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> list[Example]:
    """Parse the chosen and the rejected answer of a preference."""
    prompt, *answers = _preference(row, chat, note)
    return [Example(prompt, answer, _tools(row, prompt, answer)) for answer in answers]


def parse_answer(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> Example:
    """Parse the answer of a row that has one, whatever its label."""
    return _parse_example(row, chat, note, use_label=False)


def _parse_example(row: Mapping[str, Any], chat: bool, note: Note, *, use_label: bool) -> Example:
    """Parse the row's answer; with ``use_label`` a false label excludes the row."""
    if _has(row, "messages"):
        return _conversation_row(row, "messages", use_label)
    if _has(row, "completion"):
        if use_label and _has(row, "label") and not label_of(row["label"]):
            raise ExcludedRow("label", BAD_ANSWER)
        prompt, completion = _prompt(row), _content(row, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            [completion] = without_turns(prompt, [completion], note)
        return Example(prompt, completion, _tools(row, prompt, completion))
    if _has(row, "conversations"):
        if _has(row, "chosen"):
            return _chosen_answer(row, chat, note)
        return _conversation_row(row, "conversations", use_label)
    if is_instruction(row) and (column := output_column(row)) is not None:
        _check_label(row, use_label)
        prompt, completion = instruction(row, chat=chat), checked_content(row[column], column)
        return Example(prompt, completion, _tools(row, prompt))
    if _has(row, "text"):
        return Example(None, _string(row, "text"))
    if _has(row, "chosen"):
        return _chosen_answer(row, chat, note)
    raise missing_value(row, *ANSWERS, *COMPARED, rest=f", nor {SFT_FORMS}; the row has {_columns(row)}")


def _conversation_row(row: Mapping[str, Any], column: str, use_label: bool) -> Example:
    """Parse a row that is one conversation."""
    _check_label(row, use_label)
    messages = _conversation(row, column)
    return Example(None, messages, _tools(row, messages))


def _chosen_answer(row: Mapping[str, Any], chat: bool, note: Note) -> Example:
    prompt, chosen, _ = _preference(row, chat, note)
    return Example(prompt, chosen, _tools(row, prompt, chosen))


def _check_label(row: Mapping[str, Any], use_label: bool) -> None:
    """Raise ``ExcludedRow`` if the label is the word false; a number may be a class and is ignored."""
    if use_label and is_verdict(row.get("label")) and not label_of(row["label"]):
        raise ExcludedRow("label", BAD_ANSWER)


def _preference(row: Mapping[str, Any], chat: bool, note: Note) -> tuple[Content | None, Content, Content]:
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    if isinstance(chosen, list) is not isinstance(rejected, list):
        raise BadRow("rejected", "chosen and rejected must both be strings or both be messages")
    prompt = _prompt_beside_answers(row, chat)
    if (parts := prompt_in_transcripts(prompt, chosen, rejected, note)) is not None:
        return parts
    prompt, (chosen, rejected) = separate_prompt(prompt, [chosen, rejected], note, implied=True)
    _check_not_empty(chosen, "chosen")
    _check_not_empty(rejected, "rejected")
    return prompt, chosen, rejected


def _check_not_empty(answer: Content, column: str) -> None:
    if isinstance(answer, str) and not answer.strip():
        raise BadRow(column, "repeats the prompt and says nothing else")


def _conversation(row: Mapping[str, Any], column: str) -> list[Message]:
    if column == "conversations":
        return sharegpt(row, column)
    messages = checked_content(row[column], column)
    if isinstance(messages, str):
        raise BadRow(column, "expected a list of messages, found a string")
    return messages


def _before_answer(row: Mapping[str, Any], column: str) -> Content:
    messages = _conversation(row, column)
    return messages[: last_assistant(messages)] or checked_content([], column)


def _prompt_beside_answers(row: Mapping[str, Any], chat: bool) -> Content | None:
    """Return the prompt that stands in a column of its own beside the answers, or None."""
    if _has(row, "conversations"):
        return _open_prompt(sharegpt(row, "conversations"), "conversations")
    if _has(row, "prompt"):
        return _prompt(row)
    return instruction(row, chat=chat) if is_instruction(row) else None


def _prompt(row: Mapping[str, Any]) -> Content:
    return _open_prompt(_content(row, "prompt"), "prompt")


def _open_prompt(prompt: Content, column: str) -> Content:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow(column, "ends with an assistant turn, so there is nothing left to answer")
    return prompt


def _tools(row: Mapping[str, Any], *texts: Content | None) -> Tools | None:
    tools = tools_of(row)
    if tools is not None and not any(isinstance(text, list) for text in texts):
        raise BadRow("tools", "need a chat template, but the row is plain text; give the prompt as messages")
    return tools


def _has(row: Mapping[str, Any], column: str) -> bool:
    # A column that only some rows have is None in the others.
    return row.get(column) is not None


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(column for column in row if _has(row, column)) or "no columns"


def _content(row: Mapping[str, Any], column: str) -> Content:
    if not _has(row, column):
        raise missing_value(row, column, rest=f"; the row has {_columns(row)}")
    return _answer(row[column], column)


def _answer(value: Any, column: str) -> Content:
    return checked_content(turns_of(value, column), column)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = _content(row, column)
    if not isinstance(value, str):
        raise BadRow(column, "expected a string, found messages")
    return value
