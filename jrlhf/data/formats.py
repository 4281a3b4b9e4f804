"""The shapes in which people keep their data, each brought to one form.

TRL's names: ``{"text"}``, ``{"messages"}``, ``{"prompt", "completion", "label"?}``,
``{"prompt"?, "chosen", "rejected", "margin"?}``, ``{"prompt"}``; ours besides:
``{"prompt"?, "completions": [...], "ranks": [...], "margin"?}``. Prompts and answers are strings or chat messages;
conversations and hh-rlhf transcripts imply their prompt. ShareGPT's ``{"conversations"}`` are read where messages are,
Alpaca's ``{"instruction", "input"?}`` where a prompt is, its ``output`` where a completion is: see
``jrlhf.data.foreign``. ``tools`` beside messages are the functions that they may call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow, LeftOut, absent
from jrlhf.data.foreign import instruction, is_instruction, output_column, sharegpt, turns_of
from jrlhf.data.labels import is_verdict, label_of, margin_of, ranks_of
from jrlhf.data.messages import Content, Message, Tools, checked_content, tools_of
from jrlhf.data.repeats import Note, apart, prompt_in_transcripts, without_turns

SFT_FORMS = "messages, conversations, prompt and completion, instruction and output, or chosen and rejected"
UNPAIRED = "an answer by itself makes no pair; a reward model needs chosen and rejected, or completions and ranks"
BAD_ANSWER = "false, so the answer is not learnt"
COMPARED = ("chosen", "rejected", "completions")
ANSWERS = ("text", "messages", "conversations", "completion", "output", "response")
PROMPTS = ("messages", "conversations", "instruction")
PROMPT_FORMS = "messages, conversations, instruction, or chosen and rejected"


class Answered(NamedTuple):
    """A prompt, if there is one, and an answer to it. A text or conversation alone is an answer without a prompt."""

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


def silent(note: str) -> None:
    """Take no note."""


def parse_sft(row: Mapping[str, Any], *, chat: bool = True, note: Note = silent) -> Answered:
    """A row to learn from; of a preference, the chosen answer.

    ``chat``: whether there is a chat template, which decides how an Alpaca row asks. ``note`` hears what was done to
    the row. ``LeftOut`` where a label says that the answer is a bad one.
    """
    return _answered(row, chat, note, learnt=True)


def parse_ranking(row: Mapping[str, Any], *, chat: bool = True, note: Note = silent) -> Ranking:
    """A preference is a ranking of two. ``BadRow`` where no answer is strictly better than another."""
    margin = margin_of(row.get("margin"))
    if _has(row, "chosen") or _has(row, "rejected"):
        prompt, chosen, rejected = _preference(row, chat, note)
        if chosen == rejected:
            raise BadRow("chosen", "the same as rejected")
        return Ranking(prompt, [chosen, rejected], [0, 1], margin, _tools(row, prompt, chosen))
    if not _has(row, "completions"):
        if _has(row, "label"):
            raise BadRow("label", UNPAIRED)
        raise absent(row, *COMPARED, rest=f", nor completions; the row has {_columns(row)}")
    completions = row["completions"]
    if not isinstance(completions, list):
        raise BadRow("completions", f"expected a list, found {type(completions).__name__}")
    if len(completions) < 2:
        raise BadRow("completions", "fewer than two, so there is nothing to rank")
    answers = [_answer(answer, f"completions[{i}]") for i, answer in enumerate(completions)]
    ranks = ranks_of(row, len(answers))
    if len(set(ranks)) == 1:
        raise BadRow("ranks", "all tied, so there is no pair")
    prompt, answers = apart(_asked(row, chat), answers, note)
    for i, answer in enumerate(answers):
        _check_left(answer, f"completions[{i}]")
    if any(a == b and r != s for a, r in zip(answers, ranks, strict=True) for b, s in zip(answers, ranks, strict=True)):
        raise BadRow("completions", "two of them are the same and of unequal rank")
    return Ranking(prompt, answers, ranks, margin, _tools(row, prompt, answers[0]))


def parse_prompt(row: Mapping[str, Any], *, chat: bool = True) -> Content:
    """The prompt that ``parse_sft`` would see; of a conversation, all before its last assistant turn."""
    if _has(row, "messages"):
        return _before_answer(row, "messages")
    if _has(row, "chosen") and _has(row, "rejected"):
        prompt, _, _ = _preference(row, chat, silent)
        if prompt is not None:
            return prompt
        raise absent(row, "prompt", rest=", and chosen and rejected do not imply one")
    if _has(row, "conversations"):
        return _before_answer(row, "conversations")
    if (prompt := _asked(row, chat)) is not None:
        return prompt
    raise absent(row, "prompt", *PROMPTS, *COMPARED, rest=f", nor {PROMPT_FORMS}; the row has {_columns(row)}")


def parse_tools(row: Mapping[str, Any], prompt: Content) -> Tools | None:
    """The functions that may be called in answer to the prompt of ``parse_prompt``."""
    return _tools(row, prompt)


def parse_answers(row: Mapping[str, Any], *, chat: bool = True, note: Note = silent) -> list[Answered]:
    """Every answer in a row, to be scored one by one. A policy may answer with nothing: that has a score too."""
    if _has(row, "completions"):
        prompt, completions = _asked(row, chat), row["completions"]
        if not isinstance(completions, list) or not completions:
            raise BadRow("completions", "expected a list with at least one answer")
        empty = [prompt is not None and isinstance(answer, str) and not answer.strip() for answer in completions]
        answers = [answer if empty[i] else _answer(answer, f"completions[{i}]") for i, answer in enumerate(completions)]
        prompt, answers = apart(prompt, answers, note)
        return [Answered(prompt, answer, _tools(row, prompt, answer)) for answer in answers]
    if _has(row, "chosen") and _has(row, "rejected"):
        prompt, chosen, rejected = _preference(row, chat, note)
        return [Answered(prompt, answer, _tools(row, prompt, answer)) for answer in (chosen, rejected)]
    return [_answered(row, chat, note, learnt=False)]


def _answered(row: Mapping[str, Any], chat: bool, note: Note, *, learnt: bool) -> Answered:
    """``learnt``: a label is heeded."""
    if _has(row, "messages"):
        return _whole(row, "messages", learnt)
    if _has(row, "completion"):
        if learnt and _has(row, "label") and not label_of(row["label"]):
            raise LeftOut("label", BAD_ANSWER)
        prompt, completion = _prompt(row), _content(row, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            [completion] = without_turns(prompt, [completion], note)
        return Answered(prompt, completion, _tools(row, prompt, completion))
    if _has(row, "conversations"):
        return _chosen(row, chat, note) if _has(row, "chosen") else _whole(row, "conversations", learnt)
    if is_instruction(row) and (column := output_column(row)) is not None:
        _heed_label(row, learnt)
        prompt, completion = instruction(row, chat=chat), checked_content(row[column], column)
        return Answered(prompt, completion, _tools(row, prompt))
    if _has(row, "text"):
        return Answered(None, _string(row, "text"))
    if _has(row, "chosen"):
        return _chosen(row, chat, note)
    raise absent(row, *ANSWERS, *COMPARED, rest=f", nor {SFT_FORMS}; the row has {_columns(row)}")


def _whole(row: Mapping[str, Any], column: str, learnt: bool) -> Answered:
    """The conversation that is the whole row."""
    _heed_label(row, learnt)
    messages = _conversation(row, column)
    return Answered(None, messages, _tools(row, messages))


def _chosen(row: Mapping[str, Any], chat: bool, note: Note) -> Answered:
    prompt, chosen, _ = _preference(row, chat, note)
    return Answered(prompt, chosen, _tools(row, prompt, chosen))


def _heed_label(row: Mapping[str, Any], learnt: bool) -> None:
    """Beside a conversation or an instruction only true and false are labels of that kind: numbers may be classes."""
    if learnt and is_verdict(row.get("label")) and not label_of(row["label"]):
        raise LeftOut("label", BAD_ANSWER)


def _preference(row: Mapping[str, Any], chat: bool, note: Note) -> tuple[Content | None, Content, Content]:
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    if isinstance(chosen, list) is not isinstance(rejected, list):
        raise BadRow("rejected", "chosen and rejected are not of one kind (string or messages)")
    prompt = _asked(row, chat)
    if (parts := prompt_in_transcripts(prompt, chosen, rejected, note)) is not None:
        return parts
    prompt, (chosen, rejected) = apart(prompt, [chosen, rejected], note, implied=True)
    _check_left(chosen, "chosen")
    _check_left(rejected, "rejected")
    return prompt, chosen, rejected


def _check_left(answer: Content, column: str) -> None:
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


def _asked(row: Mapping[str, Any], chat: bool) -> Content | None:
    """The prompt beside answers, if there is one."""
    if _has(row, "conversations"):
        return _open(sharegpt(row, "conversations"), "conversations")
    if _has(row, "prompt"):
        return _prompt(row)
    return instruction(row, chat=chat) if is_instruction(row) else None


def _prompt(row: Mapping[str, Any]) -> Content:
    return _open(_content(row, "prompt"), "prompt")


def _open(prompt: Content, column: str) -> Content:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow(column, "ends with an assistant turn, so there is nothing left to answer")
    return prompt


def _tools(row: Mapping[str, Any], *texts: Content | None) -> Tools | None:
    tools = tools_of(row)
    if tools is not None and not any(isinstance(text, list) for text in texts):
        raise BadRow("tools", "beside a plain text, which no chat template sees; give the prompt as messages")
    return tools


def last_assistant(messages: list[Message]) -> int:
    """Its index; the number of messages where there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))


def _has(row: Mapping[str, Any], column: str) -> bool:
    # A column that only some rows have comes as None in the others.
    return row.get(column) is not None


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(column for column in row if _has(row, column)) or "no columns"


def _content(row: Mapping[str, Any], column: str) -> Content:
    if not _has(row, column):
        raise absent(row, column, rest=f"; the row has {_columns(row)}")
    return _answer(row[column], column)


def _answer(value: Any, column: str) -> Content:
    return checked_content(turns_of(value, column), column)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = _content(row, column)
    if not isinstance(value, str):
        raise BadRow(column, "expected a string, found messages")
    return value
