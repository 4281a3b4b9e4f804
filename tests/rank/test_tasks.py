"""Task files: what is a task, what is left out and counted, and what is refused with its place."""

import json
import random

import pytest

from jrlhf.rank import TaskError, distinct, read_tasks, task_key, task_line


def written(tmp_path, *rows):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_a_line_comes_back_as_the_task_it_was(tmp_path):
    chat = [{"role": "user", "content": "Grüß Gott,\u2028 <b>you</b>"}]
    line = task_line(chat, ["a", "b "], model="m", seed=1, temperature=0.5)
    [task] = read_tasks(written(tmp_path, line.rstrip("\n"))).tasks
    assert (task.prompt, task.completions, task.model) == (chat, ("a", "b "), "m")
    assert task.id == task.key == task_key(chat, ["a", "b "])


def test_the_key_is_of_prompt_and_answers_alone():
    # A golden value: decisions of an older version must be found again.
    assert task_key("Why?", ["Because.", "No."]) == "d852f0178bfdaa71"
    assert len({task_key(p, c) for p in ("a", "b", None) for c in (["x", "y"], ["y", "x"], ["x", "z"])}) == 9


def test_answers_are_shown_once_and_blank_ones_never(tmp_path):
    assert distinct(["a", "", "b", "a", " \n", "a "]) == ["a", "b", "a "]
    rows = [
        {"prompt": "p", "completions": ["a", "b", "a"], "gold": [0, 1, 0]},
        {"prompt": "q", "completions": ["a", "a", " "]},
        {"prompt": "p", "completions": ["a", "b"]},
    ]
    file = read_tasks(written(tmp_path, *rows))
    [task] = file.tasks
    assert (task.completions, task.gold) == (("a", "b"), (0, 1))
    assert (file.merged, file.left_out, file.repeated) == (1, 1, 1)
    assert [note.split()[0] for note in file.notes()] == ["1", "1", "1"]


def test_each_rater_has_an_order_of_their_own_that_stays(tmp_path):
    names = [f"rater {i}" for i in range(200)]
    [task] = read_tasks(written(tmp_path, {"prompt": "p", "completions": ["a", "b", "c"]})).tasks
    orders = [tuple(task.order_for(name)) for name in names]
    random.seed(1)
    assert orders == [tuple(task.order_for(name)) for name in names]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    assert min(counts) > 15  # of 33 each, on average
    assert orders[0] == (2, 1, 0)  # golden: a rater who comes back sees what was there


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "p"}, "completions: expected a list of answers"),
        ({"prompt": 3, "completions": ["a", "b"]}, "prompt: expected text or chat messages"),
        (
            {"prompt": [{"role": "user"}], "completions": ["a", "b"]},
            'prompt[0]: expected a message {"role", "content"}',
        ),
        ({"completions": ["a", 2]}, "completions[1]: expected text or chat messages"),
        ({"completions": ["a", "b\x00"]}, "completions[1]: contains a NUL character"),
        ('{"completions": ["a", "\\ud800"]}', "completions[1]: contains half of a surrogate pair"),
        ({"completions": list("abcdefghij")}, "completions: 10 different answers"),
        ({"completions": ["a", "b"], "gold": [0]}, "gold: expected 2 whole numbers"),
        ({"completions": ["a", "b"], "gold": [0, True]}, "gold: expected 2 whole numbers"),
        ({"completions": ["a", "b"], "id": []}, "id: expected text"),
    ],
)
def test_a_bad_line_is_named(row, message, tmp_path):
    path = written(tmp_path, {"completions": ["a", "b"]}, row)
    with pytest.raises(TaskError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_two_tasks_of_one_id_and_a_file_without_any_are_refused(tmp_path):
    path = written(tmp_path, {"id": 1, "completions": ["a", "b"]}, {"id": "1", "completions": ["a", "c"]})
    with pytest.raises(TaskError, match="2: id: '1': line 1 has the same id"):
        read_tasks(path)
    with pytest.raises(TaskError, match="no prompt has two different answers"):
        read_tasks(written(tmp_path, {"completions": ["a", "a"]}))
    with pytest.raises(FileNotFoundError):
        read_tasks(tmp_path / "absent.jsonl")
