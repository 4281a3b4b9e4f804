"""Agreement, accuracy and pace: against published values, a plain loop, and cases worked out by hand."""

import json
from itertools import product

import numpy as np
import pytest

from jrlhf.cli import main
from jrlhf.rank import read_tasks
from jrlhf.rank.store import Decision, Store

pytest.importorskip("krippendorff")

from jrlhf.rank.report import alpha, as_text, figures

NAN = float("nan")
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section E: four observers, twelve units.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]


def plain_alpha(values):
    """The definition, a pair at a time."""
    units = [[v for v in column if not np.isnan(v)] for column in np.asarray(values).T]
    units = [unit for unit in units if len(unit) > 1]
    pooled = [v for unit in units for v in unit]
    counts = {v: pooled.count(v) for v in sorted(set(pooled))}

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        return (sum(n for v, n in counts.items() if low <= v <= high) - (counts[low] + counts[high]) / 2) ** 2

    observed = sum(
        distance(a, b) / (len(unit) - 1)
        for unit in units
        for (i, a), (j, b) in product(enumerate(unit), repeat=2)
        if i != j
    )
    expected = sum(distance(a, b) for a, b in product(pooled, repeat=2)) / (len(pooled) - 1)
    return 1 - observed / expected


def test_alpha_is_the_published_one():
    assert alpha(np.array(PUBLISHED)) == pytest.approx(0.815, abs=5e-4)
    assert plain_alpha(PUBLISHED) == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_the_plain_loop_s(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(2, 9, (4, 15)) / 2
    values[rng.random(values.shape) < 0.3] = np.nan
    assert alpha(values) == pytest.approx(plain_alpha(values), abs=1e-12)


def test_alpha_of_full_agreement_of_chance_and_of_nothing():
    assert alpha(np.array([[1.0, 2, 3], [1, 2, 3]])) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    assert (
        abs(alpha(rng.permuted(np.tile([1.0, 2, 3, 4], (2, 2000)).reshape(2, 2000, 4), axis=2).reshape(2, -1))) < 0.03
    )
    assert alpha(np.array([[1.0, NAN], [NAN, 2]])) is None
    assert alpha(np.array([[1.0, 1], [1, 1]])) is None
    assert alpha(np.zeros((0, 0))) is None


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [{"id": str(n), "completions": ["a", "b", f"c{n}"]} for n in range(4)]
    rows[0]["gold"], rows[1]["gold"] = [0, 1, 2], [1, 0, 1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tasks(path).tasks


def test_figures_worked_out_by_hand(tasks):
    key = [task.key for task in tasks]
    found = figures(
        tasks,
        [
            Decision("ann", key[0], "rank", (0, 1, 2), seconds=2.0),
            Decision("bob", key[0], "rank", (1, 0, 2), seconds=9.0),
            Decision("ann", key[1], "rank", (1, 0, 0), seconds=4.0),
            Decision("bob", key[1], "rank", (1, 0, 2)),
            Decision("ann", key[2], "rank", (0, 1, 2), seconds=60.0),
            Decision("bob", key[3], "skip", seconds=1.0),
            Decision("cy", "elsewhere", "rank", (0, 1)),
        ],
    )
    assert (found.tasks, found.decided, found.shared, found.elsewhere) == (4, 3, 2, 1)
    # Task 0: of three pairs, (a, b) is turned round. Task 1: ann has a worse than b and c, b and c tied; bob b, a, c.
    assert found.agreement == pytest.approx((2 + 1) / 6)
    places = [[1, 2, 3, 3, 1.5, 1.5, 1, 2, 3], [2, 1, 3, 2, 1, 3, NAN, NAN, NAN]]
    assert found.alpha == pytest.approx(plain_alpha(places), abs=1e-12)
    ann, bob = found.raters
    assert (ann.name, ann.ranked, ann.skipped, ann.seconds) == ("ann", 3, 0, 4.0)
    assert (bob.name, bob.ranked, bob.skipped, bob.seconds) == ("bob", 2, 1, 9.0)
    # Gold has three pairs in task 0 and two in task 1, b before a and before c.
    assert ann.gold == pytest.approx(4 / 5)
    assert bob.gold == pytest.approx((2 + 2) / 5)
    assert ann.ties == pytest.approx(1 / 9)
    assert bob.ties == 0.0


def test_the_report_with_and_without_decisions(tasks, tmp_path, capsys):
    argv = ["rank", "--tasks", str(tmp_path / "tasks.jsonl"), "--report"]
    assert main(argv) == 0
    assert "Krippendorff's alpha (ordinal)     -\n" in capsys.readouterr().out
    store = Store(tmp_path / "tasks.sqlite")
    store.add(*(Decision(name, tasks[0].key, "rank", (0, 1, 2), seconds=2.0) for name in ("ann", "a long name")))
    text = as_text(figures(tasks, store.standing()))
    store.close()
    assert main(argv) == 0
    assert capsys.readouterr().out == text + "\n"
    assert "Krippendorff's alpha (ordinal)     1.00" in text
    assert text.splitlines()[-2:] == [
        "a long name       1        0   0.00        1.00             2.0",
        "ann               1        0   0.00        1.00             2.0",
    ]


def test_without_its_library_the_report_says_which_extra_has_it(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "krippendorff", None)
    store = Store(tmp_path / "tasks.sqlite")
    store.add(*(Decision(name, tasks[0].key, "rank", (0, 1, 2)) for name in ("ann", "bob")))
    store.close()
    assert main(["rank", "--tasks", str(tmp_path / "tasks.jsonl"), "--report"]) == 2
    assert capsys.readouterr().err == 'jrlhf: rank: krippendorff is missing; pip install "jrlhf[rank]"\n'
