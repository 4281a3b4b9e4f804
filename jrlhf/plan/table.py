"""The tables that ``jrlhf plan`` prints."""

import math

from rich.console import Console
from rich.table import Table

from jrlhf.plan.parts import StageFigures
from jrlhf.plan.programs import ACHIEVED_FRACTION
from jrlhf.train.programs import Target

GB = 1e9
HELD_LABELS = {
    "trained": "parameters",
    "optimizer": "optimizer",
    "average": "policy's average",
    "loaded": "other models",
}


def print_plan(stages: list[StageFigures], target: Target) -> None:
    """Print a table with a column per stage, a table with a row per program, and the assumptions."""
    console = Console(highlight=False)
    mesh = ", ".join(f"{axis} {size}" for axis, size in target.mesh.shape.items())
    console.print(f"{target.topology.name}: {target.topology.size} devices ({mesh})")
    console.print(stage_table(stages))
    console.print(program_table(stages))
    for line in assumptions(target):
        console.print(line)


def stage_table(stages: list[StageFigures]) -> Table:
    """Build the table with a column per stage."""
    table = Table("GB a device", *(stage.name for stage in stages))

    def row(name: str, *cells: str) -> None:
        if any(cells):
            table.add_row(name, *cells)

    for name, label in HELD_LABELS.items():
        row(label, *(gigabytes(stage.held[name], empty="") for stage in stages))
    row("KV cache", *(gigabytes(stage.cache, empty="") for stage in stages))
    row("temporaries", *(gigabytes(stage.temporaries) for stage in stages))
    row("peak", *(f"{gigabytes(stage.peak)} ({stage.peak_in})" for stage in stages))
    row("may be used", *(gigabytes(stage.memory) for stage in stages))
    row("fits", *(verdict(stage) for stage in stages))
    row("batch", *(f"{stage.batch:,}" for stage in stages))
    row("fitting batch", *(fitting(stage) for stage in stages))
    row("PFLOPs a step", *(f"{stage.flops / 1e15:,.3g}" for stage in stages))
    for axes in dict.fromkeys(axes for stage in stages for axes in stage.sent):
        row(f"sent: {axes}", *(gigabytes(stage.sent.get(axes, 0.0), empty="") for stage in stages))
    row("seconds a step", *("unknown" if stage.seconds is None else f"{stage.seconds:,.3g}" for stage in stages))
    return table


def program_table(stages: list[StageFigures]) -> Table:
    """Build the table with a row per program."""
    table = Table("program", "peak", "temporaries", "sent", "PFLOPs", "seconds")
    for stage in stages:
        for program in stage.programs:
            table.add_row(
                f"{stage.name} {program.name}",
                gigabytes(program.peak),
                gigabytes(program.temporaries),
                gigabytes(math.fsum(program.sent.values()), empty=""),
                f"{program.flops / 1e15:,.3g}" if program.flops else "",
                "" if program.seconds is None else f"{program.seconds:,.3g}",
            )
    return table


def gigabytes(size: float | None, empty: str = "0") -> str:
    """Format bytes as GB; ``empty`` stands for 0."""
    if size is None:
        return "unknown"
    return f"{size / GB:,.3g}" if size else empty


def verdict(stage: StageFigures) -> str:
    """Format whether a stage fits into memory."""
    if stage.fits is None:
        return "unknown"
    return "[green]yes[/]" if stage.fits else "[red]no[/]"


def fitting(stage: StageFigures) -> str:
    """Format the largest batch that fits into memory."""
    if stage.fitting_batch is None:
        return "unknown"
    return f"{stage.fitting_batch:,}" if stage.fitting_batch else "none"


def assumptions(target: Target) -> tuple[str, str]:
    """Describe the assumptions behind the figures."""
    how = "here" if target.topology.real else "for simulated devices of the CPU"
    return (
        f"GB (1e9 bytes) a device: programs as XLA compiles them {how}, on rows of full length. Temporaries: "
        "activations, gradients and cache of the program with the highest peak. A tenth of the memory is reserved. "
        "Fitting batch: the estimate is linear through two sizes, with the same number of slices.",
        "PFLOPs: all devices together. Seconds: the longer of arithmetic and memory reads, plus traffic, "
        f"at {ACHIEVED_FRACTION:.0%} of the data sheet's rates; a CPU's rates are measured, and its traffic is free.",
    )
