"""`jrlhf <command>`: YAML and flags in, one stage out. JAX is imported only once the arguments have been read.

Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 a gate failed, 130 or 143 interrupted.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jrlhf import __version__
from jrlhf.cli_args import STAGES, plan_config, print_help, stage_config, tool_config
from jrlhf.config import Config, PlanConfig, Sources
from jrlhf.config_io import ConfigError
from jrlhf.config_tools import (
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
from jrlhf.environment import keep_compiled_programs, quiet_compiler, restart_with_huge_pages, set_compiler_flags
from jrlhf.gates import GatesFailed
from jrlhf.lock import RunLocked
from jrlhf.stages.signals import Interrupted
from jrlhf.suggest import did_you_mean

OK, FAILURE, USAGE, GATE, INTERRUPTED = 0, 1, 2, 3, 130

COMMANDS = {
    "quickstart": "See all three stages at work on a small model and film reviews, in minutes on a CPU.",
    "pipeline": "Run the stages of one YAML, skipping what is done.",
    "sft": "Fine-tune a model on answers.",
    "reward": "Train a reward model on people's rankings.",
    "ppo": "Optimise the policy on the reward under a KL penalty.",
    "plan": "Memory, traffic and time of every stage on devices that need not be there.",
    "generate": "Answer a file of prompts with a Hugging Face folder or a run.",
    "sample": "Draw several answers to each prompt, as tasks for people to rank.",
    "rank": "Let people rank answers in the browser; export what they decided, report how far they agree.",
    "score": "Score a file of answers with a reward model.",
    "data show": "Show rows as the model sees them, and count what is odd.",
    "report": "A run, or two side by side, on one page that opens without a network.",
    "export": "Write a run's checkpoint as a Hugging Face folder.",
    "verify": "Check the invariants of RLHF on a model, each with its figure.",
}
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
"""Commands that read no YAML."""
RESUMABLE = (*STAGES, "quickstart")
COMPUTING = (*RESUMABLE, "generate", "sample", "score", "verify")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name."""
    if argv is None:
        prepare_process(sys.argv[1:2])
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # How far the tokenising of a large file is.
    logging.getLogger("jrlhf.data").setLevel(logging.INFO)
    match argv:
        case []:
            print(overview(), file=sys.stderr)
            return USAGE
        case ["-h" | "--help", *_]:
            print(overview())
            return OK
        case ["--version", *_]:
            print(f"jrlhf {__version__}")
            return OK
    command, *rest = argv
    if (pair := " ".join(argv[:2])) in COMMANDS:
        command, rest = pair, rest[1:]
    if command in COMMANDS:
        return ended(run_reporting(command, rest))
    kind = "flag" if command.startswith("-") else "command"
    complain(f"{command}: unknown {kind}{did_you_mean(command, COMMANDS)}")
    return USAGE


def prepare_process(command: Sequence[str]) -> None:
    """Set what commands that compute profit from, before JAX is imported."""
    if command and command[0] in COMPUTING:
        keep_compiled_programs()
        set_compiler_flags()
        if command[0] in RESUMABLE:
            restart_with_huge_pages()
    if command and command[0] == "plan":
        quiet_compiler()


def overview() -> str:
    """What `jrlhf --help` prints."""
    lines = "\n".join(f"  {name:<12}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: jrlhf COMMAND [--config FILE.yaml] [--FLAG VALUE ...]

RLHF in JAX: SFT, a reward model from human rankings, and PPO under a KL penalty.

{lines}

jrlhf COMMAND --help lists every flag with its default; a flag is the path of a key in the YAML (--sft.optim.lr 1e-4).
jrlhf --version prints the version. Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 a gate failed,
130 or 143 interrupted. JRLHF_DEBUG=1 in the environment shows an error's traceback."""


def run_reporting(command: str, argv: Sequence[str]) -> int:
    """Run a command, and turn whatever ends it into an exit code and a line or two on stderr."""
    try:
        if "-h" in argv or "--help" in argv:
            print_help(command, PlanConfig if command == "plan" else TOOLS.get(command, Config), COMMANDS[command])
            return OK
        code = run(command, argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        where = f": {error}" if str(error) else ""
        complain(f"{command} interrupted{where}{'; the same command resumes it' if command in RESUMABLE else ''}")
        # 128 and the signal's number, as shells have it.
        return 128 + error.number if isinstance(error, Interrupted) else INTERRUPTED
    except GatesFailed as failed:
        complain(str(failed))
        return GATE
    except BrokenPipeError:
        # Whoever read the output (head, less) has seen enough; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        usage = is_usage_error(error)
        if os.environ.get("JRLHF_DEBUG", "0") != "0":
            traceback.print_exc()
        elif usage:
            complain(message_of(error))
        else:
            summary = message_of(error).partition("\n")[0]
            complain(f"{command} failed: {type(error).__name__}: {summary}\nJRLHF_DEBUG=1 shows the traceback")
        return USAGE if usage else FAILURE


def run(command: str, argv: Sequence[str]) -> int:
    """Read the arguments, then import the stage, and JAX with it, and run it."""
    match command:
        case "generate":
            generate = tool_config(command, GenerateConfig, argv)
            from jrlhf.stages.inference import run_generate

            run_generate(generate)
        case "sample":
            sample = tool_config(command, SampleConfig, argv)
            from jrlhf.stages.inference import run_sample

            run_sample(sample)
        case "rank":
            rank = tool_config(command, RankConfig, argv)
            from jrlhf.rank.run import run_rank

            run_rank(rank)
        case "score":
            score = tool_config(command, ScoreConfig, argv)
            from jrlhf.stages.inference import run_score

            run_score(score)
        case "data show":
            shown = tool_config(command, ShowConfig, argv)
            from jrlhf.stages.show import run_show

            run_show(shown)
        case "report":
            report = tool_config(command, ReportConfig, argv)
            from jrlhf.stages.report import run_report

            print(run_report(report))
        case "export":
            export = tool_config(command, ExportConfig, argv)
            from jrlhf.stages.export import run_export

            run_export(export)
        case "verify":
            verify = tool_config(command, VerifyConfig, argv)
            from jrlhf.stages.verify import run_verify

            return OK if run_verify(verify) else FAILURE
        case "plan":
            plan = plan_config(argv)
            from jrlhf.stages.plan import run_plan

            run_plan(plan)
        case "quickstart":
            quickstart = tool_config(command, QuickstartConfig, argv)
            from jrlhf.stages.quickstart import run_quickstart

            run_quickstart(Path(quickstart.out), quickstart.seed, quickstart.preset)
        case _:
            run_stage(command, stage_config(command, argv))
    return OK


def ended(code: int) -> int:
    """The exit code; a process of several that failed must not wait for the others on its way out."""
    parallel = sys.modules.get("jrlhf.parallel")
    if parallel is not None:
        parallel.leave_at_once(code)
    return code


def run_stage(command: str, config: Config) -> None:
    """One stage of the recipe, or all of them; ends with where its results are."""
    require_data(command, config)
    from jrlhf.parallel import is_first, joined

    with joined(**vars(config.distributed)):
        run_joined(command, config)
        folder = Path(config.run) if command == "pipeline" else Path(config.run) / command
        if is_first():
            print(f"{command} done: {folder / 'summary.json'}")


def require_data(command: str, config: Config) -> None:
    match command:
        case "sft":
            require(config.sft.data.train, "sft.data.train")
        case "reward":
            require(config.reward.data.train, "reward.data.train")
        case "ppo":
            require(config.ppo.prompts.train, "ppo.prompts.train")


def run_joined(command: str, config: Config) -> None:
    match command:
        case "sft":
            from jrlhf.stages.sft import run_sft

            run_sft(config)
        case "reward":
            from jrlhf.stages.reward import run_reward

            run_reward(config)
        case "ppo":
            from jrlhf.stages.ppo import run_ppo

            run_ppo(config)
        case _:
            from jrlhf.stages.pipeline import run_pipeline

            run_pipeline(config)


def require(value: Sources, path: str) -> None:
    if not value:
        raise ConfigError(f"{path}: is empty; set it in the YAML (--config) or with --{path}")


def is_usage_error(error: Exception) -> bool:
    """What the user can put right: a ValueError that jrlhf itself raises, a missing file, a run in use.

    A ValueError from inside a library, or from an array operation, is a failure of the program instead.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | ConfigError | RunLocked):
        return True
    frames = [*traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, ValueError) or not frames:
        return False
    own = str(frames[-1][0].f_globals.get("__name__", "")).startswith("jrlhf.")
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return own and line.startswith("raise")


def message_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def complain(message: str) -> None:
    for line in message.split("\n"):
        print(f"jrlhf: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
