"""Charts of a report, by Bokeh. Its script is part of the page, which therefore opens without a network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import HoverTool
from bokeh.plotting import figure

from jrlhf.report.overoptimisation import overoptimisation_fit
from jrlhf.report.record import Points, Record, StageView
from jrlhf.runs.metrics import PROXY_AND_GOLD

COLOURS = ("#3b82c4", "#d0702f", "#4f9d69", "#a06bb8", "#b3a125")
"""Colours that stand out on white and on black."""
SOFT = "#808894"
MAX_POINTS = 400
BINS = 20


def stage_charts(stage: StageView, runs: Sequence[Record]) -> tuple[list[Any], list[Any]]:
    """Return the main charts of a stage, and a chart of every other metric."""
    metrics = [run.metrics.get(stage.name, {}) for run in runs]
    names = dict.fromkeys(name for series in metrics for name in series)

    def chart(title: str, metric_names: Sequence[str]) -> Any:
        # Of two runs, a number marks which one a line belongs to, because their names may be equal.
        marks = [""] if len(runs) == 1 else [" (1)", " (2)"]
        lines = {
            f"{name}{mark}": series[name]
            for name in metric_names
            for mark, series in zip(marks, metrics, strict=True)
            if name in series
        }
        return line_chart(title, lines, x="step")

    rules = tuple(name for name in names if name.startswith("eval/rule/"))
    title = f"{rules[0].removeprefix('eval/')}, held out" if len(rules) == 1 else "Rules, held out"
    titles = dict(stage.charts) | {title: rules}
    main = [chart(title, metric_names) for title, metric_names in titles.items()]
    drawn = {name for metric_names in titles.values() for name in metric_names}
    others = [chart(name, (name,)) for name in sorted(names.keys() - drawn)]
    return [c for c in main if c is not None], [c for c in others if c is not None]


def line_chart(title: str, series: Mapping[str, Points], *, x: str) -> Any:
    """Draw lines with different colours and, after the first, dots; None if no point is finite."""
    finite = {name: thin([p for p in points if all(map(math.isfinite, p))]) for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    plot = _plot(title, x)
    hovered = []
    for number, (name, points) in enumerate(finite.items()):
        xs, ys = (list(values) for values in zip(*points, strict=True))
        colour = COLOURS[number % len(COLOURS)]
        legend = {"legend_label": name} if len(finite) > 1 else {}
        glyph = plot.line(xs, ys, color=colour, line_width=1.6, name=name, **legend)
        if number or len(points) == 1:
            dots = plot.scatter(xs, ys, color=colour, size=5, name=name, **legend)
            # A pointer cannot hit a line of one point.
            glyph = dots if len(points) == 1 else glyph
        hovered.append(glyph)
    # @x is the value of the nearest point; $x would be the position of the pointer.
    return _with_hover(plot, [("", "$name"), (x, "@x"), ("value", "@y")], hovered)


def overoptimisation_chart(stage: str, run: Record, mark: str) -> tuple[Any, str]:
    """Draw held-out rewards over √KL, with those of best of n, and the fit of Gao et al. if there is one, also as text.

    ``mark`` names the run in the title.
    """
    ppo = run.metrics.get(stage, {})
    kl = dict(ppo.get("eval/kl", []))
    series, fits = {}, []
    for name in PROXY_AND_GOLD:
        points = [(max(kl[step], 0.0), value) for step, value in ppo.get(name, []) if step in kl]
        if len(points) < 2:
            continue
        series[name] = sorted((math.sqrt(nats), value) for nats, value in points)
        distances, values = (np.asarray(v) for v in zip(*points, strict=True))
        fit = overoptimisation_fit(distances, values)
        if fit is not None:
            d = np.linspace(0.0, float(np.sqrt(distances.max())), 50)
            series[f"fit of {name}"] = list(zip(d.tolist(), fit.at(d).tolist(), strict=True))
            fits.append(f"{name}: α {fit.alpha:.3g}, β {fit.beta:.3g}")
    for name, column in (("best of n: reward", "score"), ("best of n: judge", "judge")):
        points = [(math.sqrt(point["kl"]), point[column]) for point in run.best_of_n.get(stage, []) if column in point]
        if points:
            series[name] = points
    return line_chart(f"Reward over the distance from the SFT policy{mark}", series, x="√KL"), "; ".join(fits)


def score_histogram(stage: str, run: Record, mark: str) -> Any:
    """Draw the scores of the held-out answers before and after; None without scores."""
    sides = [
        np.asarray([row.get("score") for row in rows], np.float64)
        for rows in (run.before.get(stage, []), run.after.get(stage, []))
    ]
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
    return _with_hover(plot, [("score", "@left to @right"), ("answers", "@top")], plot.renderers)


def calibration_chart(stage: str, run: Record, mark: str) -> Any:
    """Draw the accuracy of the reward model on pairs against its confidence; None without an evaluation."""
    if stage not in run.calibration:
        return None
    points = [(bin_["confidence"], bin_["accuracy"]) for bin_ in run.calibration[stage]]
    lines = {"perfect": [(0.5, 0.5), (1.0, 1.0)], "the reward model": points}
    return line_chart(f"Calibration: pairs ordered right{mark}", lines, x="confidence")


def thin(points: Points) -> Points:
    """Choose at most ``MAX_POINTS`` points evenly, including the last."""
    every = max(1, math.ceil(len(points) / MAX_POINTS))
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


def _with_hover(plot: Any, tooltips: list[tuple[str, str]], hovered: Sequence[Any]) -> Any:
    """Add tooltips over the ``hovered`` glyphs, and move the legend below the plot."""
    plot.add_tools(HoverTool(tooltips=tooltips, renderers=list(hovered)))
    if plot.legend:
        plot.legend.background_fill_alpha = 0.0
        plot.legend.border_line_color = None
        plot.legend.label_text_color = SOFT
        plot.legend.label_text_font_size = "11px"
        plot.legend.padding, plot.legend.spacing = 0, 14
        plot.add_layout(plot.legend[0], "below")
        plot.legend.orientation, plot.legend.ncols = "horizontal", 2
    return plot
