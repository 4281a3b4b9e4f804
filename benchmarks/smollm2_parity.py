"""Compares the answer and the scores of benchmarks/smollm2.py with those of transformers and PEFT. Prints a JSON line.

    python benchmarks/smollm2_parity.py --out /tmp/smollm2

Needs torch and peft (the extra "test" on Python 3.11).
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from jrlhf.config import load_config
from jrlhf.models import load_pretrained
from jrlhf.system.lines import read_json_lines


def answers_agree(out: Path) -> dict[str, Any]:
    """Return both models' greedy answers to the question, and the largest difference of their logits over it."""
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(out / "model"),
        AutoModelForCausalLM.from_pretrained(out / "model"),
    )
    question = read_json_lines(out / "data/question.jsonl")[0]["prompt"]
    answer = read_json_lines(out / "answer.jsonl")[0]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    with torch.no_grad():
        drawn = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        logits = theirs(ids).logits.numpy()
    ours = load_pretrained(out / "model", dtype="float32")
    tokens = jnp.asarray(ids.numpy(), jnp.int32)
    mine = np.asarray(ours.apply_fn(ours.params, tokens, jnp.ones(tokens.shape, bool)))
    return {
        "ours": answer["completions"][0],
        "theirs": tokenizer.decode(drawn, skip_special_tokens=True),
        "max_abs_logit": float(np.abs(logits).max()),
        "max_abs_logit_diff": float(np.abs(logits - mine).max()),
    }


def scores_agree(out: Path, *, count: int) -> dict[str, Any]:
    """Compare ``jrlhf score`` with transformers on reward/hf and with PEFT on reward/peft, on texts that are not cut.

    Their heads have no bias; config.json holds ours under "jrlhf".
    """
    folder = out / "run/reward"
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    rows = read_json_lines(out / "scores.jsonl")
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    longest = load_config(folder / "config.yaml").reward.data.max_length
    short = [i for i, text in enumerate(texts) if len(tokenizer(text)["input_ids"]) <= longest][:count]
    ours = np.asarray([rows[i]["score"] for i in short])
    bias = json.loads((folder / "hf/config.json").read_text(encoding="utf-8"))["jrlhf"]["head_bias"]
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "hf")
    base = AutoModelForSequenceClassification.from_pretrained(
        out / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    adapted = peft.PeftModel.from_pretrained(base, folder / "peft")

    def scored(model: Any) -> np.ndarray:
        inputs = tokenizer([texts[i] for i in short], padding=True, return_tensors="pt")
        with torch.no_grad():
            return model.eval()(**inputs).logits[:, 0].numpy()

    return {
        "texts": len(short),
        "head_bias": bias,
        "scores": [float(ours.min()), float(ours.max())],
        "max_abs_diff_hf": float(np.abs(ours - scored(merged) - bias).max()),
        "max_abs_diff_peft": float(np.abs(ours - scored(adapted) - bias).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder of smollm2.py")
    parser.add_argument("--texts", type=int, default=32, help="number of held-out answers to score")
    args = parser.parse_args()
    out = args.out.resolve()
    figures = {"answer": answers_agree(out), "reward": scores_agree(out, count=args.texts)}
    made_with = {name: version(name) for name in ("transformers", "torch", "peft", "jax")}
    print(json.dumps(figures | {"versions": made_with}))


if __name__ == "__main__":
    main()
