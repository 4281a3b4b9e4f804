"""Runs a stage: preparation, training and export."""

from typing import Any

from jrlhf.config import Config, StageConfig, stage_section, to_yaml
from jrlhf.runs.exports import Companions, as_metadata, companions, write_adapter, write_export
from jrlhf.runs.folder import open_stage, pass_gates, plain_floats, write_json
from jrlhf.runs.inputs import StageInputs
from jrlhf.runs.origin import Origin
from jrlhf.runs.origin_check import changed_inputs, check_origin, finished_summary
from jrlhf.stages.stage import Prepared, Stage
from jrlhf.train.attempt import OnEvent, Outcome, no_event
from jrlhf.train.loop import run_loop
from jrlhf.train.site import Site
from jrlhf.train.start import mesh_of


def run_stage(stage: Stage, config: Config, *, on_event: OnEvent = no_event) -> dict[str, Any]:
    """Train, evaluate and export one stage; return its summary. A call after an interruption resumes the run.

    It writes ``<run>/<stage>/{config.yaml, origin.json, metrics.jsonl, events.jsonl, checkpoints/, hf/,
    summary.json}``, ``peft/`` if the stage trains adapters, ``gates.json`` if it has gates, and the stage's own files.
    The loop calls ``on_event`` with every event.
    """
    section = stage_section(config, stage.name)
    with open_stage(config, stage.name) as folder:
        inputs = stage.inputs(config)
        if summary := finished_summary(inputs, folder):
            return summary
        mesh = mesh_of(config)
        stage.check(config, mesh)
        site = Site(config, stage.name, folder, mesh, inputs.tokenizer)
        origin = check_origin(inputs, folder)
        prepared = stage.prepare(site, inputs)
        beside = companions(inputs.tokenizer, to_yaml(config), stop=stage.stop(config))
        outcome = run_loop(
            prepared.loop,
            prepared.state,
            folder=folder,
            log=section.log,
            checkpoint=section.checkpoint,
            metadata=as_metadata(beside) | {"origin": origin.as_json()},
            on_event=on_event,
        )
        return finish(site, section, inputs, origin, beside, prepared, outcome)


def finish(
    site: Site,
    section: StageConfig,
    inputs: StageInputs,
    origin: Origin,
    beside: Companions,
    prepared: Prepared,
    outcome: Outcome,
) -> dict[str, Any]:
    """Check the gates, export the model and write the summary, which marks the stage as finished."""
    folder = site.folder
    pass_gates(site.stage, section.gates, outcome.last, folder)
    export = prepared.export(outcome)
    # The base is the input folder: if that holds an adapter, the frozen weights already include the adapter.
    write_adapter(export.model, export.adapter, section.lora, folder / "peft", base=inputs.source, beside=beside)
    write_export(export.model, export.params, folder / "hf", beside=beside, dtype=section.export_dtype)
    summary = plain_floats(
        {
            **export.figures,
            "exported_step": outcome.step,
            "export_dtype": section.export_dtype,
            "seconds": outcome.seconds,
            **changed_inputs(origin),
        }
    )
    write_json(folder / "summary.json", summary)
    return summary
