"""Entry point of `jrlhf <command>`. It imports JAX only after it has read the arguments.

Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 a gate failed, 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence

from jrlhf import __version__
from jrlhf.system import early
from jrlhf.system.environment import (
    keep_compiled_programs,
    keep_hub_files,
    quiet_compiler,
    restart_in_utf8,
    restart_with_huge_pages,
    set_compiler_flags,
)
from jrlhf.system.interrupts import end_at_once, no_longer, say_at_the_end
from jrlhf.system.terminal import complain, show_all_characters

__all__ = ["COMMANDS", "early", "main"]

OK, USAGE = 0, 2

COMMANDS = {
    "quickstart": "Run all three stages on a small model and film reviews, in minutes on a CPU.",
    "pipeline": "Run all stages of one YAML that are not done yet.",
    "sft": "Fine-tune a model on example answers.",
    "reward": "Train a reward model on human rankings.",
    "ppo": "Optimise the policy on the reward under a KL penalty.",
    "plan": "Estimate memory, traffic and time of every stage, without its devices.",
    "generate": "Answer a file of prompts with a trained model.",
    "sample": "Sample several answers to each prompt, as tasks for people to rank.",
    "rank": "Let people rank answers in the browser; export their decisions, report their agreement.",
    "score": "Score a file of answers with a reward model.",
    "data show": "Show rows as the model sees them, and count odd ones.",
    "report": "Show a run, or two side by side, on one page that opens without a network.",
    "export": "Write a run's checkpoint as a Hugging Face folder.",
    "verify": "Check the invariants of RLHF on a model, and print their figures.",
}
RESUMABLE = ("pipeline", "sft", "reward", "ppo", "quickstart")
COMPUTING = (*RESUMABLE, "generate", "sample", "score", "verify")
READING = (*COMPUTING, "plan", "data", "export")
"""Commands that read models, tokenizers or rows, possibly from the hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` excludes the name of the program."""
    if argv is not None:
        return run_command([*argv])
    end_at_once()
    show_all_characters()
    try:
        prepare_process(sys.argv[1:2])
        return run_command(sys.argv[1:])
    finally:
        no_longer()


def run_command(argv: list[str]) -> int:
    """Run one command in a process that is ready for it."""
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
        resumes = "; the same command resumes it" if command in RESUMABLE else ""
        say_at_the_end(f"{command} interrupted{resumes}")
        # A slow import comes last: by now a signal ends the process cleanly.
        from jrlhf.cli.commands import run_reporting

        return ended(run_reporting(command, rest, about=COMMANDS[command], resumes=resumes))
    kind = "flag" if command.startswith("-") else "command"
    from jrlhf.system.suggest import did_you_mean

    complain(f"{command}: unknown {kind}{did_you_mean(command, COMMANDS)}")
    return USAGE


def prepare_process(command: Sequence[str]) -> None:
    """Set the environment of commands that compute, before JAX is imported."""
    restart_in_utf8()
    warnings = []
    if command and command[0] in COMPUTING:
        warnings.append(keep_compiled_programs())
        set_compiler_flags()
        if command[0] in RESUMABLE:
            restart_with_huge_pages()
    if command and command[0] in READING:
        warnings.append(keep_hub_files())
    if text := "; ".join(filter(None, warnings)):
        complain(text)
    if command and command[0] == "plan":
        quiet_compiler()


def overview() -> str:
    """Return the text of `jrlhf --help`."""
    lines = "\n".join(f"  {name:<12}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: jrlhf COMMAND [--config FILE.yaml] [--FLAG VALUE ...]

RLHF in JAX: SFT, a reward model from human rankings, and PPO under a KL penalty.

{lines}

jrlhf COMMAND --help lists every flag and its default. A flag is the path of a key in the YAML (--sft.optim.lr 1e-4).
jrlhf --version prints the version. Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 a gate failed,
130 or 143 interrupted. JRLHF_DEBUG=1 in the environment shows an error's traceback."""


def ended(code: int) -> int:
    """Return the exit code, after a failed process of several has left without waiting for the others."""
    parallel = sys.modules.get("jrlhf.parallel")
    if parallel is not None:
        parallel.leave_at_once(code)
    return code
