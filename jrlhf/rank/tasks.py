"""Ranking tasks: a prompt with two to nine different answers, one JSON object per line."""

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

MIN_ANSWERS, MAX_ANSWERS = 2, 9
"""Minimum and maximum number of answers in a task: each answer has one digit key."""


MAX_NAME_LENGTH = 64
"""Maximum number of characters in a rater's name."""


class TaskError(UsageError):
    """A file of tasks or rankings is invalid. The message names file, line and column."""


@dataclass(frozen=True)
class Task:
    """Task for a rater. The page hides the model behind the answers and the known ranks."""

    key: str
    """Hash of the prompt and the answers, which identifies decisions: a changed task is a new one."""
    id: str
    prompt: Content | None
    completions: tuple[Content, ...]
    gold: tuple[int, ...] | None = None
    model: str = ""
    tools: list[Any] | None = None
    """Functions that the answers may call, which a ranking passes on to reward data."""

    def order_for(self, rater: str) -> list[int]:
        """Return the answers' numbers in a fixed random order for this rater, so that no position is favoured."""
        return sorted(range(len(self.completions)), key=lambda i: _digest([rater, self.key, i]))


@dataclass(frozen=True)
class TaskFile:
    """Tasks of a file, and counts of what was left out."""

    tasks: tuple[Task, ...]
    merged: int = 0
    """Number of answers that were blank or repeated."""
    left_out: int = 0
    """Number of prompts with fewer than two different answers."""
    repeated: int = 0
    """Number of lines that repeat a prompt and its answers."""

    def notes(self) -> list[str]:
        """Return notes on what was left out."""
        counts = {
            "answers left out: blank, or the same as another answer to their prompt": self.merged,
            "prompts left out: fewer than two different answers": self.left_out,
            "lines left out: the same as an earlier line": self.repeated,
        }
        return [f"{count} {text}" for text, count in counts.items() if count]


def turn_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, and its calls as JSON."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join([message["content"], *calls]) if message.get("content") else "\n".join(calls)


def task_key(prompt: Content | None, completions: Sequence[Content]) -> str:
    """Return sixteen hexadecimal digits that identify a prompt and its answers."""
    return _digest([prompt, list(completions)])[:16]


def distinct(completions: Iterable[Content]) -> list[Content]:
    """Return each answer once, in order, without blank ones, which no reward model learns from."""
    answers: list[Content] = []
    for answer in completions:
        if answer not in answers and (not isinstance(answer, str) or answer.strip()):
            answers.append(answer)
    return answers


def task_line(prompt: Content | None, completions: Sequence[Content], **about: Any) -> str:
    """Return one line of a task file."""
    row = {"id": task_key(prompt, completions), "prompt": prompt, "completions": list(completions), **about}
    return json_line(row)


def read_tasks(path: Path) -> TaskFile:
    """Read the tasks of a JSONL file. Rows of ``candidates.jsonl``, which have no id, are tasks too."""
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
            raise TaskError(f"{path}:{number}: id: {task.id!r}: line {ids[task.id]} has the same id")
        tasks[task.key], ids[task.id] = task, number
    if not tasks:
        raise TaskError(f"{path}: no prompt has two different answers")
    return TaskFile(tuple(tasks.values()), merged, left_out, repeated)


def json_lines(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Yield each object with the number of its line, without blank lines."""
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TaskError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def parse_task(row: Mapping[str, Any]) -> tuple[Task | None, int]:
    """Return a task, or None without two answers to rank, and the number of answers left out."""
    prompt, answers = row.get("prompt"), row.get("completions")
    if prompt is not None:
        _check_content(prompt, "prompt")
    if not isinstance(answers, list):
        raise TaskError("completions: expected a list of answers")
    for i, answer in enumerate(answers):
        _check_content(answer, f"completions[{i}]")
    completions = distinct(answers)
    if len(completions) < MIN_ANSWERS:
        return None, len(answers) - len(completions)
    if len(completions) > MAX_ANSWERS:
        raise TaskError(f"completions: {len(completions)} different answers; people rank at most {MAX_ANSWERS}")
    key = task_key(prompt, completions)
    identity = row.get("id")
    if identity is not None and not (isinstance(identity, str | int) and str(identity).strip()):
        raise TaskError("id: expected text")
    gold = _gold(row.get("gold"), answers, completions)
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise TaskError("tools: expected a list of functions")
    name = key if identity is None else str(identity)
    task = Task(key, name, prompt, tuple(completions), gold, str(row.get("model") or ""), tools)
    return task, len(answers) - len(completions)


def _gold(ranks: Any, answers: list[Content], completions: list[Content]) -> tuple[int, ...] | None:
    """Return the known ranks of the different answers."""
    if ranks is None:
        return None
    if not isinstance(ranks, list) or len(ranks) != len(answers) or not all(map(is_rank, ranks)):
        raise TaskError(f"gold: expected {len(answers)} whole numbers, one for each answer, 0 for the best")
    return tuple(ranks[answers.index(answer)] for answer in completions)


def is_name(name: str) -> bool:
    """Whether a text can be the name of a rater."""
    return name == name.strip() and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def is_rank(value: Any) -> bool:
    """Whether a value is a rank: a whole number, 0 for the best."""
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
        raise TaskError(f"{column}: contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise TaskError(f"{column}: contains half of a surrogate pair, which is not text") from None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
