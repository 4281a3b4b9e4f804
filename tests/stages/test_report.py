"""The closing table and report.html: every figure in them, nothing fetched, nothing unescaped."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jrlhf.stages.chart import line_chart, thin, ticks
from jrlhf.stages.report import figures, print_summary, write_report

SUMMARY: dict[str, Any] = {
    "sft": {"base_nll": 4.0, "heldout_nll": 2.2},
    "reward": {
        "heldout_accuracy": 0.7811, "bag_of_words_accuracy": 0.815, "longer_wins_accuracy": 0.487, "ece": 0.0432,
    },
    "ppo": {
        "reward_before": -0.0123, "reward_after": 1.4567, "gold_before": 0.111, "gold_after": 0.999,
        "gold_stderr": 0.0456, "kl": 13.25, "entropy_before": 2.0, "entropy_after": 1.5, "distinct2_before": 0.5,
        "distinct2_after": 0.4, "max_abs_logprob_diff": 1.5e-6, "first_minibatch_max_abs_log_ratio": 2.5e-6,
    },
    "seconds": {"sft": 90.25, "reward": 120.5, "ppo": 240.75, "total": 451.5},
    "seed": 3,
    "versions": {"python": "3.11.9", "jax": "0.10.2"},
}  # fmt: skip
SAMPLES = [{"prompt": "The [bold]story", "before": " <script>alert(1)</script>", "after": ' is "fun" & [/red] good.'}]
PIPELINE: dict[str, Any] = {
    "sft": {"base_nll": None, "heldout_nll": 2.5, "steps": 10, "skipped": {"empty": 7}, "seconds": 1.5},
    "ppo": {
        "before": {"eval/score_mean": 0.125, "eval/kl": 0.0},
        "after": {"eval/score_mean": 0.625, "eval/kl": 3.5},
        "kl_coef": 0.0625,
        "seconds": 2.5,
    },
    "seconds": {"sft": 1.5, "ppo": 2.5, "total": 4.0},
    "seed": 0,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the metrics and config of two stages."""
    for stage, names in {"sft": ("loss", "nll"), "ppo": ("reward/score_mean", "score_mean")}.items():
        folder = tmp_path / stage
        folder.mkdir()
        rows = [{"step": i, "time": 1e9, names[0]: 3.0 - i / 10, "odd<name>": float(i)} for i in range(1, 11)]
        rows += [{"step": i, "time": 1e9, f"eval/{names[1]}": 3.25 - i / 10} for i in (0, 5, 10)]
        rows.append({"step": 11, "time": 1e9, names[0]: "nan"})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.yaml").write_text("run: a<b\nseed: 0\n")
    return tmp_path


class Page(HTMLParser):
    """What a page consists of; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "line", "polyline", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(run: Path, summary: dict[str, Any], samples: list[dict[str, str]]) -> tuple[str, Page]:
    write_report(run, summary, samples)
    text = (run / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_before_and_after_are_one_figure() -> None:
    rows = {(row.stage, row.name): row for row in figures(SUMMARY)}
    nll, reward, kl = rows["sft", "nll"], rows["ppo", "reward"], rows["ppo", "kl"]
    assert (nll.before, nll.after, nll.change) == (4.0, 2.2, "-1.8 (-45%)")
    assert (reward.before, reward.after, reward.change) == (-0.0123, 1.4567, "+1.47")
    assert (kl.before, kl.after, kl.change) == (None, 13.25, "")
    assert rows["ppo", "distinct2"].change == "-0.1 (-20%)"


def test_every_scalar_of_any_summary_is_a_figure() -> None:
    found = [(row.stage, row.name, row.before, row.after) for row in figures(PIPELINE)]
    assert found == [
        ("sft", "nll", None, 2.5), ("sft", "steps", None, 10), ("sft", "skipped/empty", None, 7),
        ("ppo", "eval/score_mean", 0.125, 0.625), ("ppo", "eval/kl", 0.0, 3.5), ("ppo", "kl_coef", None, 0.0625),
        ("seconds", "sft", None, 1.5), ("seconds", "ppo", None, 2.5), ("seconds", "total", None, 4.0),
    ]  # fmt: skip


def printed(summary: dict[str, Any], samples: list[dict[str, str]]) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=120), summary, samples)
    return out.getvalue()


def test_the_terminal_shows_figures_and_samples_as_they_are() -> None:
    text = printed(SUMMARY, SAMPLES)
    for cell in (
        "-1.8 (-45%)",
        "0.7811",
        "1.457",
        "1.5e-06",
        "13.25",
        "451.5",
        "[bold]story",
        "& [/red] good",
    ):
        assert cell in text
    sample = next(line for line in text.splitlines() if "[bold]story" in line)
    assert "<script>" in sample
    assert '"fun"' in sample
    assert "0.625" in printed(PIPELINE, [])
    assert "prompt" not in printed(PIPELINE, [])


def test_the_page_holds_figures_samples_charts_and_config(run: Path) -> None:
    text, page = written(run, SUMMARY, SAMPLES)
    content = " ".join(page.text)
    for row in figures(SUMMARY):
        assert row.label in content
    for cell in (
        "2.2",
        "0.7811",
        "1.457",
        "0.0456",
        "2.5e-06",
        "jax 0.10.2",
        "seed 3",
        '"fun" & [/red]',
        "run: a<b",
    ):
        assert cell in content
    # Two stages, each with one chart of a train and a held-out line and one chart of another metric.
    assert page.tags.count("svg") == 4
    assert text.count('class="line1"') == 2
    assert page.tags.count("details") == 3  # the two stages' other metrics, and one config for both


def test_the_page_fetches_nothing_and_escapes_all(run: Path) -> None:
    text, page = written(run, SUMMARY, SAMPLES)
    assert "http" not in text
    assert not re.search(r"url\(|@import|srcset", text)
    assert not {"script", "link", "img", "iframe", "object", "odd"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "odd&lt;name&gt;" in text


def test_a_run_without_samples_metrics_or_versions_has_a_page_too(tmp_path: Path) -> None:
    text, page = written(tmp_path, PIPELINE, [])
    assert "0.625" in text
    assert "svg" not in page.tags
    assert page.tags.count("table") == 1


def coordinates(figure: str, line: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(figure)
    points = next(p.attrib["points"] for p in root.iter("polyline") if p.attrib["class"] == line)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_a_chart_is_to_scale() -> None:
    figure = line_chart("T", {"a": [(0.0, 0.0), (5.0, 1.0), (10.0, 4.0)], "b": [(0.0, float("nan")), (10.0, 2.0)]})
    (x0, y0), (x1, y1), (x2, y2) = coordinates(figure, "line0")
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.25, abs=2e-3)
    assert y2 < y0
    assert coordinates(figure, "line1") == [(x2, pytest.approx((y0 + y2) / 2, abs=0.1))]


def test_a_chart_of_nothing_finite_is_empty_and_of_one_value_is_flat() -> None:
    assert line_chart("T", {"a": [(0.0, float("nan"))], "b": []}) == ""
    flat = coordinates(line_chart("T", {"a": [(0.0, 0.0), (3.0, 0.0)]}), "line0")
    assert flat[0][1] == flat[1][1]
    assert len(coordinates(line_chart("T", {"a": [(7.0, 1.0)]}), "line0")) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 10.0, [0.0, 5.0, 10.0]), (0.13, 0.41, [0.1, 0.2, 0.3, 0.4, 0.5]), (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0])],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_the_last_point() -> None:
    points = [(float(i), float(i)) for i in range(1003)]
    kept = thin(points)
    assert len(kept) <= 400
    assert kept[-1] == points[-1]
    assert thin(points[:400]) == points[:400]
