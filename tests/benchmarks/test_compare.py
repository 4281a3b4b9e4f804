"""The comparison with peers: its protocol, ratios and page, on processes that only pretend to work."""

import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT

FOLDER = ROOT / "benchmarks"
FAKE = """\
import json, sys
module, spec = sys.argv[2], json.loads(sys.argv[3])
if module == "peers.tunix_steps":
    sys.exit("no such package")
seconds = {"peers.jrlhf_steps": 0.5, "peers.trl_steps": 1.25}[module]
if spec["work"] == "peaks":
    line = {"flops": {name: 4e9 / seconds for name in spec["dtypes"]}, "bytes": 1e9}
else:
    line = {"peak_mb": 100}
if spec["work"].startswith("generate"):
    line["tokens"] = sum(spec["lengths"]) - (module == "peers.trl_steps")
print("a library says hello", flush=True)
facts = {"parameters": 10, "trained": 9, "versions": "1", "setting": "plain", "first_seconds": 7.0}
print(json.dumps(facts), flush=True)
for round, ask in enumerate(sys.stdin):
    calls = int(ask.split()[1])
    print(json.dumps(line | {"seconds": [seconds * (1 + round)] * calls}), flush=True)
"""
ANSWERED = 28
"""Tokens of the answers that stop, of shape XS."""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compare")


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that whatever it is given runs the pretender."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{FAKE}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_side_waits_until_it_is_asked_and_says_each_call(compare: ModuleType) -> None:
    protocol = importlib.import_module("peers.protocol")
    answers, called = io.StringIO(), []
    rounds = protocol.Rounds(io.StringIO("go 3\ngo 1\n"), answers)
    rounds.start(parameters=5)

    def call() -> dict[str, int]:
        called.append(len(answers.getvalue().splitlines()))
        return {"tokens": len(called)}

    with pytest.raises(SystemExit) as ended:
        protocol.repeat(rounds, call)
    assert ended.value.code == 0
    warm, first, second = map(json.loads, answers.getvalue().splitlines())
    assert called == [0] * protocol.WARM_UP + [1] * 3 + [2]
    assert warm.keys() == {"parameters", "first_seconds", "tokens", "peak_mb"}
    assert [len(line["seconds"]) for line in (first, second)] == [3, 1]
    assert second["tokens"] == protocol.WARM_UP + 4
    assert warm["peak_mb"] > 0


def test_the_page_has_ratios_within_rounds_and_names_who_is_not_there(
    compare: ModuleType,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compare.page, "draw", lambda path, results: drawn.append((path.name, results)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    out, sides = tmp_path / "results" / "page.md", [f"{side}={python}" for side in ("jrlhf", "trl", "tunix")]
    given = ["--env", "trl=OMP_NUM_THREADS=2"]
    work = ["--work", "sft", "generate-stops", "ppo", "--shape", "XS", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/compare.py", *work, "--out", str(out), "--python", *sides, *given])
    compare.main()
    text = out.read_text(encoding="utf-8")
    assert "trl=PYTHON" in text
    assert python not in text
    assert "left out: trl-ppo" in text
    assert "| Tunix | none: no such package |" in text
    # Calls take 0.5, 1.0 and 1.5 seconds of jrlhf's; a batch is 2 rows of 32 tokens.
    assert "| SFT step, XS, float32 | jrlhf | 64 tokens/s | 1.000 (0.500 to 1.500) |" in text
    assert "| TRL / Hugging Face | 25.6 tokens/s | 2.500 (1.250 to 3.750) | 2.50 (2.50 to 2.50) |" in text
    assert "Peaks: float32: matmul 8 (8 to 8) GFLOP/s, copy 1 (1 to 1) GB/s." in text
    assert "- TRL / Hugging Face (1): plain; `OMP_NUM_THREADS=2`. SFT step, XS, float32." in text
    assert "`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`" in text
    assert f"| TRL / Hugging Face | none: {ANSWERED - 1} tokens instead of {ANSWERED} |" in text
    assert "| PPO iteration, XS, float32 | jrlhf | 1.0 s |" in text
    assert capsys.readouterr().out.count("| jrlhf |") == 3
    [(name, results)] = drawn
    assert name == "page.png"
    assert results[0].ratio("trl") == (2.5, 2.5, 2.5)
    assert [result.case.work for result in results] == ["sft", "generate-stops", "ppo"]


def test_answers_that_stop_are_as_long_in_every_row_as_their_prompts_are_short(compare: ModuleType) -> None:
    cases = importlib.import_module("peers.cases")
    told = cases.spec(cases.Case("generate-stops", "S", "float32"))
    assert {prompt + length for prompt, length in zip(told["prompts"], told["lengths"], strict=True)} == {
        told["stop_at"]
    }
    assert (max(told["prompts"]), max(told["lengths"])) == (64, 64)
    assert min(told["prompts"]) > 0
    assert len(set(told["lengths"])) > 16
    assert cases.units(cases.Case("generate-stops", "S", "float32")) == sum(told["lengths"])
    assert told == cases.spec(cases.Case("generate-stops", "S", "float32"))


def test_flops_are_those_of_a_training_step(compare: ModuleType) -> None:
    cases = importlib.import_module("peers.cases")
    whole, lora = (cases.flops(cases.Case(work, "S", "float32")) for work in ("sft", "sft-lora"))
    body, head = 6 * (4 * 384 * 384 + 3 * 384 * 1024), 8192 * 384
    # A token sees (1 + 256) / 2 keys on average: a product with each in the scores and one in what is mixed.
    attention = 2 * 2 * 6 * 384 * (1 + 256) / 2
    assert whole == 3 * 8 * 256 * (2 * body + 2 * head + attention)
    assert lora == pytest.approx(whole * 2 / 3)
    pairs, rankings = (cases.Case(work, "S", "float32") for work in ("reward", "reward-k4"))
    assert cases.flops(pairs) == cases.flops(rankings)
    assert (cases.units(pairs), cases.units(rankings)) == (8, 24)
