"""Argilla's records, as ``dataset.records.to_json`` and ``from_json`` of its Python SDK 2 have them.

The form is that of ``Record.to_dict`` (argilla-io/argilla, argilla/src/argilla/records/_resource.py): ``{"id",
"fields", "metadata", "suggestions", "responses": {QUESTION: [{"value", "user_id"}]}, "vectors"}``, where a ranking
question's value is the list of its options, best first. It wants a data set with fields ``prompt``, ``completion_1``
... and ``RankingQuestion("ranking", values=["completion_1", ...])``. Ties and names, for which it has no place, stand
in the metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from jrlhf.rank.places import Placed, as_text, read_order
from jrlhf.rank.tasks import Task

QUESTION, FIELD = "ranking", "completion_"


def records(tasks: Sequence[Task], placed: Sequence[tuple[Task, Placed]]) -> list[dict[str, Any]]:
    """One record a task, whether or not it was ranked."""
    rankings: dict[str, list[Placed]] = {}
    for task, made in placed:
        rankings.setdefault(task.key, []).append(made)
    return [_record(task, rankings.get(task.key, [])) for task in tasks]


def _record(task: Task, rankings: Sequence[Placed]) -> dict[str, Any]:
    fields = {"prompt": as_text(task.prompt)}
    fields |= {f"{FIELD}{i}": as_text(answer) for i, answer in enumerate(task.completions, 1)}
    responses = [
        {"value": [f"{FIELD}{i + 1}" for i in made.order()], "user_id": user_id(made.rater)} for made in rankings
    ]
    about = {user_id(made.rater): made.about() for made in rankings}
    return {
        "id": task.id,
        "fields": fields,
        "metadata": {"jrlhf": json.dumps(about)},
        "suggestions": {},
        "responses": {QUESTION: responses} if responses else {},
        "vectors": {},
    }


def user_id(rater: str) -> str:
    """Argilla knows users by UUIDs: one that follows from the name."""
    return str(uuid5(NAMESPACE_URL, f"jrlhf:rater:{rater}"))


def parse(record: Mapping[str, Any]) -> Iterator[tuple[str, Placed]]:
    """Its rankings, also where an option is ``{"value", "rank"}``, as Argilla's server and its first SDK have it."""
    known = json.loads((record.get("metadata") or {}).get("jrlhf") or "{}")
    for response in (record.get("responses") or {}).get(QUESTION) or []:
        if response.get("status") not in (None, "submitted"):
            continue
        about = known.get(str(response["user_id"])) or {}
        options = response["value"]
        if options and isinstance(options[0], dict):
            names = [option["value"] for option in options]
            if all(isinstance(option.get("rank"), int) for option in options):
                by_answer = {_answer(option["value"]): option["rank"] for option in options}
                about = {**about, "ranks": [by_answer[i] for i in range(len(options))]}
                names.sort(key=lambda name: by_answer[_answer(name)])
        else:
            names = options
        rater = str(about.get("rater") or f"argilla {response['user_id']}")
        yield str(record["id"]), read_order([_answer(name) for name in names], rater, about)


def _answer(name: str) -> int:
    return int(name.removeprefix(FIELD)) - 1
