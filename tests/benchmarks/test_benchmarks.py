"""Every benchmark of a step runs and says what it was made with; its figures are nobody's business here.

Of the run on real weights, what needs none of them: the conversion, the split, the recipe.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import load_config
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.names import language_model_table
from jrlhf.parallel.devices.peaks import Peaks, measured_peaks
from tests.support import ROOT

FOLDER = ROOT / "benchmarks"
TINY = ["--shape", "XS", "--layers", "1", "--vocab", "64", "--repeats", "1"]
SIZES = {
    "sft_step": ["--batch", "2", "--length", "16"],
    "reward_step": ["--batch", "2", "--completions", "3", "--length", "16"],
    "generate": ["--batch", "2", "--prompt", "8", "--new", "4"],
    "ppo_iteration": ["--episodes", "4", "--prompt", "8", "--new", "4", "--epochs", "2", "--minibatches", "2"],
    "load": [],
    "growth": ["--sweeps", "rows", "--heads", "2", "--kv-heads", "2", "--hidden", "8"],
    "rule_overlap": ["--episodes", "8", "--prompt", "8", "--new", "4", "--seconds", "0.3", "--iterations", "4"],
    "loop": ["--batch", "8", "--length", "16", "--steps", "3", "--every", "2"],
}


def small_peaks(dtype: str, **_: int) -> Peaks:
    """The peaks of a matrix and an array that are as small as the models here."""
    return measured_peaks(dtype, size=64, megabytes=1, repeats=1)


@pytest.mark.parametrize("name", SIZES)
def test_it_prints_a_line_with_its_figure(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("common"), "measured_peaks", small_peaks)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *TINY, *SIZES[name]])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines
    for line in lines:
        # On a model this small time need not grow at all, and there is hardly any to hide a rule behind.
        assert line["value"] > 0.0 or {"growth", "hidden"} & {*line["figure"].split()}
        assert line.keys() >= {"figure", "unit", "seconds", "device", "cpu", "python", "jax", "date", "command"}


def test_what_was_measured_stands_beside_the_estimate_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    product = common.Program(jax.jit(lambda a: a @ a))
    with pytest.raises(ValueError, match="not been called"):
        product.hlo()
    np.testing.assert_array_equal(product(jnp.eye(512)), np.eye(512))
    assert common.beside_estimate(1.0, product) == {}, "nothing is known of this CPU"
    got = common.beside_estimate(1e-3, product, product, kind="NVIDIA H100 80GB HBM3", name="step_")
    # Twice: reading two arrays and writing one, at 80 % of 3,350 GB/s, takes longer than the FLOPs.
    seconds = 2 * 3 * 512 * 512 * 4 / (0.8 * 3350e9)
    assert got["step_estimated_seconds"] == pytest.approx(seconds, rel=0.5)
    assert got["step_measured_over_estimated"] == pytest.approx(1e-3 / got["step_estimated_seconds"], rel=1e-3)


@pytest.mark.slow
def test_the_gpu_script_runs_from_end_to_end(tmp_path: Path) -> None:
    """On a CPU, at tiny sizes: every program of it."""
    out = tmp_path / "gpu.jsonl"
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "TINY": "1"}
    run = subprocess.run(["bash", FOLDER / "gpu.sh", out], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    figures = [json.loads(line)["figure"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert {"sft_step", "reward_step", "generate", "ppo_iteration", "SFT gradient, float32, attention xla"} <= {
        *figures
    }


def test_the_gpu_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", FOLDER / "gpu.sh"], check=True, timeout=60)


GGUF = {
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 40,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 96,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "smollm2.py"))


def test_gguf_tensors_have_the_names_and_the_row_order_of_hugging_face() -> None:
    gguf_llama = runpy.run_path(str(FOLDER / "gguf_llama.py"))
    config = gguf_llama["hf_config"](GGUF)
    arch = arch_from_hf(config)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.rope.theta, arch.norm_eps) == (4, 2, 6, 1e5, 1e-5)
    kinds = [name for name in gguf_llama["NAMES"] if name not in ("token_embd", "output_norm")]
    theirs = [
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{i}.{kind}.weight" for i in range(2) for kind in kinds),
    ]
    weights = {name: np.arange(48.0).reshape(24, 2) + i for i, name in enumerate(theirs)}
    ours = {}
    for name, weight in weights.items():
        key, value = gguf_llama["hf_tensor"](name, weight, heads=4, kv_heads=2)
        ours[key] = value
        assert value.dtype == np.float32
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads is None:
            np.testing.assert_array_equal(value, weight)
            continue
        size = 24 // heads
        for row in range(24):
            head, place = divmod(row, size)
            pair, second = place % (size // 2), place >= size // 2
            np.testing.assert_array_equal(value[row], weight[head * size + 2 * pair + second])
    assert ours.keys() == {e.name.format(layer=i) for e in language_model_table(arch) for i in range(2)}


def test_the_split_keeps_whole_usable_rows_apart(smollm2: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "yes" if i == 3 else "no"} for i in range(240)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    smollm2["split"](tmp_path / "pairs.jsonl", tmp_path, train_pairs=35)
    parts = {n: (tmp_path / f"data/{n}.jsonl").read_text().splitlines(keepends=True) for n in ("train", "heldout")}
    assert parts == {"train": lines[:3] + lines[4:36], "heldout": lines[40:]}


def test_its_recipe_is_a_config(smollm2: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        smollm2["RECIPE"].format(out=tmp_path, max_length=128, pack_length=256, prompt_length=96)
    )
    config = load_config(tmp_path / "recipe.yaml")
    assert config.reward.lora.rank == config.ppo.lora.rank == 8
    assert (config.reward.pack_length, config.ppo.prompts.max_length) == (256, 96)
