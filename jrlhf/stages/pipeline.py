"""The pipeline runs the stages of one config in order and skips finished ones."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jrlhf import __version__
from jrlhf.config import Config, ConfigError, pipeline_stages, stage_section, stage_sections
from jrlhf.config.gates import GatesFailed
from jrlhf.parallel import is_first
from jrlhf.parallel.hosts import first_goes_ahead
from jrlhf.report import write_report
from jrlhf.runs.folder import refuse_links_out, write_json
from jrlhf.runs.trackers import make_trackers
from jrlhf.stages.run import run_stage
from jrlhf.stages.table import STAGES, stage_named
from jrlhf.train.guards import GuardStop

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def run_pipeline(config: Config) -> dict[str, Any]:
    """Run each stage that has training data; write ``<run>/{summary.json, report.html}`` and return the summary.

    Each stage contributes its own summary; ``seconds`` are wall times over all attempts. If a gate or a guard ends the
    run, the pipeline writes the report but no summary.
    """
    stages = [stage_named(name) for name in pipeline_stages(config)]
    if not stages:
        fields = [f"{name}.{section.required}" for name, section in stage_sections().items()]
        raise ConfigError(f"nothing to run: set {', '.join(fields[:-1])} or {fields[-1]}")
    folder = Path(config.run)
    refuse_links_out(folder, *(folder / name for name in ("summary.json", "summary.json.partial", "report.html")))
    # A missing tracker of the last stage must raise an error now, not after the first stages.
    with first_goes_ahead("find its trackers"):
        if is_first():
            for stage in stages:
                make_trackers(stage_section(config, stage.name).log)
    start = time.perf_counter()
    try:
        summary: dict[str, Any] = {stage.name: run_stage(stage, config) for stage in stages}
    except (GatesFailed, GuardStop):
        if is_first():
            write_report(folder, None, STAGES)
        raise
    seconds = {name: part["seconds"] for name, part in summary.items()}
    # A stage that had finished before keeps its time, so the total is at least the sum over the stages.
    seconds["total"] = max(time.perf_counter() - start, sum(seconds.values()))
    summary |= {"seconds": seconds, "seed": config.seed, "hardware": hardware(), "versions": versions()}
    write_json(folder / "summary.json", summary)
    if is_first():
        write_report(folder, summary, STAGES)
    return summary


def hardware() -> dict[str, str]:
    """Return the devices and cores of this run, for the summary."""
    devices = jax.devices()
    return {"devices": f"{len(devices)} x {devices[0].device_kind}", "cores": str(os.cpu_count())}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages, for the summary."""
    return {"jrlhf": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
