"""`jrlhf <command>`: YAML and flags in, one stage out. JAX is imported only once the arguments have been read.

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
RESUMABLE = ("pipeline", "sft", "reward", "ppo", "quickstart")
COMPUTING = (*RESUMABLE, "generate", "sample", "score", "verify")
READING = (*COMPUTING, "plan", "data", "export")
"""Commands that read models, tokenizers or rows, and so may read them from the hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name."""
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
    """`main` once the process is ready for it."""
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
        # Imported only here, as all that it takes is slow: by now a signal ends the process in good order.
        from jrlhf.cli.commands import run_reporting

        return ended(run_reporting(command, rest, about=COMMANDS[command], resumes=resumes))
    kind = "flag" if command.startswith("-") else "command"
    from jrlhf.system.suggest import did_you_mean

    complain(f"{command}: unknown {kind}{did_you_mean(command, COMMANDS)}")
    return USAGE


def prepare_process(command: Sequence[str]) -> None:
    """Set what commands that compute profit from, before JAX is imported."""
    restart_in_utf8()
    troubles = []
    if command and command[0] in COMPUTING:
        troubles.append(keep_compiled_programs())
        set_compiler_flags()
        if command[0] in RESUMABLE:
            restart_with_huge_pages()
    if command and command[0] in READING:
        troubles.append(keep_hub_files())
    if said := "; ".join(filter(None, troubles)):
        complain(said)
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


def ended(code: int) -> int:
    """The exit code; a process of several that failed must not wait for the others on its way out."""
    peers = sys.modules.get("jrlhf.parallel.peers")
    if peers is not None:
        peers.leave_at_once(code)
    return code
