"""Sampling of answers to prompts, batch by batch, as tokens and as text."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from jrlhf.config import SamplingConfig
from jrlhf.core import answer_keys
from jrlhf.data import PromptRows, Tokenizer, stop_token_ids
from jrlhf.parallel import batch_sharding, fetch, is_first, shard_batch
from jrlhf.parallel.mesh import replicate
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.slots import slots_of, with_cache_of
from jrlhf.runs.metrics import progress
from jrlhf.steps import make_generate
from jrlhf.train.batches import covering_batches, device_multiple, groups_of
from jrlhf.types import DecodeFns, Generation, Key, Params

GenerateFn = Callable[..., Generation]
"""A jitted sampler: ``(policy, prompts, mask, numbers of the prompts, key) -> Generation``.

All but policy and key are sharded by rows over the mesh, like the answers. Key and number of a prompt decide the random
draws of its answers.
"""


class Draw(NamedTuple):
    """A batch of answers."""

    rows: Int[np.ndarray, "B"]
    """Index of each answer's prompt."""
    real: Bool[np.ndarray, "B"]
    """False for answers that only fill up the batch."""
    texts: list[str]
    generation: Generation


def jit_generate(
    decode_fns: DecodeFns,
    config: SamplingConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    option: str,
    samples: int = 1,
    readings: int = 1,
) -> GenerateFn:
    """Jit the sampler of a config. ``option`` names the config in errors."""
    stop_tokens = stop_token_ids(tokenizer, config.stop, option=f"{option}.stop")
    pad_token = int(tokenizer.pad_token_id)
    how = {"stop_tokens": stop_tokens, "pad_token": pad_token, "samples": samples, "readings": readings}
    return jit_sampler(decode_fns, config, mesh, **how)


def jit_sampler(
    decode_fns: DecodeFns,
    config: SamplingConfig,
    mesh: Mesh,
    *,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    samples: int = 1,
    readings: int = 1,
) -> Any:
    """Jit the sampler of a config for given stop and pad tokens, without a tokenizer.

    Each prompt gets ``samples`` answers. It stands in as many neighbouring rows as it is read times, ``readings``, and
    each of these rows gets an equal part of the answers.
    """

    def generate(
        params: Params, prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], numbers: Int[Array, "B"], key: Key
    ) -> Generation:
        together, shards = samples // readings, groups_of(mesh)
        rows = len(prompts) * together // shards
        slots = slots_of(config, decode_fns, mesh, rows=rows, prompt=prompts.shape[1])
        sampler = make_generate(
            with_cache_of(config, decode_fns),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=stop_tokens,
            pad_token=pad_token,
            slots=slots,
            shards=shards,
            drop_ended=bool(stop_tokens) or slots < rows,
        )
        keys = answer_keys(key, numbers[::readings], samples=samples)
        return sampler(params, prompts, mask, keys.reshape(-1, together))

    return jit_for(mesh, generate, out_shardings=batch_sharding(mesh))


def generate_all(
    generate: GenerateFn, params: Params, prompts: PromptRows, *, key: Key, mesh: Mesh, batch_size: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Generation]]:
    """Yield ``(indices, real, generation)`` over the first ``limit`` prompts (0: all); see ``covering_batches``.

    A prompt's random draws depend on its index alone, so two policies get the same ones for one key.
    """
    # As the key of a rollout is: on one device alone it would make the same sampler a second program.
    key = replicate(key, mesh)
    for indices, real in covering_batches(prompts.lengths, batch_size=batch_size, limit=limit):
        batch = *prompts.batch(indices), indices.astype(np.int32)
        yield indices, real, generate(params, *shard_batch(batch, mesh), key)


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


def prompt_readings(samples: int, *, rows: int, devices: int) -> int:
    """Return how often a rollout reads each prompt for its ``samples`` answers.

    It is the smallest divisor of ``samples`` with which the readings for ``rows`` answers divide over the devices.
    Which it is changes no draw.
    """
    return min(n for n in range(1, samples + 1) if samples % n == 0 and rows // samples * n % devices == 0)


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
) -> Iterator[Draw]:
    """Yield batches of answers until each prompt has ``samples`` of them, which one call of ``generate`` must give.

    A batch has at most ``batch_size`` answers, rounded so that the devices divide its prompts; it has all answers to at
    least one prompt a device.
    """
    batch_size = device_multiple(min(max(1, batch_size // samples), len(prompts)), mesh)
    done = 0
    with progress(
        samples * len(prompts), "Answers", start=0, enabled=show_progress and is_first(), unit="answers", to_stderr=True
    ) as bar:
        at = {"key": key, "mesh": mesh, "batch_size": batch_size, "limit": 0}
        for indices, real, generation in generate_all(generate, params, prompts, **at):
            rows, real = np.repeat(indices, samples), np.repeat(real, samples)
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
