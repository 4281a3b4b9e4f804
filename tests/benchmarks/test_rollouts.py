"""The benchmark of rollouts: its lengths, jrlhf's side with a small decoder, and its page with sides that pretend."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from jrlhf.models import ArchConfig, decoder_fns, init_params
from tests.support import ROOT

FAKE = """\
import json, sys
module, spec = sys.argv[2], json.loads(sys.argv[3])
if module == "peers.tunix_steps":
    sys.exit("no such package")
seconds = {"peers.jrlhf_rollouts": 0.5, "peers.vllm_steps": 1.0, "peers.trl_steps": 2.0}[module]
line = {"peak_mb": 100}
if spec["work"].startswith("rollout"):
    line["tokens"] = sum(spec["lengths"])
    seconds *= line["tokens"] / 1000
if module == "peers.jrlhf_rollouts" and "samples" in spec:
    line |= {"occupancy": 0.75, "occupancy_of_queue": 0.95, "program_mb": 12.3}
facts = {"parameters": 10, "trained": 9, "versions": "1", "setting": "plain", "first_seconds": 7.0}
print(json.dumps(facts), flush=True)
for ask in sys.stdin:
    print(json.dumps(line | {"seconds": [seconds] * int(ask.split()[1])}), flush=True)
"""


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("rollouts")


def test_lengths_are_log_normal_and_the_same_every_time(rollouts: ModuleType) -> None:
    cases = importlib.import_module("peers.cases")
    told = cases.spec(cases.Case("rollout-4x16", "S", "float32"))
    lengths = told["lengths"]
    assert (told["rows"], told["samples"], told["slots"], len(lengths)) == (32, 4, 16, 128)
    assert np.std(np.log(lengths)) == pytest.approx(0.7, abs=0.04)
    assert np.median(lengths) == pytest.approx(64, abs=1)
    assert max(lengths) == 256
    assert lengths != sorted(lengths)
    assert told == cases.spec(cases.Case("rollout-4x16", "S", "float32"))
    assert cases.spec(cases.Case("rollout-64", "S", "float32"))["lengths"] == lengths


def test_occupancy_of_batches_follows_from_the_lengths(rollouts: ModuleType) -> None:
    cases = importlib.import_module("peers.cases")
    # Of the first batch 1 and 3 steps draw a token, of the second 2 and 2: 8 of 2 x (3 + 2).
    assert cases.batch_occupancy({"lengths": [2, 4, 3, 3], "slots": 2}) == pytest.approx(0.8)


@pytest.mark.parametrize("slots", [3, 64])
def test_answers_of_jrlhf_are_as_long_as_they_are_told(rollouts: ModuleType, slots: int) -> None:
    side = importlib.import_module("peers.jrlhf_rollouts")
    arch = ArchConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        max_positions=64,
    )
    lengths = np.asarray([5, 2, 6, 3, 4, 2, 2, 6], np.int32)
    spec = {"samples": 2, "slots": slots, "prompt": 3, "new": 6}
    sampler = side.jit_sampler(decoder_fns(arch, dtype="float32", remat=False).decode_fns, spec)
    prompts = np.random.default_rng(0).integers(2, 16, (4, 3), np.int32)
    mask = np.ones(prompts.shape, np.bool_)
    drawn = sampler(init_params(arch, jax.random.key(0)), prompts, mask, jax.random.key(1), lengths)
    assert drawn.response_mask.sum(axis=-1).tolist() == lengths.tolist()
    assert drawn.stopped.all()
    figures = side.occupancies(drawn, min(slots, len(lengths)))
    assert 0 < figures["occupancy"] < 1


def test_occupancy_counts_the_slots_whose_steps_draw_a_token(rollouts: ModuleType) -> None:
    side = importlib.import_module("peers.jrlhf_rollouts")
    # Two slots: steps 0 to 3 draw the tokens after the first of an answer of 5, step 0 that of one of 2, steps 2 and 3
    # those of one that begins after two steps.
    drawn = SimpleNamespace(
        steps_before=np.asarray([0, 0, 2]), response_mask=np.arange(5)[None] < np.asarray([5, 2, 3])[:, None]
    )
    assert side.occupancies(drawn, 2) == {"occupancy": 7 / 8, "occupancy_of_queue": 3 / 4}


def test_the_page_has_ratios_occupancies_and_growth(
    rollouts: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{FAKE}", encoding="utf-8")
    python.chmod(0o755)
    drawn = []
    monkeypatch.setattr(rollouts.page, "draw", lambda path, results: drawn.append(path.name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    out, sides = tmp_path / "page.md", [f"{side}={python}" for side in ("jrlhf", "vllm", "trl", "tunix")]
    work = ["--work", "rollout-16", "ppo-ragged", "--shape", "XS", "--rounds", "2", "--growth", "64", "128"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/rollouts.py", *work, "--out", str(out), "--python", *sides])
    rollouts.main()
    text, cases = out.read_text(encoding="utf-8"), importlib.import_module("peers.cases")
    batches = cases.batch_occupancy(cases.spec(cases.Case("rollout-16", "XS", "float32")))
    assert str(python) not in text
    assert "vllm=PYTHON" in text
    assert "| one answer a prompt, 16 slots, XS, float32 | jrlhf | 2,000 new tokens/s |" in text
    assert "| vLLM | 1,000 new tokens/s |" in text
    assert "| 2.00 (2.00 to 2.00) |  |  |" in text
    assert "| 75%, 95% | 12 |" in text
    assert f"| 4.00 (4.00 to 4.00) | {batches:.0%} |  |" in text
    assert "| Tunix | none: no such package |" in text
    assert "| PPO iteration, XS, float32 | jrlhf | 0.5 s |" in text
    assert text.count("| 2,000 | 75%, 95% | 12 |") == 2
    assert drawn == ["page.png"]
    assert capsys.readouterr().out.count("| jrlhf |") == 2
