"""Runs a command: reads its arguments, imports its stage and JAX, and turns every outcome into an exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jrlhf.cli.flags import plan_config, print_help, stage_config, tool_config
from jrlhf.config import Config, ConfigError, PlanConfig, required_value, stage_section
from jrlhf.config.gates import GatesFailed
from jrlhf.config.tools import (
    ExportConfig,
    GenerateConfig,
    QuickstartConfig,
    RankConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ShowConfig,
    VerifyConfig,
)
from jrlhf.system.errors import USAGE_ERRORS, reason_of
from jrlhf.system.interrupts import Interrupted, raise_signals
from jrlhf.system.terminal import complain

OK, FAILURE, USAGE, GATE, INTERRUPTED = 0, 1, 2, 3, 130

TOOLS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "generate": GenerateConfig,
    "sample": SampleConfig,
    "rank": RankConfig,
    "report": ReportConfig,
    "score": ScoreConfig,
    "data show": ShowConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
}
"""Configs of the commands that read no YAML."""


def run_reporting(command: str, argv: Sequence[str], *, about: str, resumes: str) -> int:
    """Run a command, and turn every error into an exit code and a line or two on stderr.

    ``about`` is the first line of its help, ``resumes`` a hint that follows the message of an interrupted command.
    """
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # The progress of tokenising a large file, and how many answers are sampled at once.
    for name in ("jrlhf.data", "jrlhf.sampling"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        if "-h" in argv or "--help" in argv:
            print_help(command, PlanConfig if command == "plan" else TOOLS.get(command, Config), about)
            return OK
        code = run(command, argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        where = f": {error}" if str(error) else ""
        complain(f"{command} interrupted{where}{resumes}")
        # Shells report 128 plus the number of the signal.
        return 128 + error.number if isinstance(error, Interrupted) else INTERRUPTED
    except GatesFailed as failed:
        complain(str(failed))
        return GATE
    except BrokenPipeError:
        # The reader of the output (head, less) has closed it; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        usage = isinstance(error, USAGE_ERRORS)
        if os.environ.get("JRLHF_DEBUG", "0") != "0":
            traceback.print_exc()
        elif usage:
            complain(reason_of(error))
        else:
            summary = reason_of(error).partition("\n")[0]
            complain(f"{command} failed: {summary}\nJRLHF_DEBUG=1 shows the traceback")
        return USAGE if usage else FAILURE


def run(command: str, argv: Sequence[str]) -> int:
    """Read the arguments, import the stage and JAX, and run it."""
    match command:
        case "generate":
            generate = tool_config(command, GenerateConfig, argv)
            from jrlhf.tools.inference import run_generate

            run_generate(generate)
        case "sample":
            sample = tool_config(command, SampleConfig, argv)
            from jrlhf.tools.inference import run_sample

            run_sample(sample)
        case "rank":
            rank = tool_config(command, RankConfig, argv)
            from jrlhf.rank.run import run_rank

            with raise_signals():
                run_rank(rank)
        case "score":
            score = tool_config(command, ScoreConfig, argv)
            from jrlhf.tools.inference import run_score

            run_score(score)
        case "data show":
            shown = tool_config(command, ShowConfig, argv)
            from jrlhf.tools.show import run_show

            run_show(shown)
        case "report":
            report = tool_config(command, ReportConfig, argv)
            from jrlhf.report import run_report
            from jrlhf.stages.table import STAGES

            print(run_report(report, STAGES))
        case "export":
            export = tool_config(command, ExportConfig, argv)
            from jrlhf.tools.export import run_export

            run_export(export)
            print(f"export done: {export.out}")
        case "verify":
            verify = tool_config(command, VerifyConfig, argv)
            from jrlhf.tools.verify import run_verify

            return OK if run_verify(verify) else FAILURE
        case "plan":
            plan = plan_config(argv)
            from jrlhf.plan import run_plan

            run_plan(plan)
        case "quickstart":
            quickstart = tool_config(command, QuickstartConfig, argv)
            from jrlhf.tools.quickstart import run_quickstart

            run_quickstart(quickstart)
        case _:
            run_training(command, stage_config(command, argv))
    return OK


def run_training(command: str, config: Config) -> None:
    """Run one stage of the recipe, or all of them, and print where the results are."""
    if command != "pipeline" and not required_value(config, command):
        path = f"{command}.{stage_section(config, command).required}"
        raise ConfigError(f"{path}: must be set, in the YAML (--config) or with --{path}")
    from jrlhf.parallel import is_first
    from jrlhf.parallel.launch import process_group
    from jrlhf.stages.pipeline import run_pipeline
    from jrlhf.stages.run import run_stage
    from jrlhf.stages.table import stage_named

    with process_group(**vars(config.distributed)):
        if command == "pipeline":
            run_pipeline(config)
        else:
            run_stage(stage_named(command), config)
        folder = Path(config.run) if command == "pipeline" else Path(config.run) / command
        if is_first():
            print(f"{command} done: {folder / 'summary.json'}")
