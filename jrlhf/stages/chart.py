"""Line charts as inline SVG, coloured by the style sheet of the page around them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """A ``<figure>``: lines over one pair of axes, and each line's last value. "" where no point is finite.

    Lines can be told apart without colour: the first is plain, those after it have dots.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    finite = {name: thin(points) for name, points in finite.items() if points}
    if not finite:
        return ""
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_span = min(xs), (max(xs) - min(xs)) or 1.0
    y_low, y_span = y_ticks[0], y_ticks[-1] - y_ticks[0]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / x_span
        up = (y - y_low) / y_span
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_y_tick(tick, at(x_low, tick)[1]) for tick in y_ticks]
    parts += [_x_tick(tick, at(tick, y_low)[0]) for tick in x_ticks if x_low <= tick <= max(xs)]
    for i, points in enumerate(finite.values()):
        places = [at(x, y) for x, y in points]
        parts.append(f'<polyline class="line{i}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if i or len(places) == 1:
            parts += [f'<circle class="dot{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    legend = " ".join(
        f'<span class="key{i}">{escape(name)} <b>{points[-1][1]:.4g}</b></span>'
        for i, (name, points) in enumerate(finite.items())
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}<br/>{legend}</figcaption>{picture}</figure>"


def thin(points: Points) -> Points:
    """At most ``MOST_POINTS`` of them, evenly chosen, the last among them."""
    every = math.ceil(len(points) / MOST_POINTS)
    return points[::-1][::every][::-1]


def ticks(low: float, high: float) -> list[float]:
    """Some round numbers from at most ``low`` to at least ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - max(abs(low), 1e-6) / 2, low + max(abs(low), 1e-6) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _y_tick(value: float, y: float) -> str:
    grid = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{grid}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _x_tick(value: float, x: float) -> str:
    anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
    return f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:.6g}</text>'
