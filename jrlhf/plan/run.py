"""``jrlhf plan``: the stages of a config, each compiled for the devices asked for, and what came of it."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jrlhf.config import ConfigError, PlanConfig
from jrlhf.parallel import make_mesh
from jrlhf.parallel.devices.topology import parse_topology
from jrlhf.plan.parts import Site, Sized, StageFigures, StagePlan
from jrlhf.plan.ppo import ppo_stage
from jrlhf.plan.programs import Figures, device_bytes, measured
from jrlhf.plan.reward import reward_stage
from jrlhf.plan.sft import sft_stage
from jrlhf.plan.table import print_plan
from jrlhf.runs.folder import write_json
from jrlhf.system.terminal import show_all_characters

KEPT_BACK = 0.1
"""Of a device's memory: for the runtime, for programs, for what lies between arrays."""

MOST = 64
"""Times the config's rows that a fitting batch is looked for."""


def run_plan(config: PlanConfig) -> list[StageFigures]:
    """Plan the stages that have training data; print their figures, and write them where the config says."""
    show_all_characters()
    site = planned_site(config)
    stages: dict[str, tuple[Any, Callable[[PlanConfig, Site], Sized]]] = {
        "sft": (config.sft.data.train, sft_stage),
        "reward": (config.reward.data.train, reward_stage),
        "ppo": (config.ppo.prompts.train, ppo_stage),
    }
    asked = [make for data, make in stages.values() if data]
    if not asked:
        raise ConfigError("nothing to plan: set sft.data.train, reward.data.train or ppo.prompts.train")
    found = [plan_stage(make(config, site), site) for make in asked]
    print_plan(found, site)
    if config.out:
        mesh = dict(site.mesh.shape)
        stages_found = [asdict(stage) | {"programs": [p._asdict() for p in stage.programs]} for stage in found]
        write_json(Path(config.out), {"topology": site.topology.name, "mesh": mesh, "stages": stages_found})
    return found


def planned_site(config: PlanConfig) -> Site:
    """The devices, and the config's mesh over them."""
    try:
        topology = parse_topology(config.topology)
    except ValueError as error:
        raise ConfigError(f"topology: {error}") from error
    mesh = config.mesh
    devices = topology.devices()
    return Site(topology, make_mesh(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, devices=devices))


def plan_stage(sized: Sized, site: Site) -> StageFigures:
    """Compile a stage at the config's size, and at another to see how it grows."""
    memory = site.topology.memory()
    usable = None if memory is None else memory * (1 - KEPT_BACK)
    stage = sized.build(sized.rows)
    figures = compiled_figures(stage, sized, site)
    rows = None if usable is None else fitting_rows(sized, site, figures, usable)
    worst = max(figures, key=lambda program: program.peak)
    timed = [f for f, program in zip(figures, stage.programs, strict=True) if program.timed]
    seconds = [f.seconds for f in timed]
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
        sent=summed([f.sent for f in timed]),
        seconds=None if None in seconds else math.fsum(s for s in seconds if s is not None),
        memory=usable,
        fits=None if usable is None else worst.peak <= usable,
        fitting_batch=None if rows is None else stage.batch // sized.rows * rows,
        programs=figures,
    )


def compiled_figures(stage: StagePlan, sized: Sized, site: Site) -> list[Figures]:
    """Of all programs of a stage, two at a time: most of the time is XLA's, which needs one core each."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda p: measured(p, site.topology, site.mesh, sized.dtype), stage.programs))


def summed(parts: list[dict[str, float]]) -> dict[str, float]:
    """Key by key."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: math.fsum(part.get(name, 0.0) for part in parts) for name in names}


def fitting_rows(sized: Sized, site: Site, figures: list[Figures], usable: float) -> int:
    """The most rows a device may read at a time, at most ``MOST`` times the config's.

    A program's peak grows along a line, through its peak at two sizes. Were all of its temporaries in proportion to the
    rows, it would fit the least that it can fit; so a program that fits more by that than another does is not compiled
    again.
    """
    least = [sized.rows * max(0.0, usable - f.alive) / max(f.temporaries, 1.0) for f in figures]
    second = min(max(int(min(least)), 1), MOST * sized.rows)
    second = second if second != sized.rows else sized.rows + 1
    programs, limit = sized.build(second).programs, float(MOST * sized.rows)
    for number in sorted(range(len(figures)), key=least.__getitem__):
        one = figures[number]
        if least[number] >= limit:
            break
        other = measured(programs[number], site.topology, site.mesh, sized.dtype)
        slope = (other.peak - one.peak) / (second - sized.rows)
        if slope > 0:
            limit = min(limit, sized.rows + (usable - one.peak) / slope)
        elif one.peak > usable:
            limit = 0.0
    return max(0, math.floor(limit))
