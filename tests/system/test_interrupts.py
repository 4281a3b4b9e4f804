"""ctrl-C and SIGTERM at any moment of a command: its exit code, one line, at once, and no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
INTERPRETER = 0.15
"""Seconds in which the interpreter itself may still be on its way to the first line of ours."""


def interrupted(
    command: list[str], *, after: float | None, number: signal.Signals, cwd: Path
) -> tuple[int, str, float]:
    """Exit code, stderr, and the seconds from the signal to the end. ``after`` None: it sends one to itself."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        if after is not None:
            time.sleep(after)
            process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors, time.monotonic() - start


def check_ends(command: list[str], *, after: float, number: signal.Signals, cwd: Path) -> None:
    code, errors, seconds = interrupted(["-m", "jrlhf", *command], after=after, number=number, cwd=cwd)
    if after <= INTERPRETER and (code in (-number, 1) or "Traceback" in errors):
        # Python's own start, before a line of this package has run.
        assert "jrlhf/" not in errors.replace("jrlhf/__main__", ""), errors
        return
    assert code == CODES[number], errors
    assert "Traceback" not in errors
    assert errors.rstrip().split("\n")[-1].startswith("jrlhf: ")
    assert "interrupted" in errors
    assert seconds < 30


def prompts(folder: Path) -> str:
    """So many that answering them takes longer than any test waits."""
    path = folder / "prompts.jsonl"
    path.write_text((json.dumps({"prompt": "Once upon a time"}) + "\n") * 20_000)
    return str(path)


def command_of(name: str, folder: Path) -> list[str]:
    stage = ["--sft.model.path", "asset:stories260k", "--sft.data.train", "asset:sft_train", "--run", str(folder / "r")]
    return {
        "generate": ["generate", "asset:stories260k", prompts(folder), "--out", str(folder / "out.jsonl")],
        "sft": ["sft", *stage, "--sft.epochs", "1000"],
        "help": ["sft", "--help"],
    }[name]


@pytest.mark.parametrize(
    ("name", "after", "number"),
    [
        ("generate", 0.05, signal.SIGINT),
        ("generate", 0.3, signal.SIGTERM),
        ("generate", 1.0, signal.SIGINT),
        ("generate", 2.0, signal.SIGINT),
        ("generate", 5.0, signal.SIGTERM),
        ("sft", 0.2, signal.SIGINT),
        ("sft", 0.6, signal.SIGINT),
        ("sft", 1.5, signal.SIGTERM),
        ("sft", 3.0, signal.SIGINT),
    ],
)
def test_a_signal_ends_a_command(name: str, after: float, number: signal.Signals, tmp_path: Path) -> None:
    check_ends(command_of(name, tmp_path), after=after, number=number, cwd=tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "sft"])
def test_a_signal_ends_a_command_at_any_moment(name: str, tmp_path: Path) -> None:
    for step in range(60):
        number = (signal.SIGINT, signal.SIGTERM)[step % 2]
        check_ends(command_of(name, tmp_path), after=0.05 * (step + 1), number=number, cwd=tmp_path)


def program(
    *code: str, cwd: Path, after: float | None = 3.0, number: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """A program that has made ready for signals, as the command does."""
    text = "\n".join(["from jrlhf.system.interrupts import end_at_once, set_last_words", "end_at_once()", *code])
    code, errors, _ = interrupted(["-c", text], after=after, number=number, cwd=cwd)
    return code, errors


def test_it_ends_within_a_callback_of_jax_s(tmp_path: Path) -> None:
    """An exception that is raised there is reported as the callback's, or not at all."""
    code, errors = program(
        "import os, signal, jax, jax.numpy as jnp",
        "def strike(x):",
        "    os.kill(os.getpid(), signal.SIGINT)",
        "    return x",
        "def f(x): return jax.pure_callback(strike, jax.ShapeDtypeStruct((), jnp.float32), x)",
        "for _ in range(3):",
        "    try: jax.jit(f)(1.0).block_until_ready()",
        "    except BaseException: pass",
        "print('still here')",
        cwd=tmp_path,
        after=None,
    )
    assert (code, errors) == (130, "jrlhf: interrupted\n")


@pytest.mark.parametrize("number", CODES)
def test_it_ends_while_no_handler_of_python_s_can_run(number: signal.Signals, tmp_path: Path) -> None:
    """As while XLA compiles: one call that lets go of the interpreter, for a minute."""
    code, errors = program(
        "import hashlib",
        "set_last_words('a test interrupted')",
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)",
        cwd=tmp_path,
        number=number,
    )
    assert (code, errors) == (CODES[number], "jrlhf: a test interrupted\n")


def test_a_farewell_comes_first_and_a_second_signal_cuts_it_short(tmp_path: Path) -> None:
    farewell = [
        "import os, signal, time",
        "from jrlhf.system.interrupts import set_farewell",
        "def farewell():",
        "    os.write(2, b'farewell\\n')",
        "    if seconds: os.kill(os.getpid(), signal.SIGTERM); time.sleep(seconds)",
    ]
    rest = ["set_farewell(farewell)", "time.sleep(60)"]
    assert program(*farewell, "seconds = 0", *rest, cwd=tmp_path) == (130, "farewell\njrlhf: interrupted\n")
    assert program(*farewell, "seconds = 50", *rest, cwd=tmp_path) == (143, "farewell\njrlhf: interrupted\n")


def test_a_signal_between_two_programs_finds_the_second_one(tmp_path: Path) -> None:
    """The process replaces itself: one that comes on the way waits for handlers."""
    code, errors = program(
        "import os, signal, sys",
        "from jrlhf.system.interrupts import hold_signals",
        "later = 'import time; from jrlhf.system.interrupts import end_at_once; end_at_once(); time.sleep(60)'",
        "with hold_signals():",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    os.execv(sys.executable, [sys.executable, '-c', later])",
        cwd=tmp_path,
        after=None,
    )
    assert (code, errors) == (143, "jrlhf: interrupted\n")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup, or in the background of a script."""
    code = (
        "import os, signal; from jrlhf.system.interrupts import end_at_once; end_at_once()\n"
        "os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    )
    shell = ["sh", "-c", 'trap \'\' INT; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "still here\n", "jrlhf: interrupted\n")


@pytest.mark.parametrize("module", ["jrlhf", "jrlhf.cli", "jrlhf.cli.dispatch", "jrlhf.train.signals"])
def test_a_library_leaves_signals_alone(module: str) -> None:
    code = (
        f"import signal, {module}\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"JAX_PLATFORMS": "cpu"})
