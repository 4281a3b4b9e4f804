"""Exports in the hands of transformers and PEFT: our logits, our scores, and our greedy answers with their ends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import Config, ModelConfig
from jrlhf.config.tools import ExportConfig, ScoreConfig
from jrlhf.models import load_pretrained
from jrlhf.stages.reward import run_reward
from jrlhf.tools.export import run_export
from jrlhf.tools.inference import run_score
from tests.support.chat_model import IM_END, write_chat_model
from tests.support.export_reading import LONGEST, greedy_answers, questions, score_rows
from tests.support.runs import read_jsonl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("folder", ["sft/hf", "ppo/hf"])
def test_transformers_generates_what_we_do_and_ends_where_we_end(chat_run: Config, folder: str) -> None:
    out = Path(chat_run.run) / folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = load_pretrained(out, dtype="float32")
    for question, (prompt, answer) in zip(questions(), greedy_answers(out), strict=True):
        asked = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert asked["input_ids"][0].tolist() == prompt
        found = theirs.generate(**asked, max_new_tokens=LONGEST, do_sample=False, temperature=None)
        assert found[0, len(prompt) :].tolist() == answer
        assert answer[-1] == IM_END
        assert len(answer) < LONGEST
        tokens = np.asarray([prompt + answer], np.int32)
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        ours = model.apply_fn(model.params, jnp.asarray(tokens), jnp.ones_like(tokens, jnp.bool_))
        np.testing.assert_allclose(ours, logits, atol=1e-3)


def their_scores(folder: Path, rows: list[list[int]], *, side: str | None) -> np.ndarray:
    """transformers' scores, alone or in one batch padded by its own tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        if side is None:
            return np.asarray([model(torch.tensor([row])).logits.item() for row in rows])
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return model(**batch).logits[:, 0].numpy()


@pytest.mark.parametrize("pad", ["</s>", None, "<unk>"], ids=["pad is eos", "no pad", "own pad"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_transformers_scores_an_export_as_we_do(
    chat_run: Config, exported_rewards: dict[Any, Path], pad: str | None, side: str | None, tmp_path: Path
) -> None:
    """A stage's export and a checkpoint's, whatever pad token the base had. Theirs lack the head's bias."""
    folders = (
        [exported_rewards[pad]] if pad != "</s>" else [exported_rewards[pad], Path(chat_run.run) / "reward" / "hf"]
    )
    for folder in folders:
        run_score(ScoreConfig(str(folder), chat_run.reward.data.train, out=str(tmp_path / "ours.jsonl")))
        ours = np.asarray([row["score"] for row in read_jsonl(tmp_path / "ours.jsonl")])[:8]
        bias = json.loads((folder / "config.json").read_text()).get("jrlhf", {}).get("head_bias", 0.0)
        np.testing.assert_allclose(their_scores(folder, score_rows(chat_run), side=side) + bias, ours, atol=2e-3)


@pytest.fixture(scope="module")
def exported_rewards(chat_run: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Checkpoints of reward models whose bases have the EOS for a pad token, none, or one of their own."""
    outs: dict[Any, Path] = {}
    for pad in ("</s>", None, "<unk>"):
        folder = tmp_path_factory.mktemp("reward")
        base = write_chat_model(folder / "base", bfloat16=False, pad=pad)
        reward = replace(chat_run.reward, model=ModelConfig(path=str(base)), epochs=0.5, normalise="")
        config = replace(chat_run, run=str(folder / "run"), reward=reward)
        run_reward(config)
        outs[pad] = folder / "out"
        run_export(ExportConfig(run=config.run, out=str(outs[pad]), stage="reward", step=1))
    return outs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_on_its_base_is_the_merged_model(chat_run: Config) -> None:
    peft = pytest.importorskip("peft")
    run = Path(chat_run.run)
    base = transformers.AutoModelForCausalLM.from_pretrained(run / "sft" / "hf")
    adapted = peft.PeftModel.from_pretrained(base, run / "ppo" / "peft").eval()
    merged = load_pretrained(run / "ppo" / "hf", dtype="float32")
    tokens = np.asarray([greedy_answers(run / "sft" / "hf")[0][0]], np.int32)
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = merged.apply_fn(merged.params, jnp.asarray(tokens), jnp.ones_like(tokens, jnp.bool_))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
