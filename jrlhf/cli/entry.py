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
from jrlhf.system.interrupts import end_at_once, set_last_words, stop_listening
from jrlhf.system.terminal import complain, show_all_characters

__all__ = ["commands", "early", "main"]

OK, USAGE = 0, 2

RUNS = {
    "quickstart": "Run all three stages on a small model and film reviews, in minutes on a CPU.",
    "pipeline": "Run all stages of one YAML that are not done yet.",
}
"""Commands that run several stages, and their lines in the help."""
TOOLS = {
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
"""Commands that are neither a stage nor several of them."""
COMPUTING = ("generate", "sample", "score", "verify")
READING = (*COMPUTING, "plan", "data", "export")
"""Tools that read models, tokenizers or rows, possibly from the hub."""


def commands() -> dict[str, str]:
    """Return every command with its line in the help."""
    # The schema is a slow import: by now a signal ends the process cleanly.
    from jrlhf.config.stages import stage_sections

    return RUNS | {name: section.about for name, section in stage_sections().items()} | TOOLS


def trains(command: str) -> bool:
    """Return whether a command runs a stage or several; the same command resumes it."""
    return command in RUNS or (command not in TOOLS and command in commands())


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
        stop_listening()


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
    if (pair := " ".join(argv[:2])) in TOOLS:
        command, rest = pair, rest[1:]
    if command in (known := commands()):
        resumes = "; the same command resumes it" if trains(command) else ""
        set_last_words(f"{command} interrupted{resumes}")
        # A slow import comes last: by now a signal ends the process cleanly.
        from jrlhf.cli.dispatch import run_reporting

        return ended(run_reporting(command, rest, about=known[command], resumes=resumes))
    kind = "flag" if command.startswith("-") else "command"
    from jrlhf.config.methods import method_advice
    from jrlhf.system.suggest import did_you_mean

    advice = method_advice(command)
    complain(f"{command}: unknown {kind}{f'; {advice}' if advice else did_you_mean(command, known)}")
    return USAGE


def prepare_process(command: Sequence[str]) -> None:
    """Set the environment of commands that compute, before JAX is imported."""
    restart_in_utf8()
    warnings = []
    name = command[0] if command and not command[0].startswith("-") else ""
    training = bool(name) and name != "data" and trains(name)
    if training or name in COMPUTING:
        warnings.append(keep_compiled_programs())
        set_compiler_flags()
        if training:
            restart_with_huge_pages()
    if training or name in READING:
        warnings.append(keep_hub_files())
    if text := "; ".join(filter(None, warnings)):
        complain(text)
    if name == "plan":
        quiet_compiler()


def overview() -> str:
    """Return the text of `jrlhf --help`."""
    lines = "\n".join(f"  {name:<12}{summary}" for name, summary in commands().items())
    return f"""usage: jrlhf COMMAND [--config FILE.yaml] [--FLAG VALUE ...]

RLHF in JAX: SFT, a reward model from human rankings, and PPO, GRPO or DPO.

{lines}

jrlhf COMMAND --help lists every flag and its default. A flag is the path of a key in the YAML (--sft.optim.lr 1e-4).
jrlhf --version prints the version. Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 a gate failed,
130 or 143 interrupted. JRLHF_DEBUG=1 in the environment shows an error's traceback."""


def ended(code: int) -> int:
    """Return the exit code, after a failed process of several has left without waiting for the others."""
    peers = sys.modules.get("jrlhf.parallel.peers")
    if peers is not None:
        peers.leave_at_once(code)
    return code
