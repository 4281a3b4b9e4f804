"""vLLM's side: its engine for CPUs on a folder with random weights. See protocol.py.

python -m peers.vllm_steps SPEC      (in benchmarks/; rollouts.py starts it)
"""

import itertools
import os
import platform
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

# GiB, well above what the slots need.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import numpy as np
from peers.llama import llama, size
from peers.protocol import Rounds, open_rounds, read_spec, repeat
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams


def main() -> None:
    spec, rounds = read_spec(), open_rounds()
    with TemporaryDirectory() as folder:
        model = llama(spec, LlamaForCausalLM)
        model.save_pretrained(folder)
        rollout(rounds, spec, folder, size(model))


def rollout(rounds: Rounds, spec: dict[str, Any], folder: str, parameters: int) -> None:
    """All answers in one call, each to its own length; those to one prompt are requests that share its cache."""
    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=spec["dtype"],
        max_num_seqs=spec["slots"],
        max_model_len=spec["prompt"] + spec["new"],
    )
    options = {"temperature": 1.0, "ignore_eos": True, "detokenize": False, "logprobs": 0}
    limits = [SamplingParams(max_tokens=length, **options) for length in spec["lengths"]]
    seeds = itertools.count()

    def call() -> dict[str, Any]:
        draw = np.random.default_rng(next(seeds))
        rows = draw.integers(2, spec["sizes"][5], (spec["rows"], spec["prompt"])).repeat(spec["samples"], axis=0)
        prompts = [{"prompt_token_ids": row} for row in rows.tolist()]
        answers = engine.generate(prompts, limits, use_tqdm=False)
        return {"tokens": sum(len(answer.outputs[0].token_ids) for answer in answers)}

    versions = [f"{name} {version(name)}" for name in ("torch", "vllm-cpu")]
    rounds.start(
        parameters=parameters,
        trained=0,
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        setting=f"{spec['dtype']} parameters; `LLM.generate` with its defaults and `max_num_seqs`",
    )
    repeat(rounds, call)


if __name__ == "__main__":
    main()
