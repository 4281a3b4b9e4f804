"""A report's charts, by Bokeh: its script is put into the page, so that it opens without a network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import HoverTool
from bokeh.plotting import figure

from jrlhf.report.overoptimisation import overoptimisation_fit
from jrlhf.report.record import Points, Record

COLOURS = ("#3b82c4", "#d0702f", "#4f9d69", "#a06bb8", "#b3a125")
"""They stand out on white and on black."""
SOFT = "#808894"
MOST_POINTS = 400
BINS = 20

PROXY_AND_GOLD = ("eval/score_mean", "eval/judge_mean", "eval/gold")
"""What PPO raises, and those that only look on: a second reward model, and the quick start's word lists."""

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": {
        "Loss, nats per token": ("loss", "eval/nll"),
        "Refusals, where wanted and where not": ("eval/refusal_rate", "eval/benign_refusal_rate"),
        "Learning rate": ("lr",),
        "Tokens a second": ("tokens_per_second",),
    },
    "reward": {
        "Ranking loss": ("loss", "eval/loss"),
        "Pair accuracy": ("accuracy", "eval/accuracy"),
        "Calibration error": ("eval/ece",),
    },
    "ppo": {
        "Reward: trained on, and held out": ("reward/score_mean", *PROXY_AND_GOLD),
        "Win rate over the first answers": ("eval/win_rate", "eval/judge_win_rate"),
        "KL, nats per sequence": ("kl", "eval/kl"),
        "Entropy, nats per token": ("entropy", "eval/entropy"),
        "Answer length, tokens": ("length/mean", "eval/length"),
        "Refusals, where wanted and where not": ("eval/refusal_rate", "eval/benign_refusal_rate"),
        "KL coefficient": ("kl_coef",),
        "Distinct-2": ("eval/distinct2",),
        "Time by phase, share": ("share/rollout", "share/scoring", "share/update", "share/evaluation"),
        "Share of the device's peak": ("perf/mfu", "perf/rollout_bandwidth_share"),
    },
}


def stage_charts(stage: str, runs: Sequence[Record]) -> tuple[list[Any], list[Any]]:
    """The charts that matter, and one of every other metric."""
    metrics = [run.metrics.get(stage, {}) for run in runs]
    names = dict.fromkeys(name for series in metrics for name in series)

    def chart(title: str, wanted: Sequence[str]) -> Any:
        # Names alone where there is one run; beside another, which run it is: by place, as names may be equal.
        marks = [""] if len(runs) == 1 else [" (1)", " (2)"]
        lines = {
            f"{name}{mark}": series[name]
            for name in wanted
            for mark, series in zip(marks, metrics, strict=True)
            if name in series
        }
        return line_chart(title, lines, x="step")

    rules = tuple(name for name in names if name.startswith("eval/rule/"))
    title = f"{rules[0].removeprefix('eval/')}, held out" if len(rules) == 1 else "Rules, held out"
    asked = CHARTS[stage] | {title: rules}
    main = [chart(title, wanted) for title, wanted in asked.items()]
    drawn = {name for wanted in asked.values() for name in wanted}
    others = [chart(name, (name,)) for name in sorted(names.keys() - drawn)]
    return [c for c in main if c is not None], [c for c in others if c is not None]


def line_chart(title: str, series: Mapping[str, Points], *, x: str) -> Any:
    """Lines over one pair of axes, told apart by colour and, after the first, by dots; None without a finite point."""
    finite = {name: thin([p for p in points if all(map(math.isfinite, p))]) for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    plot = _plot(title, x)
    pointed = []
    for number, (name, points) in enumerate(finite.items()):
        xs, ys = (list(values) for values in zip(*points, strict=True))
        colour = COLOURS[number % len(COLOURS)]
        known = {"legend_label": name} if len(finite) > 1 else {}
        shown = plot.line(xs, ys, color=colour, line_width=1.6, name=name, **known)
        if number or len(points) == 1:
            dots = plot.scatter(xs, ys, color=colour, size=5, name=name, **known)
            # A line of one point cannot be pointed at.
            shown = dots if len(points) == 1 else shown
        pointed.append(shown)
    # @: the nearest point's own values; $x and $y would be the pointer's place.
    return _finished(plot, [("", "$name"), (x, "@x"), ("value", "@y")], pointed)


def overoptimisation_chart(run: Record, mark: str) -> tuple[Any, str]:
    """Held-out rewards over √KL, with the form of Gao et al. where it can be fitted; and what the fit says.

    ``mark``: which run it is, for the title.
    """
    ppo = run.metrics.get("ppo", {})
    kl = dict(ppo.get("eval/kl", []))
    series, told = {}, []
    for name in PROXY_AND_GOLD:
        both = [(max(kl[step], 0.0), value) for step, value in ppo.get(name, []) if step in kl]
        if len(both) < 2:
            continue
        series[name] = sorted((math.sqrt(nats), value) for nats, value in both)
        distances, values = (np.asarray(v) for v in zip(*both, strict=True))
        fit = overoptimisation_fit(distances, values)
        if fit is not None:
            d = np.linspace(0.0, float(np.sqrt(distances.max())), 50)
            series[f"fit of {name}"] = list(zip(d.tolist(), fit.at(d).tolist(), strict=True))
            told.append(f"{name}: α {fit.alpha:.3g}, β {fit.beta:.3g}")
    return line_chart(f"Reward over the distance from the SFT policy{mark}", series, x="√KL"), "; ".join(told)


def score_histogram(run: Record, mark: str) -> Any:
    """The scores of the held-out answers before and after; None where there are none."""
    sides = [np.asarray([row.get("score") for row in rows], np.float64) for rows in (run.before, run.after)]
    sides = [values[np.isfinite(values)] for values in sides]
    if not all(values.size for values in sides):
        return None
    edges = np.histogram_bin_edges(np.concatenate(sides), bins=BINS)
    plot = _plot(f"Scores of held-out answers{mark}", "score")
    for name, values, colour in zip(("before", "after"), sides, COLOURS, strict=False):
        counts, _ = np.histogram(values, bins=edges)
        plot.quad(
            top=counts.tolist(), bottom=0, left=edges[:-1].tolist(), right=edges[1:].tolist(), fill_alpha=0.45,
            color=colour, legend_label=name,
        )  # fmt: skip
    return _finished(plot, [("score", "@left to @right"), ("answers", "@top")], plot.renderers)


def calibration_chart(run: Record, mark: str) -> Any:
    """How often a pair is ordered right against how sure the model was of it; None without an evaluation."""
    if not run.calibration:
        return None
    points = [(bin_["confidence"], bin_["accuracy"]) for bin_ in run.calibration]
    lines = {"perfect": [(0.5, 0.5), (1.0, 1.0)], "the reward model": points}
    return line_chart(f"Calibration: pairs ordered right{mark}", lines, x="confidence")


def thin(points: Points) -> Points:
    """At most ``MOST_POINTS`` of them, evenly chosen, the last among them."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::-1][::every][::-1]


def _plot(title: str, x: str) -> Any:
    plot: Any = figure(title=title, height=230, sizing_mode="stretch_width", toolbar_location=None, tools="")
    plot.xaxis.axis_label = x
    plot.background_fill_alpha = plot.border_fill_alpha = 0.0
    plot.outline_line_color = None
    plot.title.text_color = SOFT
    plot.grid.grid_line_alpha = 0.25
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = axis.axis_line_color = SOFT
        axis.major_tick_line_color, axis.minor_tick_line_color = SOFT, None
    return plot


def _finished(plot: Any, shown: list[tuple[str, str]], pointed: Sequence[Any]) -> Any:
    """With what a pointer shows over ``pointed``, and its legend out of the way."""
    plot.add_tools(HoverTool(tooltips=shown, renderers=list(pointed)))
    if plot.legend:
        plot.legend.background_fill_alpha = 0.0
        plot.legend.border_line_color = None
        plot.legend.label_text_color = SOFT
        plot.legend.label_text_font_size = "11px"
        plot.legend.padding, plot.legend.spacing = 0, 14
        plot.add_layout(plot.legend[0], "below")
        plot.legend.orientation, plot.legend.ncols = "horizontal", 2
    return plot
