"""Decisions out and in: rankings that a reward model learns from, and the files of two labelling tools."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jrlhf.rank import argilla, label_studio
from jrlhf.rank.places import Placed, decided, is_ranking
from jrlhf.rank.store import Decision, Store
from jrlhf.rank.tasks import Task, TaskError, json_lines, parse_task
from jrlhf.system.lines import json_line, json_text

Format = Literal["ranking", "argilla", "label-studio"]


def exported(tasks: Sequence[Task], decisions: Iterable[Decision], form: Format) -> tuple[str, list[str]]:
    """A file's text, and what is in it and what was left out."""
    by_key = {task.key: task for task in tasks}
    known = [(by_key[decision.task], decision) for decision in decisions if decision.task in by_key]
    placed = [(task, Placed.of(decision)) for task, decision in known if decision.kind == "rank"]
    notes = [f"{len(placed)} rankings of {len({made.rater for _, made in placed})} raters"]
    notes += [f"{count} skipped tasks left out" for count in [len(known) - len(placed)] if count]
    match form:
        case "ranking":
            rows = [ranking_row(task, made) for task, made in placed if len(set(made.ranks)) > 1]
            if tied := len(placed) - len(rows):
                notes.append(f"{tied} of the rankings left out: all answers tied, so there is nothing to learn")
            return "".join(map(json_line, rows)), notes
        case "argilla":
            value = argilla.records(tasks, placed)
        case "label-studio":
            value = label_studio.annotated(tasks, placed)
    return json_text(value, indent=1) + "\n", notes


def ranking_row(task: Task, made: Placed) -> dict[str, Any]:
    """A row of reward data, one a task and rater: people who disagree pull the loss to both sides, as they should.

    What is not the reader's (id, rater, seconds, note) it passes over.
    """
    row: dict[str, Any] = {"id": task.id} | ({} if task.prompt is None else {"prompt": task.prompt})
    row |= {"completions": list(task.completions), "ranks": list(made.ranks)}
    row |= {} if task.tools is None else {"tools": task.tools}
    about = {"margin": made.margin, "rater": made.rater, "seconds": made.seconds, "note": made.note or None}
    return row | {name: value for name, value in about.items() if value is not None}


def take_in(path: Path, form: Format, tasks: Sequence[Task], store: Store) -> list[str]:
    """Add what a file holds and the store does not; says how much that was, and what was of no task here."""
    by_id = {task.id: task for task in tasks}
    found = [(by_id.get(identity), made) for identity, made in _read(path, form, tasks)]
    for task, made in found:
        if task is not None and not is_ranking(made.ranks, len(task.completions)):
            raise TaskError(f"{path}: task {task.id}: the order is not one of its {len(task.completions)} answers")
    before = {(decision.rater, decision.task): decision for decision in store.standing()}
    wanted = {(made.rater, task.key): decided(made, task) for task, made in found if task is not None}
    new = [decision for key, decision in wanted.items() if before.get(key) != decision]
    store.add(*new)
    unknown = sum(task is None for task, _ in found)
    notes = [f"{len(new)} decisions taken in, {len(wanted) - len(new)} were here already"]
    return notes + ([f"{unknown} rankings left out: their task is not in the task file"] if unknown else [])


def _read(path: Path, form: Format, tasks: Sequence[Task]) -> Iterator[tuple[str, Placed]]:
    """Each ranking with its task's id."""
    if form == "ranking":
        ids = {task.key: task.id for task in tasks}
        for number, row in json_lines(path):
            try:
                yield _ranking(row, ids)
            except ValueError as error:
                raise TaskError(f"{path}:{number}: {error}") from None
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path}: expected a JSON array of objects")
    parse = argilla.parse if form == "argilla" else label_studio.parse
    for number, row in enumerate(rows, 1):
        try:
            yield from parse(row)
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise TaskError(f"{path}: record {number}: not as {form} writes it: {error!r}") from error


def _ranking(row: Mapping[str, Any], ids: Mapping[str, str]) -> tuple[str, Placed]:
    """A row of reward data; its task is known by its prompt and answers."""
    task, dropped = parse_task({**row, "gold": None})
    ranks = row.get("ranks")
    if task is None or dropped:
        raise TaskError("completions: expected two or more different answers")
    if not is_ranking(ranks, len(task.completions)):
        raise TaskError(f"ranks: expected {len(task.completions)} whole numbers, 0 for the best")
    assert isinstance(ranks, list)
    about = {name: row.get(name) for name in ("margin", "note", "seconds")}
    return ids.get(task.key, ""), Placed.read(str(row.get("rater") or "imported"), ranks, about)
