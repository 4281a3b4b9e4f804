"""``jrlhf plan`` compiles the stages of a config for the devices of a topology and prints their figures."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from jrlhf.config import ConfigError, PlanConfig, pipeline_stages, stage_sections
from jrlhf.parallel import make_mesh
from jrlhf.parallel.devices.compilers import compiler_of, described_topology
from jrlhf.parallel.devices.topology import Topology, parse_topology
from jrlhf.plan.parts import StageFigures
from jrlhf.plan.programs import Figures, program_figures
from jrlhf.plan.table import print_plan
from jrlhf.runs.folder import write_json
from jrlhf.stages.table import stage_named
from jrlhf.system.errors import UsageError
from jrlhf.system.terminal import complain, show_all_characters
from jrlhf.train.programs import Sized, StagePlan, Target, device_bytes

MAX_ROW_FACTOR = 64
"""Upper limit of a fitting batch, as a multiple of the config's rows."""


def run_plan(config: PlanConfig) -> list[StageFigures]:
    """Plan the stages that have training data, print their figures and write them to ``config.out``."""
    show_all_characters()
    target = planned_target(config)
    requested = [stage_named(name) for name in pipeline_stages(config)]
    if not requested:
        fields = [f"{name}.{section.required}" for name, section in stage_sections().items()]
        raise ConfigError(f"nothing to plan: set {', '.join(fields[:-1])} or {fields[-1]}")
    complain(f"{target.topology.name}: {compiler_of(target.topology)} compiles, which may take a minute a program")
    # A mistake in a later stage shows before any stage is compiled.
    planned = [stage.plan(config, target) for stage in requested]
    stages = [plan_stage(sized, target) for sized in planned]
    print_plan(stages, target)
    if config.out:
        mesh = dict(target.mesh.shape)
        records = [asdict(stage) | {"programs": [p._asdict() for p in stage.programs]} for stage in stages]
        compiler = compiler_of(target.topology)
        figures = {"topology": target.topology.name, "mesh": mesh, "compiler": compiler, "stages": records}
        write_json(Path(config.out), figures)
    return stages


def planned_target(config: PlanConfig) -> Target:
    """Return the devices of the config's topology, and its mesh over them."""
    try:
        topology = parse_topology(config.topology)
    except ValueError as error:
        raise ConfigError(f"topology: {error}") from error
    if topology.simulated and topology.chip is not None and config.compile != "simulated":
        topology = with_compiler(topology, required=config.compile == "device")
    mesh = config.mesh
    devices = topology.devices()
    return Target(topology, make_mesh(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, devices=devices))


def with_compiler(topology: Topology, *, required: bool) -> Topology:
    """Return the topology with its own compiler; unless it is ``required``, without one where there is none."""
    try:
        return described_topology(topology)
    except UsageError as error:
        if required:
            raise ConfigError(f"compile: device: {error}") from error
        complain(f"no compiler for these devices, so the CPU's compiles for simulated ones: {error}")
        return topology


def plan_stage(sized: Sized, target: Target) -> StageFigures:
    """Compile a stage at the config's size, and at a second size to find the largest batch that fits."""
    usable = target.topology.usable_memory()
    stage = sized.build(sized.rows)
    figures = stage_figures(stage, sized, target)
    rows = None if usable is None else fitting_rows(sized, target, figures, usable)
    worst = max(figures, key=lambda program: program.peak)
    timed = [f for f, program in zip(figures, stage.programs, strict=True) if program.timed]
    return StageFigures(
        name=stage.name,
        batch_key=stage.batch_key,
        batch=stage.batch,
        held={name: device_bytes(tree) for name, tree in stage.held.items()},
        cache=max(f.cache for f in figures),
        temporaries=worst.temporaries,
        peak=worst.peak,
        peak_in=worst.name,
        flops=sum(f.flops for f in timed),
        sent=sum_by_key([f.sent for f in timed]),
        seconds=sum_of_known([f.seconds for f in timed]),
        estimate=sum_of_known([f.estimate for f in timed]),
        memory=usable,
        fits=None if usable is None else worst.peak <= usable,
        fitting_batch=None if rows is None else stage.batch // sized.rows * rows,
        programs=figures,
    )


def stage_figures(stage: StagePlan, sized: Sized, target: Target) -> list[Figures]:
    """Compile all programs of a stage, two at a time: each compilation keeps one core busy."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda p: program_figures(p, target.topology, target.mesh, sized.dtype), stage.programs))


def sum_by_key(parts: list[dict[str, float]]) -> dict[str, float]:
    """Add up dicts of numbers key by key."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: math.fsum(part.get(name, 0.0) for part in parts) for name in names}


def sum_of_known(parts: list[float | None]) -> float | None:
    """Add up numbers; None if one of them is unknown."""
    return None if None in parts else math.fsum(part for part in parts if part is not None)


def fitting_rows(sized: Sized, target: Target, figures: list[Figures], usable: float) -> int:
    """Return the largest number of rows that a device can read at a time, up to ``MAX_ROW_FACTOR`` times the config's.

    The estimate is linear in the rows, through a program's peaks at two sizes. A lower bound follows if all temporaries
    are proportional to the rows; a program whose bound exceeds the limit of another is not compiled again.
    """
    least = [sized.rows * max(0.0, usable - f.alive) / max(f.temporaries, 1.0) for f in figures]
    second = min(max(int(min(least)), 1), MAX_ROW_FACTOR * sized.rows)
    second = second if second != sized.rows else sized.rows + 1
    programs, limit = sized.build(second).programs, float(MAX_ROW_FACTOR * sized.rows)
    for number in sorted(range(len(figures)), key=least.__getitem__):
        one = figures[number]
        if least[number] >= limit:
            break
        other = program_figures(programs[number], target.topology, target.mesh, sized.dtype)
        slope = (other.peak - one.peak) / (second - sized.rows)
        if slope > 0:
            limit = min(limit, sized.rows + (usable - one.peak) / slope)
        elif one.peak > usable:
            limit = 0.0
    return max(0, math.floor(limit))
