"""Label Studio's annotated tasks, in the format of its JSON import and export (labelstud.io/guide/task_format), for
its ``Ranker`` tag (labelstud.io/tags/ranker), whose result is a dict of one list of item ids, best first. The project
needs the labelling interface ``INTERFACE``.

The result's ``meta`` holds ties and names of raters, for which a list has no place. If the interface has buckets, the
answers of a bucket are tied, and the best bucket comes first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jrlhf.rank.places import Ranking, as_text, read_order
from jrlhf.rank.tasks import Task

INTERFACE = """<View>
  <Text name="prompt" value="$prompt"/>
  <List name="answers" value="$items" title="Best first"/>
  <Ranker name="rank" toName="answers"/>
</View>"""
RANK, LIST = "rank", "answers"


def annotated_tasks(tasks: Sequence[Task], pairs: Sequence[tuple[Task, Ranking]]) -> list[dict[str, Any]]:
    """Return a Label Studio task for each task, with an annotation for each rater."""
    annotations: dict[str, list[dict[str, Any]]] = {}
    for task, ranking in pairs:
        annotations.setdefault(task.key, []).append(_annotation(ranking))
    return [
        {
            "data": {
                "task": task.id,
                "prompt": as_text(task.prompt),
                "items": [
                    {"id": str(i), "title": f"Answer {i}", "body": as_text(answer)}
                    for i, answer in enumerate(task.completions, 1)
                ],
            },
            "annotations": annotations.get(task.key, []),
        }
        for task in tasks
    ]


def _annotation(ranking: Ranking) -> dict[str, Any]:
    value = {"ranker": {RANK: [str(i + 1) for i in ranking.order()]}}
    result = {"from_name": RANK, "to_name": LIST, "type": "ranker", "value": value, "meta": ranking.about()}
    return {"result": [result], "was_cancelled": False, "lead_time": ranking.seconds}


def parse(task: Mapping[str, Any]) -> Iterator[tuple[str, Ranking]]:
    """Yield the rankings of a task, except for cancelled annotations."""
    for annotation in task.get("annotations") or []:
        if annotation.get("was_cancelled"):
            continue
        for result in annotation["result"]:
            if result.get("type") == "ranker":
                yield str(task["data"]["task"]), _ranking(result, annotation)


def _ranking(result: Mapping[str, Any], annotation: Mapping[str, Any]) -> Ranking:
    about = {"seconds": annotation.get("lead_time"), **(result.get("meta") or {})}
    by = annotation.get("completed_by")
    name = by.get("email") if isinstance(by, dict) else by
    rater = str(about.get("rater") or f"label-studio {'' if name is None else name}".strip())
    groups = result["value"]["ranker"]
    if isinstance(groups, list):
        groups = {RANK: groups}
    # "_" holds the items outside all buckets.
    buckets = [[int(item) - 1 for item in items] for name, items in groups.items() if name != "_" or len(groups) == 1]
    order = [answer for bucket in buckets for answer in bucket]
    if len(buckets) > 1:
        ranks = {answer: place for place, bucket in enumerate(buckets) for answer in bucket}
        about = {**about, "ranks": [ranks[i] for i in range(len(order))]}
    return read_order(order, rater, about)
