"""Label Studio's annotated tasks, as its JSON import and export have them (labelstud.io/guide/task_format), for its
``Ranker`` tag (labelstud.io/tags/ranker), whose result is a dict of one list of item ids, best first. The project's
labelling interface is ``INTERFACE``.

Ties and names, for which a list has no place, stand in the result's ``meta``. Where the interface has buckets, the
answers of one bucket are tied, and the buckets come best first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jrlhf.rank.places import Placed, as_text, read_order
from jrlhf.rank.tasks import Task

INTERFACE = """<View>
  <Text name="prompt" value="$prompt"/>
  <List name="answers" value="$items" title="Best first"/>
  <Ranker name="rank" toName="answers"/>
</View>"""
RANK, LIST = "rank", "answers"


def annotated(tasks: Sequence[Task], placed: Sequence[tuple[Task, Placed]]) -> list[dict[str, Any]]:
    """One of its tasks a task, with an annotation a rater."""
    annotations: dict[str, list[dict[str, Any]]] = {}
    for task, made in placed:
        annotations.setdefault(task.key, []).append(_annotation(made))
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


def _annotation(made: Placed) -> dict[str, Any]:
    value = {"ranker": {RANK: [str(i + 1) for i in made.order()]}}
    result = {"from_name": RANK, "to_name": LIST, "type": "ranker", "value": value, "meta": made.about()}
    return {"result": [result], "was_cancelled": False, "lead_time": made.seconds}


def parse(task: Mapping[str, Any]) -> Iterator[tuple[str, Placed]]:
    """Its rankings; what an annotator cancelled is none."""
    for annotation in task.get("annotations") or []:
        if annotation.get("was_cancelled"):
            continue
        for result in annotation["result"]:
            if result.get("type") == "ranker":
                yield str(task["data"]["task"]), _placed(result, annotation)


def _placed(result: Mapping[str, Any], annotation: Mapping[str, Any]) -> Placed:
    about = {"seconds": annotation.get("lead_time"), **(result.get("meta") or {})}
    by = annotation.get("completed_by")
    name = by.get("email") if isinstance(by, dict) else by
    rater = str(about.get("rater") or f"label-studio {'' if name is None else name}".strip())
    groups = result["value"]["ranker"]
    if isinstance(groups, list):
        groups = {RANK: groups}
    # "_" holds what was put into no bucket.
    buckets = [[int(item) - 1 for item in items] for name, items in groups.items() if name != "_" or len(groups) == 1]
    order = [answer for bucket in buckets for answer in bucket]
    if len(buckets) > 1:
        ranks = {answer: place for place, bucket in enumerate(buckets) for answer in bucket}
        about = {**about, "ranks": [ranks[i] for i in range(len(order))]}
    return read_order(order, rater, about)
