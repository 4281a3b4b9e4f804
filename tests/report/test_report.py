"""The closing table and report.html: every figure in them, nothing fetched, nothing unescaped."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bokeh.models import HoverTool
from rich.console import Console

from jrlhf.config import ConfigError
from jrlhf.config.tools import ReportConfig
from jrlhf.report import figures, print_summary, run_report, write_report
from jrlhf.report.charts import MAX_POINTS, line_chart, thin
from jrlhf.report.record import summary_labels
from jrlhf.stages.table import STAGES

LABELS = summary_labels(STAGES)
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
    "reward": {"normalised_on": ""},
    "ppo": {
        "before": {"eval/score_mean": 0.125, "eval/kl": 0.0},
        "after": {"eval/score_mean": 0.625, "eval/kl": 3.5},
        "kl_coef": 0.0625,
        "seconds": 2.5,
    },
    "seconds": {"sft": 1.5, "ppo": 2.5, "total": 4.0},
    "seed": 0,
}


HOSTILE = "</script><script>document.title = 'taken'</script><!--chart 0-->"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as the three stages leave it, with all that a report reads."""
    folder = tmp_path / "mine"
    for stage, names in {"sft": ("loss", "nll"), "reward": ("loss", "accuracy"), "ppo": ("kl", "score_mean")}.items():
        (folder / stage / "evals").mkdir(parents=True)
        rows = [{"step": i, "time": 1e9, names[0]: 3.0 - i / 10, "odd<name>": float(i)} for i in range(1, 11)]
        rows += [
            {"step": i, "time": 1e9, f"eval/{names[1]}": 3.25 - i / 10, "eval/kl": i * 0.5} for i in (0, 2, 5, 7, 10)
        ]
        rows.append({"step": 11, "time": 1e9, names[0]: "nan"})
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / stage / "config.yaml").write_text("run: a<b\nseed: 0\n")
    bins = [{"confidence": 0.6, "accuracy": 0.55, "pairs": 10}, {"confidence": 0.9, "accuracy": 0.95, "pairs": 5}]
    (folder / "reward" / "evals" / "000010.json").write_text(json.dumps({"calibration": bins}))
    for step, shift in (0, 0.0), (5, 1.0), (10, 2.0):
        answers = [
            {"prompt": HOSTILE, "completion": f"answer {i} at {step} {HOSTILE}", "score": i + shift, "rule/json": 1.0}
            for i in range(25)
        ]
        path = folder / "ppo" / "evals" / f"{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "ppo" / "summary.json").write_text(json.dumps({"exported_step": 5}))
    verdict = {"gate": "kl <= 3", "value": 5.0, "passed": False, "missed_by": 2.0}
    (folder / "ppo" / "gates.json").write_text(json.dumps({"gates": [verdict]}))
    event = {"step": 7, "time": 1e9, "event": "rollback", "to": 5, "kl_coef": 0.25}
    (folder / "ppo" / "events.jsonl").write_text(json.dumps(event) + "\n")
    curves = {"ppo": {"eval/gold": [[i, 0.1 * i] for i in (0, 2, 5, 7, 10)]}}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"curves": curves}))
    return folder


def without_library(text: str) -> str:
    """The page without Bokeh's scripts and what they draw."""
    return re.sub(r"<script\b.*?</script>", "", text, flags=re.S)


def test_before_and_after_are_one_figure() -> None:
    rows = {(row.stage, row.name): row for row in figures(SUMMARY, LABELS)}
    nll, reward, kl = rows["sft", "nll"], rows["ppo", "reward"], rows["ppo", "kl"]
    assert (nll.before, nll.after, nll.change) == (4.0, 2.2, "-1.8 (-45%)")
    assert (reward.before, reward.after, reward.change) == (-0.0123, 1.4567, "+1.47")
    assert (kl.before, kl.after, kl.change) == (None, 13.25, "")
    assert rows["ppo", "distinct2"].change == "-0.1 (-20%)"


def test_every_scalar_of_any_summary_is_a_figure() -> None:
    found = [(row.stage, row.name, row.before, row.after) for row in figures(PIPELINE, LABELS)]
    assert found == [
        ("sft", "nll", None, 2.5), ("sft", "steps", None, 10), ("sft", "skipped/empty", None, 7),
        ("ppo", "eval/score_mean", 0.125, 0.625), ("ppo", "eval/kl", 0.0, 3.5), ("ppo", "kl_coef", None, 0.0625),
        ("seconds", "sft", None, 1.5), ("seconds", "ppo", None, 2.5), ("seconds", "total", None, 4.0),
    ]  # fmt: skip


def printed(summary: dict[str, Any], samples: list[dict[str, str]]) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=120), summary, samples, STAGES)
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


def test_the_page_holds_all_that_the_run_left(run: Path) -> None:
    text = write_report(run, None, STAGES).read_text(encoding="utf-8")
    for row in figures(SUMMARY, LABELS):
        assert row.label in text.replace("&#x27;", "'").replace("&quot;", '"')
    for cell in ("0.7811", "1.457", "2.5e-06", "jax 0.10.2", "seed 3", "run: a&lt;b", "failed by 2", "rollback"):
        assert cell in text, cell
    assert "answer 19 at 0 " in text
    assert "answer 19 at 5 " in text, "the answers of the step that was exported"
    assert "answer 20 at" not in text
    assert "at 10 " not in text
    assert "rule/json 1" in text
    for title in ("Calibration: pairs ordered right", "Scores of held-out answers", "distance from the SFT policy"):
        assert title in text
    assert "Fit d" in text
    assert "; eval/gold: α" in text, "a curve that only the summary has"
    assert len(text) < 5_000_000


def test_what_a_model_wrote_is_text_and_nothing_is_fetched(run: Path) -> None:
    whole = write_report(run, None, STAGES).read_text(encoding="utf-8")
    assert "</script><script>document.title" not in whole
    text = without_library(whole)
    assert "&lt;/script&gt;&lt;script&gt;document.title" in text
    assert "<odd" not in text
    assert not re.search(r"(src|href)\s*=", text)
    assert not re.search(r"url\(|@import|srcset", text)
    # Each chart is where its hole was, and a prompt that looks like one is none.
    assert "<!--chart" not in text
    assert "&lt;!--chart 0--&gt;" in text


def test_two_runs_are_side_by_side(run: Path) -> None:
    other = run.parent / "yours"
    shutil.copytree(run, other)
    (run / "ppo" / "config.yaml").write_text("run: a\nseed: 0\n")
    (other / "ppo" / "config.yaml").write_text("run: b\nseed: 1\n")
    text = run_report(ReportConfig(str(run), str(other)), STAGES).read_text(encoding="utf-8")
    assert (run / "comparison.html").exists()
    assert "mine (1) and yours (2)" in text
    assert "seed: 0 -&gt; 1" in text
    assert "eval/nll (2)" in text
    for title in ("Calibration: pairs ordered right", "Scores of held-out answers", "distance from the SFT policy"):
        assert all(f"{title} ({number})" in text for number in (1, 2)), title
    # A config of another version is told of, and the rest is there.
    (other / "ppo" / "config.yaml").write_text("run: b\nppo: {no_such_field: 1}\n")
    text = run_report(ReportConfig(str(run), str(other)), STAGES).read_text(encoding="utf-8")
    assert "ppo: cannot be compared" in text
    assert "no_such_field" in text


def test_a_run_on_its_way_has_a_page_too(run: Path) -> None:
    for path in (run / "summary.json", run / "ppo" / "summary.json", run / "ppo" / "events.jsonl"):
        path.unlink()
    shutil.rmtree(run / "reward")
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "ki')
    text = write_report(run, None, STAGES).read_text(encoding="utf-8")
    assert "answer 3 at 10 " in text
    (run / "sft" / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "ppo")
    bare = write_report(run, None, STAGES).read_text(encoding="utf-8")
    assert "<h2>Configuration</h2>" in bare
    assert "Bokeh" not in bare, "no chart, no script"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run: it has none of sft, reward, dpo, ppo"):
        run_report(ReportConfig(str(tmp_path)), STAGES)
    with pytest.raises(ConfigError, match="not a run"):
        run_report(ReportConfig(str(tmp_path / "absent")), STAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", '{"sft": '),
        ("ppo/summary.json", ""),
        ("ppo/gates.json", "rubbish"),
        ("ppo/events.jsonl", "rubbish\n"),
        ("ppo/evals/000005.jsonl", "rubbish\n"),
        ("sft/metrics.jsonl", "rubbish\n"),
        ("sft/metrics.jsonl", '{"step": 1, "loss": "much"}\n'),
        ("sft/metrics.jsonl", '{"loss": 1.0}\n'),
    ],
)
def test_a_damaged_file_is_named(file: str, text: str, run: Path) -> None:
    (run / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"{re.escape(file)}: damaged .*; repair it or move it away"):
        write_report(run, None, STAGES)
    assert not (run / "report.html").exists()


def test_answers_without_a_score_and_events_without_a_time_are_shown_all_the_same(run: Path) -> None:
    for step in (0, 5):
        (run / "ppo" / "evals" / f"{step:06d}.jsonl").write_text('{"prompt": "p", "completion": "c", "length": 3}\n')
    (run / "ppo" / "events.jsonl").write_text('{"step": 7, "event": "ended"}\n')
    text = write_report(run, None, STAGES).read_text(encoding="utf-8")
    assert "Scores of held-out answers" not in text
    assert "length 3" in text
    assert "<td>ended</td>" in text


def test_a_chart_of_nothing_finite_is_none() -> None:
    assert line_chart("T", {"a": [(0.0, float("nan"))], "b": []}, x="step") is None
    chart = line_chart("T", {"a": [(0.0, 1.0), (1.0, float("inf")), (2.0, 3.0)], "b": [(1.0, 1.0)]}, x="step")
    lines = [r.data_source.data for r in chart.renderers]
    assert lines[0] == {"x": [0.0, 2.0], "y": [1.0, 3.0]}
    assert lines[1] == {"x": [1.0], "y": [1.0]}


def test_a_pointer_shows_the_point_and_not_its_own_place() -> None:
    chart = line_chart("T", {"a": [(0.0, 1.0), (1.0, 2e-6)], "b": [(1.0, 1.0)]}, x="step")
    (hover,) = chart.select(HoverTool)
    assert hover.tooltips == [("", "$name"), ("step", "@x"), ("value", "@y")]
    assert [(r.name, type(r.glyph).__name__) for r in hover.renderers] == [("a", "Line"), ("b", "Scatter")]


def test_thinning_keeps_the_last_point() -> None:
    points = [(float(i), float(i)) for i in range(1003)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert kept[-1] == points[-1]
    assert thin(points[:400]) == points[:400]
    assert thin([]) == []


def test_in_a_browser_it_draws_and_says_nothing_wrong(run: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    page_file = write_report(run, None, STAGES)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    told: list[tuple[str, str]] = []
    asked: list[str] = []
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("console", lambda message: told.append((message.type, message.text)))
        page.on("pageerror", lambda error: told.append(("error", str(error))))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_function("document.querySelectorAll('.bk-Figure').length >= 6", timeout=30_000)
        assert page.title() == "jrlhf: mine"
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "nothing is wider than a phone"
        browser.close()
    assert [text for kind, text in told if kind in ("error", "warning")] == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
