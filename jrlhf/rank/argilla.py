"""Argilla's records, in the format of ``dataset.records.to_json`` and ``from_json`` of its Python SDK 2.

The format is that of ``Record.to_dict`` (argilla-io/argilla, argilla/src/argilla/records/_resource.py): ``{"id",
"fields", "metadata", "suggestions", "responses": {QUESTION: [{"value", "user_id"}]}, "vectors"}``, where a ranking
question's value is the list of its options, best first. The data set needs the fields ``prompt``, ``completion_1`` ...
and ``RankingQuestion("ranking", values=["completion_1", ...])``. The metadata holds ties and names of raters, for which
the format has no place.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from jrlhf.rank.places import Ranking, as_text, read_order
from jrlhf.rank.tasks import Task

QUESTION, FIELD = "ranking", "completion_"


def records(tasks: Sequence[Task], pairs: Sequence[tuple[Task, Ranking]]) -> list[dict[str, Any]]:
    """Return one record for each task, ranked or not."""
    rankings: dict[str, list[Ranking]] = {}
    for task, ranking in pairs:
        rankings.setdefault(task.key, []).append(ranking)
    return [_record(task, rankings.get(task.key, [])) for task in tasks]


def _record(task: Task, rankings: Sequence[Ranking]) -> dict[str, Any]:
    fields = {"prompt": as_text(task.prompt)}
    fields |= {f"{FIELD}{i}": as_text(answer) for i, answer in enumerate(task.completions, 1)}
    responses = [
        {"value": [f"{FIELD}{i + 1}" for i in ranking.order()], "user_id": user_id(ranking.rater)}
        for ranking in rankings
    ]
    about = {user_id(ranking.rater): ranking.about() for ranking in rankings}
    return {
        "id": task.id,
        "fields": fields,
        "metadata": {"jrlhf": json.dumps(about)},
        "suggestions": {},
        "responses": {QUESTION: responses} if responses else {},
        "vectors": {},
    }


def user_id(rater: str) -> str:
    """Derive a UUID from a rater's name, because Argilla identifies users by UUIDs."""
    return str(uuid5(NAMESPACE_URL, f"jrlhf:rater:{rater}"))


def parse(record: Mapping[str, Any]) -> Iterator[tuple[str, Ranking]]:
    """Yield the rankings of a record. Its options may also be ``{"value", "rank"}``, the format of Argilla's server and
    first SDK."""
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
