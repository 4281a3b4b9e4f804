"""Server of the page: it gives tasks, stores decisions, and undoes them."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jrlhf.rank.guard import Guard
from jrlhf.rank.places import is_ranking
from jrlhf.rank.render import render_turns
from jrlhf.rank.store import Decision, Store, next_task
from jrlhf.rank.tasks import MAX_NAME_LENGTH, Task, is_name

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/rank.js": ("rank.js", "text/javascript"),
}
MARGINS = {"slightly": 1 / 3, "clearly": 1.0}
"""Margin in the loss for each word of a rater: Llama 2's small margins (arXiv:2307.09288). No word means no margin."""
MAX_NOTE_LENGTH, MAX_SECONDS = 2000, 24 * 3600.0


def make_app(tasks: Sequence[Task], store: Store, *, token: str, host: str) -> Guard:
    """Build the app behind its guard."""
    by_key = {task.key: task for task in tasks}

    def state(rater: str, task: Task | None = None, before: Decision | None = None) -> JSONResponse:
        decisions = [decision for decision in store.standing(rater) if decision.task in by_key]
        task = task or next_task(tasks, decisions)
        skipped = sum(decision.kind == "skip" for decision in decisions)
        about = {"rater": rater, "done": len(decisions), "skipped": skipped, "total": len(tasks)}
        return JSONResponse(about | {"task": task and _task_view(task, rater, before)})

    async def static(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response(files("jrlhf.rank").joinpath("page", name).read_bytes(), media_type=kind)

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    async def raters(request: Request) -> Response:
        return JSONResponse({"raters": store.raters()})

    async def following(request: Request) -> Response:
        return state(_rater(await _payload(request)))

    async def decide(request: Request) -> Response:
        payload = await _payload(request)
        rater, key = _rater(payload), payload.get("task")
        task = by_key.get(key) if isinstance(key, str) else None
        if task is None:
            raise HTTPException(404, "no such task; load the page again")
        store.add(_decision(payload, rater, task))
        return state(rater)

    async def undo(request: Request) -> Response:
        rater = _rater(await _payload(request))
        before = store.undo(rater, by_key)
        return state(rater, by_key[before.task] if before else None, before)

    routes = [Route(path, static) for path in PAGE]
    routes += [
        Route("/favicon.ico", no_icon),
        Route("/api/raters", raters),
        Route("/api/next", following, methods=["POST"]),
        Route("/api/decide", decide, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token=token, host=host)


def _task_view(task: Task, rater: str, before: Decision | None) -> dict[str, Any]:
    """Return the prompt and the answers in the rater's order, without the model or the known ranks."""
    order = task.order_for(rater)
    ranks = [before.ranks[i] for i in order] if before and before.ranks else None
    return {
        "key": task.key,
        "prompt": render_turns(task.prompt),
        "answers": [render_turns(task.completions[i]) for i in order],
        "ranks": ranks,
        "margin": next((word for word, margin in MARGINS.items() if before and margin == before.margin), None),
        "note": before.note if before else "",
    }


def _decision(payload: Mapping[str, Any], rater: str, task: Task) -> Decision:
    """Read the decision from the page into the order of the task file, with ranks without gaps."""
    note = payload.get("note", "")
    if not isinstance(note, str) or len(note) > MAX_NOTE_LENGTH:
        raise HTTPException(400, f"note: expected text of at most {MAX_NOTE_LENGTH} characters")
    seconds = payload.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise HTTPException(400, "seconds: expected a number")
    seconds = min(max(float(seconds), 0.0), MAX_SECONDS)
    if payload.get("skip") is True:
        return Decision(rater, task.key, "skip", note=note, seconds=seconds)
    page_ranks, margin = payload.get("ranks"), payload.get("margin")
    if not isinstance(page_ranks, list) or not is_ranking(page_ranks, len(task.completions)):
        raise HTTPException(400, "ranks: expected a whole number for each answer, 0 for the best")
    if margin is not None and not (isinstance(margin, str) and margin in MARGINS):
        raise HTTPException(400, f"margin: expected one of {', '.join(MARGINS)}, or nothing")
    dense = sorted(set(page_ranks))
    ranks = {number: dense.index(rank) for number, rank in zip(task.order_for(rater), page_ranks, strict=True)}
    ordered = tuple(ranks[number] for number in range(len(ranks)))
    return Decision(rater, task.key, "rank", ordered, None if margin is None else MARGINS[margin], note, seconds)


def _rater(payload: Mapping[str, Any]) -> str:
    name = payload.get("rater")
    name = name.strip() if isinstance(name, str) else ""
    if not is_name(name):
        raise HTTPException(400, f"rater: expected a name of at most {MAX_NAME_LENGTH} printable characters")
    return name


async def _payload(request: Request) -> Mapping[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected application/json")
    try:
        payload = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None
    if not isinstance(payload, dict):
        raise HTTPException(400, "expected a JSON object")
    return payload
