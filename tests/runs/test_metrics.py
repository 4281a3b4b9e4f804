"""metrics.jsonl, TensorBoard, and progress with and without a terminal."""

import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.runs.metrics import MetricsLog, Speed, format_metrics, progress, read_metrics
from tests.support import ROOT


def logged(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(folder / "metrics.jsonl")]


def test_a_line_is_one_json_object_and_there_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", tensorboard=False, resume_step=None) as log:
        log.write(1, {"loss": 0.1, "kl": np.float32(0.1), "reward": jnp.float32(-2.5), "tokens": 512})
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        row = json.loads(text)
        assert text.endswith("\n")
        assert list(row) == ["step", "time", "loss", "kl", "reward", "tokens"]
        # float32 is written with all its bits: equal runs have equal lines.
        assert (row["loss"], row["kl"], row["reward"]) == (0.1, float(np.float32(0.1)), -2.5)
        assert 1.7e9 < row["time"] < 1e11


def test_non_finite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=True, resume_step=None) as log:
        log.write(1, {"a": float("nan"), "b": float("inf"), "c": -np.inf, "d": 1.0})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (strict["a"], strict["b"], strict["c"], strict["d"]) == ("nan", "inf", "-inf", 1.0)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert np.isnan(row["a"])
    assert (row["b"], row["c"]) == (np.inf, -np.inf)


def test_resuming_drops_what_comes_after_and_a_torn_last_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False, resume_step=None) as log:
        for step in range(5):
            log.write(step, {"x": float(step)})
        log.write(2, {"eval/x": 7.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    with MetricsLog(tmp_path, tensorboard=False, resume_step=2) as log:
        log.write(3, {"x": 30.0})
    assert logged(tmp_path) == [
        {"step": 0, "x": 0.0}, {"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}, {"step": 2, "eval/x": 7.0},
        {"step": 3, "x": 30.0},
    ]  # fmt: skip
    # From the beginning means from the beginning.
    with MetricsLog(tmp_path, tensorboard=False, resume_step=None) as log:
        log.write(0, {"x": 0.5})
    assert logged(tmp_path) == [{"step": 0, "x": 0.5}]
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "metrics.jsonl"]


def test_a_clock_that_is_set_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2e9, 1e9, 1.5e9, 5.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with MetricsLog(tmp_path, tensorboard=False, resume_step=None) as log:
        for step in range(4):
            log.write(step, {"x": float(step)})
    # Lines are dropped by their step, whatever their time says.
    with MetricsLog(tmp_path, tensorboard=False, resume_step=2) as log:
        log.write(3, {"x": 30.0})
        log.write(4, {"x": 40.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["time"] for row in rows] == [2e9, 1e9, 1.5e9, 4.0, 3.0]


def test_no_duration_is_taken_from_a_clock_that_can_be_set_back() -> None:
    """The time of day is only written beside metrics and decisions; all else is measured by a steady clock."""
    clock = re.compile(r"\btime\.time\(|\bdatetime\.(now|today|utcnow)\(")
    files = [path for path in (ROOT / "jrlhf").rglob("*.py") if clock.search(path.read_text())]
    assert sorted(files) == [ROOT / "jrlhf" / "rank" / "store.py", ROOT / "jrlhf" / "runs" / "metrics.py"]


def board_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((folder / "tensorboard").iterdir()))


def test_tensorboard_gets_the_same_names(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=True, resume_step=None) as log:
        log.write(1, {"policy/approxkl": 0.25})
    assert b"policy/approxkl" in board_bytes(tmp_path)
    with MetricsLog(tmp_path, tensorboard=True, resume_step=1) as log:
        log.write(2, {"later": 1.0})
    assert b"policy/approxkl" in board_bytes(tmp_path)
    assert b"later" in board_bytes(tmp_path)
    with MetricsLog(tmp_path, tensorboard=True, resume_step=None) as log:
        log.write(1, {"anew": 1.0})
    assert b"anew" in board_bytes(tmp_path)
    assert b"later" not in board_bytes(tmp_path)


def test_the_module_imports_neither_tensorboard_nor_rich_nor_jax() -> None:
    code = "import sys, jrlhf.runs.metrics; print(sorted({'tensorboardX', 'rich', 'jax'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_speed_leaves_out_the_first_step() -> None:
    now = iter([100.0, 101.0, 103.0])
    speed = Speed(clock=lambda: next(now))
    descriptions = []
    for step in (11, 13, 17):
        speed.update(step)
        descriptions.append(speed.describe(3617))
    # However long step 11 took to compile: 2 steps in 1 s, then 6 steps in 3 s.
    assert descriptions == ["", "2 steps/s, 0:30:02 left", "2 steps/s, 0:30:00 left"]


def test_metrics_are_formatted_shortly() -> None:
    assert format_metrics({"loss": 1.23456, "kl": np.float32(0.5), "x": float("nan")}) == "loss 1.235  kl 0.5  x nan"


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        # 1,000 steps in a second: the ends alone.
        (2**-10, [1, 1000]),
        # In a minute: a twentieth is three seconds, and no two lines are within ten.
        (2**-4, [1, 161, 321, 481, 641, 801, 961, 1000]),
        # In an hour: every twentieth.
        (4.0, [1, *range(50, 1001, 50)]),
    ],
)
def test_without_a_terminal_plain_lines_are_few_and_far_between(
    seconds: float, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, seconds)
    with progress(1000, "sft", start=0, enabled=True, clock=lambda: next(clock)) as bar:
        for step in range(1, 1001):
            bar.update(step, {"loss": 1 / step} if step % 10 == 0 else None)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == steps
    assert lines[0] == "sft 1/1000"
    assert re.fullmatch(r"sft 1000/1000  loss 0.001  \S+ steps/s, 0:00:00 left", lines[-1])
    assert "\x1b" not in "".join(lines)


def test_a_resumed_or_silent_loop_prints_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "ppo", start=50, enabled=True) as bar:
        bar.update(51)
        bar.update(100)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["ppo 51/100", "ppo 100/100"]
    with progress(100, "ppo", start=0, enabled=False) as bar:
        bar.update(100, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_it_says_so_where_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(40, "Answers", start=0, enabled=True, unit="answers", to_stderr=True) as bar:
        for done in range(4, 41, 4):
            bar.update(done)
    found = capsys.readouterr()
    assert found.out == ""
    assert re.fullmatch(r"Answers 40/40  \S+ answers/s, 0:00:00 left", found.err.splitlines()[-1])


ENDLESS = """
    import time
    from jrlhf.runs.metrics import progress
    with progress(1000, "sft [x]", start=0, enabled=True) as bar:
        for step in range(1, 1001):
            bar.update(step, {"loss": 0.125})
            time.sleep(0.02)
"""


def test_ctrl_c_leaves_the_terminal_clean() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    seen = b""
    try:
        while b"steps/s" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    assert b"KeyboardInterrupt" in errors
    screen = seen.decode()
    assert "sft [x]" in screen
    assert "loss 0.125" in screen
    assert "/1000" in screen
    assert " left" in screen
    # The cursor was hidden, is shown again, and stands at the start of a line.
    assert screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l") > -1
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).endswith("\n")
