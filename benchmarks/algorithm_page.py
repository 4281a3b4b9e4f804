"""The table and the picture of benchmarks/algorithms.py."""

import statistics
from pathlib import Path
from typing import Any

from algorithm_methods import BEST_OF, METHODS, SFT, SIZES

Point = dict[str, float]
COLUMNS = {
    "gold": 2,
    "reward": 2,
    "kl": 1,
    "distinct2": 2,
    "entropy": 2,
    "length": 1,
    "cpu_seconds": 0,
    "steps": 0,
    "tokens_per_cpu_second": 0,
    "peak_mb": 0,
}
"""The figures of a method, with their digits."""
TITLES = {
    "gold": "gold",
    "reward": "reward",
    "kl": "KL, nats an answer",
    "distinct2": "distinct-2",
    "entropy": "entropy",
    "length": "length",
    "cpu_seconds": "CPU s of training",
    "steps": "steps",
    "tokens_per_cpu_second": "tokens a CPU s",
    "peak_mb": "memory, MB",
}
COLOURS = ("#d95f02", "#e6ab02", "#1b9e77", "#66a61e", "#7570b3", "#e7298a", "#a6761d")


def finals(runs: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Return the last figures of each method, of each seed in the order of the runs."""
    found: dict[str, list[Point]] = {SFT: []} | {f"best of {n}": [] for n in SIZES} | {name: [] for name in METHODS}
    for run in runs:
        name = run["work"]["method"]
        if name == BEST_OF:
            found[SFT].append(run["sft"] | {"kl": 0.0})
            for n, figures in run["best"].items():
                found[f"best of {n}"].append(figures)
        else:
            found[name].append(run["points"][-1] | run)
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table: the mean over seeds, and the standard deviation where there are several."""
    head = f"| method | seeds | {' | '.join(TITLES.values())} |\n| --- |{' ---: |' * (len(TITLES) + 1)}\n"
    rows = (
        f"| {name} | {len(points)} | {' | '.join(cell(points, of, digits) for of, digits in COLUMNS.items())} |\n"
        for name, points in finals(runs).items()
        if points
    )
    return head + "".join(rows)


def cell(points: list[Point], name: str, digits: int) -> str:
    values = [point[name] for point in points if name in point]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw gold over the square root of the KL: a line a method and seed, from the SFT model, and best of n."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = dict(zip(METHODS, COLOURS, strict=True))
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    starts = {run["work"]["seed"]: run["sft"]["gold"] for run in runs if run["work"]["method"] == BEST_OF}
    for run in runs:
        name, start = run["work"]["method"], (0.0, starts[run["work"]["seed"]])
        if name == BEST_OF:
            line(axes, [start, *map(root, run["best"].values())], "best of 4, 16", "x:", "black")
        else:
            line(axes, [start, *map(root, run["points"])], name, "o-", colours[name])
    axes.set(xlabel="√KL to the SFT model, nats an answer", ylabel="gold: positive minus negative words")
    axes.spines[["top", "right"]].set_visible(False)
    unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def root(point: Point) -> tuple[float, float]:
    """Return the place of a point in the picture; an estimate of the KL may be a little below 0."""
    return max(point["kl"], 0.0) ** 0.5, point["gold"]


def line(axes: Any, places: list[tuple[float, float]], name: str, style: str, colour: str) -> None:
    across, up = zip(*places, strict=True)
    axes.plot(across, up, style, color=colour, label=name, markersize=3.5, linewidth=1, alpha=0.8)
