"""What we make of an export, for others to be compared with: greedy answers, and the tokens that are scored."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import Config, SamplingConfig
from jrlhf.data import Encoder, load_tokenizer
from jrlhf.models import load_pretrained
from jrlhf.parallel import make_mesh
from jrlhf.rollout.sampling import jit_generate
from tests.support.chat_model import STORIES
from tests.support.runs import read_jsonl

LONGEST = 24


def questions() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question, _ in STORIES]


def greedy_answers(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Our prompt and greedy answer to each question, in tokens; no more after its stop token."""
    tokenizer, model = load_tokenizer(str(folder)), load_pretrained(folder, dtype="float32")
    sampling = SamplingConfig(max_new_tokens=LONGEST, temperature=0.0)
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    generate = jit_generate(model.decode_fns, sampling, tokenizer, mesh, option="sampling")
    prompts = [Encoder(tokenizer).prompt(question) for question in questions()]
    width = max(map(len, prompts))
    tokens = np.asarray([[0] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
    mask = np.arange(width)[None] >= width - np.asarray([[len(prompt)] for prompt in prompts])
    drawn = generate(model.params, jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens)), jax.random.key(0))
    rows = zip(prompts, np.asarray(drawn.tokens), np.asarray(drawn.response_mask), strict=True)
    return [(prompt, answer[response].tolist()) for prompt, answer, response in rows]


def score_rows(run: Config) -> list[list[int]]:
    """The tokens of both answers to each question, as they are scored."""
    encoder, rows = Encoder(load_tokenizer(str(Path(run.run) / "reward" / "hf"))), list[list[int]]()
    for row in read_jsonl(Path(str(run.reward.data.train)))[: len(STORIES)]:
        for answer in (row["chosen"], row["rejected"]):
            before, after = encoder.encode_sample(row["prompt"], answer[0]["content"], stopped=True)
            rows.append(before + after)
    return rows
