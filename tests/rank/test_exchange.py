"""Decisions out and back in: as reward data that the loader reads, as Argilla's and as Label Studio's files."""

import json

import numpy as np
import pytest

from jrlhf import assets
from jrlhf.cli import main
from jrlhf.config import DataConfig
from jrlhf.data import load_rankings, load_tokenizer
from jrlhf.data.formats import Ranking, parse_ranking
from jrlhf.rank import TaskError, read_tasks
from jrlhf.rank.argilla import user_id
from jrlhf.rank.exchange import export_text, import_rankings
from jrlhf.rank.label_studio import INTERFACE
from jrlhf.rank.places import read_order
from jrlhf.rank.render import render_turns
from jrlhf.rank.store import Decision, Store
from jrlhf.rank.tasks import task_line

CHAT = [{"role": "user", "content": "Write a line."}]


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"id": "one", "prompt": "Once upon a time", "completions": [" there was a dog.", " a cat", " the end."]},
        {"prompt": None, "completions": ["A text alone.", "Another text"]},
        {"id": 7, "prompt": "Lily", "completions": [" ran.", " sat.", " hid.", " fell."], "model": "runs/a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tasks(path).tasks


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "tasks.sqlite")
    yield store
    store.close()


def decide(store, tasks):
    """Two raters, ties, a margin, a note, a skip, a ranking of nothing but ties, one taken back, one of no task."""
    one, two, three = (task.key for task in tasks)
    store.add(
        Decision("ann", one, "rank", (1, 0, 1), 1.0, "näh \u2028", 4.5),
        Decision("bob", one, "rank", (2, 0, 1)),
        Decision("ann", two, "rank", (0, 0), seconds=1.0),
        Decision("bob", two, "rank", (1, 0)),
        Decision("ann", three, "skip", seconds=3.0),
        Decision("bob", three, "rank", (0, 1, 2, 3)),
        Decision("bob", three, "undo"),
        Decision("Eve O'K <é>", three, "rank", (1, 0, 0, 1), 1 / 3),
        Decision("ann", "0" * 16, "rank", (0, 1)),
    )


def test_the_export_is_reward_data(tasks, store, tmp_path):
    decide(store, tasks)
    assert main(["rank", "--tasks", str(tmp_path / "tasks.jsonl"), "--export", str(tmp_path / "out" / "r.jsonl")]) == 0
    out = tmp_path / "out" / "r.jsonl"
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert [(row["id"], row["rater"], row["ranks"]) for row in rows] == [
        ("one", "ann", [1, 0, 1]),
        ("one", "bob", [2, 0, 1]),
        (tasks[1].id, "bob", [1, 0]),
        ("7", "Eve O'K <é>", [1, 0, 0, 1]),
    ]
    assert [row.get("margin") for row in rows] == [1.0, None, None, 1 / 3]
    assert "model" not in rows[-1]
    assert "prompt" not in rows[2]
    data = DataConfig(train=str(out), max_length=64)
    loaded = load_rankings(data, str(out), load_tokenizer(assets.resolve("asset:stories260k")))
    assert [loaded.ranks[i].tolist() for i in range(4)] == [[1, 0, 1], [2, 0, 1], [1, 0], [1, 0, 0, 1]]
    np.testing.assert_allclose(loaded.margin, [1, 0, 0, 1 / 3], rtol=1e-6)
    assert loaded.skipped == {}


def test_tools_and_calls_go_along_into_reward_data(tmp_path, store):
    """What ``jrlhf sample`` has written of a prompt with tools is ranked and comes out as a row that has them."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    tools = [{"name": "weather", "parameters": {}}]
    path = tmp_path / "tools.jsonl"
    path.write_text(task_line(turns, ["Yes.", "No."], tools=tools))
    [task] = read_tasks(path).tasks
    store.add(Decision("ann", task.key, "rank", (1, 0)))
    rows, _ = export_text([task], store.standing(), "ranking")
    [row] = map(json.loads, rows.splitlines())
    assert parse_ranking(row) == Ranking(turns, ["Yes.", "No."], [1, 0], 0.0, tools)
    assert render_turns(turns)[1]["text"] == json.dumps(call)
    records, _ = export_text([task], store.standing(), "argilla")
    assert "assistant: {" in json.loads(records)[0]["fields"]["prompt"]


def test_what_is_left_out_is_said(tasks, store, tmp_path, capsys):
    decide(store, tasks)
    assert main(["rank", "--tasks", str(tmp_path / "tasks.jsonl"), "--export", "-"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 4
    assert err.splitlines() == [
        "jrlhf: 5 rankings of 3 raters",
        "jrlhf: 1 skipped tasks left out",
        "jrlhf: 1 of the rankings left out: all answers are tied, so there is nothing to learn",
    ]


@pytest.mark.parametrize("form", ["ranking", "argilla", "label-studio"])
def test_every_form_comes_back_as_it_was(form, tasks, store, tmp_path, capsys):
    decide(store, tasks)
    path, out = str(tmp_path / "tasks.jsonl"), tmp_path / f"out.{form}"
    assert main(["rank", "--tasks", path, "--export", str(out), "--format", form]) == 0
    capsys.readouterr()
    argv = [
        "rank",
        "--tasks",
        path,
        "--state",
        str(tmp_path / "new.sqlite"),
        "--import_from",
        str(out),
        "--format",
        form,
    ]
    keys = {task.key for task in tasks}
    expected = [d for d in store.standing() if d.kind == "rank" and d.task in keys]
    if form == "ranking":
        expected = [d for d in expected if len(set(d.ranks)) > 1]
    for said in (f"{len(expected)} decisions imported, 0 were", f"0 decisions imported, {len(expected)} were"):
        assert main(argv) == 0
        assert capsys.readouterr().out == said + " known already\n"
    new = Store(tmp_path / "new.sqlite")
    assert sorted(new.standing(), key=repr) == sorted(expected, key=repr)
    new.close()


def test_argilla_s_form_is_its_sdk_s(tasks, store):
    decide(store, tasks)
    records = json.loads(export_text(tasks, store.standing(), "argilla")[0])
    assert [list(record) for record in records] == [
        ["id", "fields", "metadata", "suggestions", "responses", "vectors"]
    ] * 3
    assert records[0]["fields"]["completion_2"] == " a cat"
    [ann, bob] = records[0]["responses"]["ranking"]
    assert ann == {"value": ["completion_2", "completion_1", "completion_3"], "user_id": user_id("ann")}
    assert bob["value"] == ["completion_2", "completion_3", "completion_1"]
    assert user_id("ann") == "3b9177ad-108c-5e52-b5dd-fdd502eb9ed7"


def test_argilla_s_own_answers_are_read(tasks, store, tmp_path):
    """Ranked there: no metadata of ours, another order than ours, the server's form with ranks, a draft."""
    ours = {"u1": {"rater": "ann", "ranks": [0, 0, 1], "margin": 1.0}}
    value = [
        {"value": "completion_3", "rank": 1},
        {"value": "completion_1", "rank": 2},
        {"value": "completion_2", "rank": 2},
    ]
    responses = [
        {"value": ["completion_3", "completion_1", "completion_2"], "user_id": "u1", "status": "submitted"},
        {"value": value, "user_id": "u2"},
        {"value": ["completion_1", "completion_2", "completion_3"], "user_id": "u3", "status": "draft"},
        {"value": [{"value": f"completion_{i}"} for i in (2, 1, 3)], "user_id": "u4"},
    ]
    record = {"id": "one", "metadata": {"jrlhf": json.dumps(ours)}, "responses": {"ranking": responses}}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record, {"id": "two", "responses": {}}, {**record, "id": "unknown"}]))
    assert import_rankings(path, "argilla", tasks, store) == [
        "3 decisions imported, 0 were known already",
        "3 rankings left out: the task file does not have their task",
    ]
    found = {decision.rater: decision.ranks for decision in store.standing()}
    assert found == {"ann": (1, 2, 0), "argilla u2": (1, 1, 0), "argilla u4": (1, 0, 2)}


def test_label_studio_s_form_fits_its_interface(tasks, store):
    decide(store, tasks)
    [first, *_] = json.loads(export_text(tasks, store.standing(), "label-studio")[0])
    assert [item["id"] for item in first["data"]["items"]] == ["1", "2", "3"]
    result = first["annotations"][0]["result"][0]
    assert result["value"] == {"ranker": {"rank": ["2", "1", "3"]}}
    for name in (result["from_name"], result["to_name"], "$items", "$prompt"):
        assert f'"{name}"' in INTERFACE


def test_label_studio_s_own_answers_are_read(tasks, store, tmp_path):
    def by(who, ranker, **more):
        return {"completed_by": who, "result": [{"type": "ranker", "value": {"ranker": ranker}}], **more}

    annotations = [
        by(3, {"rank": ["3", "1", "2"]}, lead_time=9.5),
        by({"email": "a@b.example"}, {"good": ["2"], "bad": ["1", "3"], "_": []}),
        by(None, ["1", "2", "3"]),
        by(4, {"rank": ["1", "2", "3"]}, was_cancelled=True),
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"id": 1, "data": {"task": "one"}, "annotations": annotations}]))
    assert import_rankings(path, "label-studio", tasks, store) == ["3 decisions imported, 0 were known already"]
    found = {decision.rater: (decision.ranks, decision.seconds) for decision in store.standing()}
    assert found == {
        "label-studio 3": ((1, 2, 0), 9.5),
        "label-studio a@b.example": ((1, 0, 1), None),
        "label-studio": ((0, 1, 2), None),
    }


def test_ties_that_do_not_fit_the_order_any_more_are_let_go():
    assert read_order([2, 0, 1], "ann", {"ranks": [1, 1, 0]}).ranks == (1, 1, 0)
    assert read_order([2, 0, 1], "ann", {"ranks": [0, 1, 1]}).ranks == (1, 2, 0)
    assert read_order([2, 0, 1], "ann", {"ranks": [0, 1]}).ranks == (1, 2, 0)
    with pytest.raises(ValueError, match="not an order of answers"):
        read_order([0, 0, 2], "ann", {})


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        (
            "ranking",
            '{"prompt": "Lily", "completions": ["a", "b"], "ranks": [0]}',
            ":1: ranks: expected 2 whole numbers",
        ),
        ("ranking", '{"completions": ["a", "a"], "ranks": [0, 1]}', ":1: completions: expected two or more different"),
        ("ranking", '{"completions": ["a", "b"], "ranks": [0, 1], "rater": "a\\nb"}', ":1: rater: not a name"),
        ("argilla", "{}", ": expected a JSON array of objects"),
        ("argilla", "[", ": not JSON"),
        (
            "argilla",
            '[{"id": "one", "responses": {"ranking": [{"value": ["x"], "user_id": "u"}]}}]',
            ": record 1: not in the format",
        ),
        (
            "argilla",
            '[{"id": "one", "responses": {"ranking": [{"value": 3, "user_id": "u"}]}}]',
            ": record 1: not in the format",
        ),
        (
            "argilla",
            '[{"id": "one", "responses": {"ranking": [{"value": ["completion_1"], "user_id": "u"}]}}]',
            ": task one: the order does not fit its 3 answers",
        ),
        (
            "label-studio",
            '[{"annotations": [{"result": [{"type": "ranker"}]}]}]',
            ": record 1: not in the format of label-studio",
        ),
        ("label-studio", "[3]", ": expected a JSON array of objects"),
    ],
)
def test_a_file_that_is_no_such_file_is_named_and_nothing_is_taken(form, text, message, tasks, store, tmp_path):
    path = tmp_path / "in.json"
    path.write_text(text)
    with pytest.raises(TaskError) as caught:
        import_rankings(path, form, tasks, store)
    assert str(caught.value).startswith(f"{path}{message}")
    assert store.standing() == []
