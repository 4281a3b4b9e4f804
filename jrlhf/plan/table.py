"""The tables that ``jrlhf plan`` prints."""

import math

from rich.console import Console
from rich.table import Table

from jrlhf.parallel.devices.compilers import compiler_of
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
    row("seconds a step: estimate", *(duration(stage.estimate, empty="") for stage in stages))
    row("seconds a step: roofline", *(duration(stage.seconds) for stage in stages))
    return table


def program_table(stages: list[StageFigures]) -> Table:
    """Build the table with a row per program."""
    programs = [(stage.name, program) for stage in stages for program in stage.programs]
    estimated = any(program.estimate is not None for _, program in programs)
    table = Table("program", "peak", "temporaries", "sent", "PFLOPs", *(["estimate"] if estimated else []), "roofline")
    for stage, program in programs:
        table.add_row(
            f"{stage} {program.name}",
            gigabytes(program.peak),
            gigabytes(program.temporaries),
            gigabytes(math.fsum(program.sent.values()), empty=""),
            f"{program.flops / 1e15:,.3g}" if program.flops else "",
            *([duration(program.estimate, empty="")] if estimated else []),
            duration(program.seconds, empty=""),
        )
    return table


def gigabytes(size: float | None, empty: str = "0") -> str:
    """Format bytes as GB; ``empty`` stands for 0."""
    if size is None:
        return "unknown"
    return f"{size / GB:,.3g}" if size else empty


def duration(seconds: float | None, empty: str = "unknown") -> str:
    """Format seconds; ``empty`` stands for unknown ones."""
    return empty if seconds is None else f"{seconds:,.3g}"


def verdict(stage: StageFigures) -> str:
    """Format whether a stage fits into memory."""
    if stage.fits is None:
        return "unknown"
    return "[green]yes[/]" if stage.fits else f"[red]no: needs {gigabytes(stage.peak)} of {gigabytes(stage.memory)}[/]"


def fitting(stage: StageFigures) -> str:
    """Format the largest batch that fits into memory."""
    if stage.fitting_batch is None:
        return "unknown"
    return f"{stage.fitting_batch:,}" if stage.fitting_batch else "none"


def assumptions(target: Target) -> list[str]:
    """Describe the assumptions behind the figures."""
    topology = target.topology
    limit = "its compiler's limit" if topology.chip and topology.chip.usable else "nine tenths of it"
    lines = [
        f"GB (1e9 bytes) a device: programs as {compiler_of(topology)} compiles them, on rows of full length. "
        "Temporaries: activations, gradients and cache of the program with the highest peak. Of a device's memory may "
        f"be used: {limit}. Fitting batch: an estimate, linear through two sizes, with the same number of slices.",
        "PFLOPs: all devices together. Roofline: the longer of arithmetic and memory reads, plus traffic, "
        f"at {ACHIEVED_FRACTION:.0%} of the data sheet's rates; a CPU's rates are measured, and its traffic is free.",
    ]
    if topology.described:
        lines.append(
            "Estimate: seconds of the compiled program by its compiler's own figures, not a measurement; without "
            "seconds between programs."
        )
    return lines
