"""The Markdown page and the picture of a comparison."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from peers.cases import WORKS, spec
from peers.results import Range, Result

LABELS = {"jrlhf": "jrlhf", "before": "jrlhf before", "trl": "TRL / Hugging Face", "trl-ppo": "TRL"}
LABELS |= {"tunix": "Tunix", "vllm": "vLLM"}
COLOURS = {"before": "#777777", "trl": "#d95f02", "trl-ppo": "#d95f02", "tunix": "#7570b3", "vllm": "#1b9e77"}
HEADER = (
    "| work | side | figure | seconds a call (low to high) | jrlhf is times as fast (low to high) | of the matmul peak "
    "| of the copy peak | first call, s | peak memory, MB | parameters: all, trained |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)
NOTES = """\
- Each side is a process of its own, started once a case; rounds go A B C A B C, and only one side works at a time.
  Seconds are medians of all timed calls. A ratio is of the medians within a round; given is the median of the rounds.
- Equal on all sides: sizes of the Llama (random weights), rows, tokens, AdamW (betas 0.9 and 0.999, eps 1e-8, no decay)
  after clipping by the global norm. Parameters differ by the bias of a scalar head and the scales that jrlhf keeps
  beside LoRA's factors.
- Model FLOPs count 2 a weight and token, 3 forward passes a training step (2 with LoRA: frozen weights get no
  gradient), attention halved for causality. Peaks are the better of XLA's and torch's (a square product of 2,048;
  256 MB read and written), measured in every round. Decoding must read all weights a step and the cache as far as it is
  filled, in the case's dtype: the share of the copy peak.
- The first call holds tracing and compilation (jrlhf's PPO: reading the models too). Peak memory is the process's.
- Answers that stop end at a length of each row's own (log-normal, in the middle 3/8 of the limit), the same on all
  sides; only their own tokens count.
"""


class Run(NamedTuple):
    """What the page says of itself."""

    machine: str
    command: str
    rounds: int
    missing: list[str]


def write(path: Path, run: Run, results: list[Result]) -> None:
    """The whole page, anew."""
    tables = f"{case_table(results)}\n{peaks_line(results)}\n"
    write_page(path, run, results, title="jrlhf and its peers", tables=tables, notes=NOTES + differences(results))


def write_page(
    path: Path, run: Run, results: list[Result], *, title: str, tables: str, notes: str, after: str = ""
) -> None:
    """A page of ``tables`` with the picture, and what stands ``after`` it, before the notes on how it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    absent = f" Not installed here, and left out: {', '.join(run.missing)}." if run.missing else ""
    path.write_text(
        f"# {title}\n\n"
        f"Date {datetime.date.today().isoformat()}; {run.machine}; rounds: {run.rounds}.{absent}\n\n"
        f"```\n{run.command}\n```\n\n{tables}\n"
        f"![How many times as fast as its peers jrlhf is]({path.with_suffix('.png').name})\n\n"
        f"{after}## How it was measured\n\n{notes}\n## Settings\n\n{settings(results)}",
        encoding="utf-8",
    )


def case_table(results: list[Result]) -> str:
    return table(HEADER, results, more_cells)


def more_cells(result: Result, side: str) -> list[str]:
    """What compare.py says of a side beside its speed."""
    found = result.sides[side]
    return [
        f"{result.share_of_matmul(side):.0%}",
        f"{result.share_of_copy(side):.0%}" if result.case.work.startswith("generate") else "",
        f"{found.facts['first_seconds']:.1f}",
        f"{found.peak_mb():,}",
        f"{found.facts['parameters']:,}, {found.facts['trained']:,}",
    ]


def table(header: str, results: list[Result], more: Callable[[Result, str], list[str]]) -> str:
    """A row for each side of each result: its speed and the cells of ``more``, or why there are none."""
    columns = header.splitlines()[1].count("|") - 1
    rows = []
    for result in results:
        case = result.case
        work = f"{WORKS[case.work].title}, {case.shape}, {case.dtype}"
        for side in result.sides:
            cells = [work, LABELS[side], *speed(result, side), *more(result, side)]
            rows.append(f"| {' | '.join(cells)} |\n")
        for side, reason in result.failed.items():
            rows.append(f"| {work} | {LABELS[side]} | none: {reason} |{' |' * (columns - 3)}\n")
    return header + "".join(rows)


def speed(result: Result, side: str) -> list[str]:
    """The figure of a side, its seconds, and how many times as fast jrlhf is."""
    times = spread(result.ratio(side), 2) if side != "jrlhf" and "jrlhf" in result.sides else ""
    return [figure(result, side), spread(result.sides[side].seconds(), 3), times]


def figure(result: Result, side: str) -> str:
    found, unit = result.sides[side], WORKS[result.case.work].unit
    if unit != "iterations":
        return f"{result.figure(side):,.5g} {unit}/s"
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.phases().items())
    return f"{found.seconds().median:.1f} s" + (f" ({phases})" if phases else "")


def spread(values: Range, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


def peaks_line(results: list[Result]) -> str:
    """What the peaks were while each dtype was measured."""
    lines = []
    for dtype in dict.fromkeys(result.case.dtype for result in results):
        peaks = [peak for result in results if result.case.dtype == dtype for peak in result.peaks]
        product, copy = (Range.of([value / 1e9 for value in values]) for values in zip(*peaks, strict=True))
        lines.append(f"{dtype}: matmul {spread(product, 0)} GFLOP/s, copy {spread(copy, 0)} GB/s")
    return f"Peaks: {'; '.join(lines)}."


def differences(results: list[Result]) -> str:
    """Sides whose parameters are not as many as jrlhf's."""
    lines: dict[str, None] = {}
    for result in results:
        work = f"{WORKS[result.case.work].title}, {result.case.shape}"
        for side in result.sides if "jrlhf" in result.sides else ():
            total, trained = result.parameter_difference(side)
            if total or trained:
                lines[f"- {work}: {LABELS[side]} has {total:+,} parameters in all, {trained:+,} trained ones.\n"] = None
    return "".join(lines)


def settings(results: list[Result]) -> str:
    """The sizes of each work, and of each side its versions, how it computes and the environment's variables."""
    sizes: dict[str, None] = {}
    works: dict[str, list[str]] = {}
    for result in results:
        told, name = spec(result.case), f"{WORKS[result.case.work].title}, {result.case.shape}"
        sizes[f"- {name}: {', '.join(f'{size} {told[size]}' for size in SIZES if told.get(size))}.\n"] = None
        for side, found in result.sides.items():
            variables = f"; `{found.variables}`" if found.variables else ""
            how = f"- {LABELS[side]} ({found.facts['versions']}): {found.facts['setting']}{variables}"
            works.setdefault(how, []).append(f"{name}, {result.case.dtype}")
    return "".join(sizes) + "\n" + "".join(f"{how}. {'; '.join(names)}.\n" for how, names in sorted(works.items()))


SIZES = ("rows", "samples", "slots", "length", "completions", "rank", "prompt", "new", "epochs")


def draw(path: Path, results: list[Result]) -> None:
    """Bars of jrlhf's speed as a multiple of each peer's, with the range over the rounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bars = [
        (f"{WORKS[result.case.work].title}, {result.case.shape}, {result.case.dtype}", side, result.ratio(side))
        for result in results
        if "jrlhf" in result.sides
        for side in result.sides
        if side != "jrlhf"
    ]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(bars)), layout="constrained")
    for place, (_, side, ratio) in enumerate(bars):
        error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(place, ratio.median, xerr=error, color=COLOURS[side], ecolor="#444444", capsize=2, height=0.7)
        axes.annotate(
            f"{ratio.median:.2f}", (ratio.high, place), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [f"{title}: {LABELS[side]}" for title, side, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("jrlhf is so many times as fast (bar: median, whisker: range of the rounds)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
