"""Sampling of answers to prompts, batch by batch, as tokens and as text."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from jrlhf.config import SamplingConfig
from jrlhf.data import PromptRows, Tokenizer, stop_token_ids
from jrlhf.models import int8_cache
from jrlhf.parallel import batch_sharding, fetch, is_first, shard_batch
from jrlhf.parallel.step import jit_for
from jrlhf.runs.metrics import progress
from jrlhf.steps import make_generate
from jrlhf.train.batches import covering_batches, device_multiple
from jrlhf.types import DecodeFns, Generation, Key, Params

GenerateFn = Callable[..., Generation]


class Draw(NamedTuple):
    """A batch of answers."""

    rows: Int[np.ndarray, "B"]
    """Index of each answer's prompt."""
    real: Bool[np.ndarray, "B"]
    """False for answers that only fill up the batch."""
    texts: list[str]
    generation: Generation


def jit_generate(
    decode_fns: DecodeFns, config: SamplingConfig, tokenizer: Tokenizer, mesh: Mesh, *, option: str, samples: int = 1
) -> GenerateFn:
    """Jit the sampler of a config; its answers are sharded by rows over the mesh, like the prompts.

    ``option`` names the config in errors.
    """
    stop_tokens = stop_token_ids(tokenizer, config.stop, option=f"{option}.stop")
    pad_token = int(tokenizer.pad_token_id)
    return jit_sampler(decode_fns, config, mesh, stop_tokens=stop_tokens, pad_token=pad_token, samples=samples)


def jit_sampler(
    decode_fns: DecodeFns,
    config: SamplingConfig,
    mesh: Mesh,
    *,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    samples: int = 1,
) -> Any:
    """Jit the sampler of a config for given stop and pad tokens, without a tokenizer."""
    generate = make_generate(
        int8_cache(decode_fns) if config.kv_cache == "int8" else decode_fns,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        samples=samples,
        drop_stopped=mesh.size == 1 and bool(stop_tokens),
    )
    return jit_for(mesh, generate, out_shardings=batch_sharding(mesh))


def generate_all(
    generate: GenerateFn, params: Params, prompts: PromptRows, *, key: Key, mesh: Mesh, batch_size: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Generation]]:
    """Yield ``(indices, real, generation)`` over the first ``limit`` prompts (0: all); see ``covering_batches``.

    A prompt's batch and its row depend on the prompts alone, so two policies get the same random draws for one key.
    """
    batches = covering_batches(prompts.lengths, batch_size=batch_size, limit=limit)
    for number, (indices, real) in enumerate(batches):
        tokens, mask = shard_batch(prompts.batch(indices), mesh)
        yield indices, real, generate(params, tokens, mask, jax.random.fold_in(key, number))


def texts_of(tokenizer: Tokenizer, generation: Generation) -> list[tuple[str, str]]:
    """Return ``(prompt, answer)`` texts of each row, without special tokens and NUL bytes.

    The answer is the whole text minus the prompt, because an answer decoded alone would lose its leading space.
    """
    tokens, mask, response = fetch((generation.tokens, generation.mask, generation.response_mask))
    pairs = []
    for row in range(len(tokens)):
        prompt = tokenizer.decode(tokens[row][mask[row] & ~response[row]], skip_special_tokens=True)
        whole = tokenizer.decode(tokens[row][mask[row]], skip_special_tokens=True)
        pairs.append((prompt, whole[len(prompt) :].replace("\x00", "")))
    return pairs


def samples_per_prompt(samples: int, *, batch_size: int, devices: int) -> int:
    """Return the number of answers to a prompt that one batch samples from a single reading of the prompt.

    It is the largest divisor of ``samples`` that leaves at most an eighth of a device's rows unused. For 9 samples and
    16 rows it is 3, as 5 prompts take 15 rows.
    """
    rows = max(1, batch_size // devices)
    return max(n for n in range(1, min(rows, samples) + 1) if samples % n == 0 and rows % n <= rows // 8)


def rollout_samples(samples: int, *, rows: int, devices: int) -> int:
    """Return the number of answers to a prompt that a rollout samples from a single reading of the prompt.

    It is the largest divisor of ``samples`` with which the prompts of ``rows`` answers divide over the devices. Which
    it is changes no draw, because a draw depends on the row of an answer.
    """
    return max(n for n in range(1, samples + 1) if samples % n == 0 and rows % (n * devices) == 0)


def draws(
    generate: GenerateFn,
    params: Params,
    prompts: PromptRows,
    tokenizer: Tokenizer,
    *,
    samples: int,
    key: Key,
    mesh: Mesh,
    batch_size: int,
    show_progress: bool,
    together: int = 1,
) -> Iterator[Draw]:
    """Yield batches of answers until each prompt has ``samples`` of them.

    One call of ``generate`` must give ``together`` answers to each of its prompts, a divisor of ``samples``. A batch
    has at most ``batch_size`` answers, rounded up so that the devices divide it.
    """
    batch_size = device_multiple(min(batch_size // together, len(prompts)), mesh)
    total, done = samples * len(prompts), 0
    with progress(
        total, "Answers", start=0, enabled=show_progress and is_first(), unit="answers", to_stderr=True
    ) as bar:
        for draw in range(samples // together):
            at = {"key": jax.random.fold_in(key, draw), "mesh": mesh, "batch_size": batch_size, "limit": 0}
            batches = generate_all(generate, params, prompts, **at)
            for indices, real, generation in batches:
                rows, real = np.repeat(indices, together), np.repeat(real, together)
                texts = [answer for _, answer in texts_of(tokenizer, generation)]
                yield Draw(rows, real, texts, generation)
                done += int(real.sum())
                bar.update(done)


def answers(
    generate: GenerateFn, params: Params, prompts: PromptRows, tokenizer: Tokenizer, **settings: Any
) -> list[list[str]]:
    """Return the texts of ``draws`` with these settings, by prompt, in the order of the prompts."""
    texts_by_prompt: list[list[str]] = [[] for _ in range(len(prompts))]
    for draw in draws(generate, params, prompts, tokenizer, **settings):
        for row, real, text in zip(draw.rows, draw.real, draw.texts, strict=True):
            if real:
                texts_by_prompt[row].append(text)
    return texts_by_prompt
