"""Ranking tasks: a prompt and two to nine different answers to it, one JSON object a line."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jrlhf.system.errors import UsageError
from jrlhf.system.lines import json_line, numbered_lines

Content = str | list[dict[str, Any]]
"""Text, or chat messages ``{"role", "content"}``."""

FEWEST, MOST = 2, 9
"""Answers of a task: there is one digit key an answer."""


LONGEST_NAME = 64
"""Characters of a rater's name."""


class TaskError(UsageError):
    """A file of tasks or rankings that cannot be used. The message names file, line and column."""


@dataclass(frozen=True)
class Task:
    """What is shown to a rater, and what is not: where the answers are from, and which ranks are known to be right."""

    key: str
    """The hash of prompt and answers, by which decisions are kept: what is changed in the file is asked again."""
    id: str
    prompt: Content | None
    completions: tuple[Content, ...]
    gold: tuple[int, ...] | None = None
    model: str = ""
    tools: list[Any] | None = None
    """The functions that the answers may call, which a ranking takes along into reward data."""

    def shown(self, rater: str) -> list[int]:
        """The answers' numbers in this rater's order: mixed, so that no place is anyone's favourite, and always so."""
        return sorted(range(len(self.completions)), key=lambda i: _digest([rater, self.key, i]))


@dataclass(frozen=True)
class TaskFile:
    """The tasks of a file, and what in it was none."""

    tasks: tuple[Task, ...]
    merged: int = 0
    """Answers that were there before, or blank."""
    left_out: int = 0
    """Prompts with fewer than two different answers."""
    repeated: int = 0
    """Lines with a prompt and answers that were there before."""

    def notes(self) -> list[str]:
        """What was left out, to be said."""
        counts = {
            "answers left out: blank, or the same as another one of their prompt": self.merged,
            "prompts left out: fewer than two different answers": self.left_out,
            "lines left out: the same as one before": self.repeated,
        }
        return [f"{count} {text}" for text, count in counts.items() if count]


def turn_text(message: Mapping[str, Any]) -> str:
    """What a message says, and what it calls as JSON."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join([message["content"], *calls]) if message.get("content") else "\n".join(calls)


def task_key(prompt: Content | None, completions: Sequence[Content]) -> str:
    """Sixteen hexadecimal digits that stand for a prompt and its answers."""
    return _digest([prompt, list(completions)])[:16]


def distinct(completions: Iterable[Content]) -> list[Content]:
    """Each answer once, in the order of first sight; none that is blank, as a reward model learns from no such row."""
    found: list[Content] = []
    for answer in completions:
        if answer not in found and (not isinstance(answer, str) or answer.strip()):
            found.append(answer)
    return found


def task_line(prompt: Content | None, completions: Sequence[Content], **about: Any) -> str:
    """One line of a task file."""
    row = {"id": task_key(prompt, completions), "prompt": prompt, "completions": list(completions), **about}
    return json_line(row)


def read_tasks(path: Path) -> TaskFile:
    """The tasks of a JSONL file; rows of ``candidates.jsonl``, which have no id, are tasks too."""
    tasks: dict[str, Task] = {}
    ids: dict[str, int] = {}
    merged = left_out = repeated = 0
    for number, row in json_lines(path):
        try:
            task, dropped = parse_task(row)
        except TaskError as error:
            raise TaskError(f"{path}:{number}: {error}") from None
        if task is None:
            left_out += 1
            continue
        merged += dropped
        if task.key in tasks:
            repeated += 1
            continue
        if task.id in ids:
            raise TaskError(f"{path}:{number}: id: {task.id!r} is that of line {ids[task.id]} too")
        tasks[task.key], ids[task.id] = task, number
    if not tasks:
        raise TaskError(f"{path}: holds no prompt with two different answers")
    return TaskFile(tuple(tasks.values()), merged, left_out, repeated)


def json_lines(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Each object with its line's number; blank lines are passed over."""
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TaskError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}:{number}: not a JSON object a line: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def parse_task(row: Mapping[str, Any]) -> tuple[Task | None, int]:
    """A task, or None where there is nothing to rank; and how many answers were left out."""
    prompt, given = row.get("prompt"), row.get("completions")
    if prompt is not None:
        _check_content(prompt, "prompt")
    if not isinstance(given, list):
        raise TaskError("completions: expected a list of answers")
    for i, answer in enumerate(given):
        _check_content(answer, f"completions[{i}]")
    completions = distinct(given)
    if len(completions) < FEWEST:
        return None, len(given) - len(completions)
    if len(completions) > MOST:
        raise TaskError(f"completions: {len(completions)} different answers; people are asked to order {MOST} at most")
    key = task_key(prompt, completions)
    identity = row.get("id")
    if identity is not None and not (isinstance(identity, str | int) and str(identity).strip()):
        raise TaskError("id: expected text")
    gold = _gold(row.get("gold"), given, completions)
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise TaskError("tools: expected a list of functions")
    name = key if identity is None else str(identity)
    task = Task(key, name, prompt, tuple(completions), gold, str(row.get("model") or ""), tools)
    return task, len(given) - len(completions)


def _gold(ranks: Any, given: list[Content], completions: list[Content]) -> tuple[int, ...] | None:
    """The known ranks of the answers that are kept."""
    if ranks is None:
        return None
    if not isinstance(ranks, list) or len(ranks) != len(given) or not all(map(is_rank, ranks)):
        raise TaskError(f"gold: expected {len(given)} whole numbers, 0 for the best, one an answer")
    return tuple(ranks[given.index(answer)] for answer in completions)


def is_name(name: str) -> bool:
    """Whether decisions can be kept under this name."""
    return name == name.strip() and 0 < len(name) <= LONGEST_NAME and name.isprintable()


def is_rank(value: Any) -> bool:
    """A whole number, 0 for the best."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _check_content(value: Any, column: str) -> None:
    if isinstance(value, str):
        _check_text(value, column)
        return
    if not isinstance(value, list) or not value:
        raise TaskError(f"{column}: expected text or chat messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TaskError(f'{column}[{i}]: expected a message {{"role", "content"}}')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise TaskError(f'{column}[{i}]: expected a message {{"role", "content"}}')
        _check_text(turn_text(message), f"{column}[{i}].content")


def _check_text(value: str, column: str) -> None:
    if "\x00" in value:
        raise TaskError(f"{column}: holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise TaskError(f"{column}: holds half of a surrogate pair, which is no text") from None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
