"""Exports and imports decisions: as rankings for a reward model, and as files of two labelling tools."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jrlhf.rank import argilla, label_studio
from jrlhf.rank.places import Ranking, as_decision, is_ranking
from jrlhf.rank.store import Decision, Store
from jrlhf.rank.tasks import Task, TaskError, json_lines, parse_task
from jrlhf.system.errors import reason_of
from jrlhf.system.lines import json_line, json_text

Format = Literal["ranking", "argilla", "label-studio"]


def export_text(tasks: Sequence[Task], decisions: Iterable[Decision], form: Format) -> tuple[str, list[str]]:
    """Return the text of a file, and notes on its content and omissions."""
    by_key = {task.key: task for task in tasks}
    known = [(by_key[decision.task], decision) for decision in decisions if decision.task in by_key]
    pairs = [(task, Ranking.of(decision)) for task, decision in known if decision.kind == "rank"]
    notes = [f"{len(pairs)} rankings of {len({ranking.rater for _, ranking in pairs})} raters"]
    notes += [f"{count} skipped tasks left out" for count in [len(known) - len(pairs)] if count]
    match form:
        case "ranking":
            rows = [ranking_row(task, ranking) for task, ranking in pairs if len(set(ranking.ranks)) > 1]
            if tied := len(pairs) - len(rows):
                notes.append(f"{tied} of the rankings left out: all answers are tied, so there is nothing to learn")
            return "".join(map(json_line, rows)), notes
        case "argilla":
            value = argilla.records(tasks, pairs)
        case "label-studio":
            value = label_studio.annotated_tasks(tasks, pairs)
    return json_text(value, indent=1) + "\n", notes


def ranking_row(task: Task, ranking: Ranking) -> dict[str, Any]:
    """Return a row of reward data for one task and rater. Raters who disagree pull the loss to both sides.

    The reader of reward data ignores id, rater, seconds and note.
    """
    row: dict[str, Any] = {"id": task.id} | ({} if task.prompt is None else {"prompt": task.prompt})
    row |= {"completions": list(task.completions), "ranks": list(ranking.ranks)}
    row |= {} if task.tools is None else {"tools": task.tools}
    about = {"margin": ranking.margin, "rater": ranking.rater, "seconds": ranking.seconds, "note": ranking.note or None}
    return row | {name: value for name, value in about.items() if value is not None}


def import_rankings(path: Path, form: Format, tasks: Sequence[Task], store: Store) -> list[str]:
    """Add the rankings of a file that the store does not have, and return notes on what was new, known or without a
    task."""
    by_id = {task.id: task for task in tasks}
    rankings = [(by_id.get(identity), ranking) for identity, ranking in _read(path, form, tasks)]
    for task, ranking in rankings:
        if task is not None and not is_ranking(ranking.ranks, len(task.completions)):
            raise TaskError(f"{path}: task {task.id}: the order does not fit its {len(task.completions)} answers")
    before = {(decision.rater, decision.task): decision for decision in store.standing()}
    imports = {(r.rater, task.key): as_decision(r, task) for task, r in rankings if task is not None}
    new = [decision for key, decision in imports.items() if before.get(key) != decision]
    store.add(*new)
    unknown = sum(task is None for task, _ in rankings)
    notes = [f"{len(new)} decisions imported, {len(imports) - len(new)} were known already"]
    return notes + ([f"{unknown} rankings left out: the task file does not have their task"] if unknown else [])


def _read(path: Path, form: Format, tasks: Sequence[Task]) -> Iterator[tuple[str, Ranking]]:
    """Yield each ranking with the id of its task."""
    if form == "ranking":
        ids = {task.key: task.id for task in tasks}
        for number, row in json_lines(path):
            try:
                yield _parse_row(row, ids)
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
            raise TaskError(f"{path}: record {number}: not in the format of {form}: {reason_of(error)}") from error


def _parse_row(row: Mapping[str, Any], ids: Mapping[str, str]) -> tuple[str, Ranking]:
    """Read a row of reward data. Its prompt and answers identify the task."""
    task, dropped = parse_task({**row, "gold": None})
    ranks = row.get("ranks")
    if task is None or dropped:
        raise TaskError("completions: expected two or more different answers")
    if not is_ranking(ranks, len(task.completions)):
        raise TaskError(f"ranks: expected {len(task.completions)} whole numbers, 0 for the best")
    assert isinstance(ranks, list)
    about = {name: row.get(name) for name in ("margin", "note", "seconds")}
    return ids.get(task.key, ""), Ranking.read(str(row.get("rater") or "imported"), ranks, about)
