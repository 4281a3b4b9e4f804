"""jrlhf's side of rollouts.py: its sampler, with answers of given lengths. See protocol.py.

python -m peers.jrlhf_rollouts SPEC      (in benchmarks/; rollouts.py starts it)

It also runs a commit whose sampler has no slots: there a batch of as many answers is drawn together, then the next one.
"""

import platform
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import arch_of_shape
from peers import jrlhf_steps
from peers.protocol import Rounds, open_rounds, read_spec, repeat
from peers.tokenizer import EOS, PAD

import jrlhf.core
import jrlhf.stages.ppo as ppo_stage
from jrlhf.models import decoder_fns, init_params
from jrlhf.steps import make_generate
from jrlhf.types import DecodeFns, Generation, Params

HAS_SLOTS = "slots" in signature(make_generate).parameters


class NumberedCache(NamedTuple):
    """A cache that knows which answer each row holds: they begin in the order of their numbers."""

    cache: Any
    number: Any
    """That of each row's answer; -1 in rows that all begin together."""
    begun: Any
    """Answers begun so far, the same in all rows."""


def with_lengths(fns: DecodeFns, lengths: jax.Array, *, prompt: int) -> DecodeFns:
    """The same decoder, which says EOS for the last token of each answer, and never before.

    ``lengths``: tokens of each answer by its number, 2 or more; ``prompt``: tokens of every prompt.
    """

    def init_cache(batch: int, length: int, /) -> NumberedCache:
        none = jnp.zeros((batch,), jnp.int32)
        return NumberedCache(fns.init_cache(batch, length), none - 1, none)

    def decode(params: Params, tokens: jax.Array, positions: jax.Array, cache: Any, /) -> tuple[jax.Array, Any]:
        logits, inner = fns.decode(params, tokens, positions, cache.cache)
        if tokens.shape[1] > 1:
            return logits.at[:, EOS].set(-1e9), cache._replace(cache=inner)
        number = jnp.where(cache.number < 0, jnp.arange(len(tokens), dtype=jnp.int32), cache.number)
        ends = positions[:, -1] == prompt + lengths[number] - 2
        eos = jnp.where(ends, jnp.float32(1e9), jnp.float32(-1e9))
        return logits.at[:, EOS].set(eos), cache._replace(cache=inner, number=number)

    def insert(cache: Any, rows: jax.Array, prefilled: Any, /) -> NumberedCache:
        number = cache.begun[0] + jnp.arange(len(rows), dtype=jnp.int32)
        begun = cache.begun + jnp.sum(rows < len(cache.begun), dtype=jnp.int32)
        inner = fns.insert(cache.cache, rows, prefilled.cache)
        return NumberedCache(inner, cache.number.at[rows].set(number, mode="drop"), begun)

    own = fns._replace(init_cache=init_cache, decode=decode)
    return own._replace(insert=insert) if HAS_SLOTS else own


def jit_sampler(fns: DecodeFns, spec: dict[str, Any]) -> Any:
    """``(params, prompts, mask, key, lengths) -> Generation``, jitted."""
    samples = spec["samples"]
    own = {"slots": spec["slots"], "drop_ended": True} if HAS_SLOTS else {"samples": samples, "drop_stopped": True}

    @jax.jit
    def draw(params: Params, prompts: jax.Array, mask: jax.Array, key: Any, lengths: jax.Array) -> Generation:
        generate = make_generate(
            with_lengths(fns, lengths, prompt=spec["prompt"]),
            max_new_tokens=spec["new"],
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            stop_tokens=(EOS,),
            pad_token=PAD,
            **own,
        )
        numbers = jnp.arange(len(prompts), dtype=jnp.int32)
        return generate(
            params, prompts, mask, jrlhf.core.answer_keys(key, numbers, samples=samples) if HAS_SLOTS else key
        )

    return draw


def rollout(rounds: Rounds, spec: dict[str, Any]) -> None:
    """A call draws all answers: by one call of the sampler if it has slots, else by one a batch."""
    arch, key, draw = arch_of_shape(spec["shape"]), jax.random.key(1), np.random.default_rng(0)
    fns = decoder_fns(arch, dtype=spec["dtype"], remat=False).decode_fns
    params, lengths = init_params(arch, jax.random.key(0)), np.asarray(spec["lengths"], np.int32)
    batches = 1 if HAS_SLOTS else len(lengths) // spec["slots"]
    sampler, compiled, number = jit_sampler(fns, spec), None, 0

    def call() -> dict[str, Any]:
        nonlocal compiled, number
        prompts = draw.integers(2, arch.vocab_size, (spec["rows"], spec["prompt"]), np.int32)
        mask, drawn = np.ones((len(prompts) // batches, spec["prompt"]), np.bool_), []
        for own, its_lengths in zip(np.split(prompts, batches), np.split(lengths, batches), strict=True):
            number += 1
            arguments = params, own, mask, jax.random.fold_in(key, number), its_lengths
            compiled = compiled or sampler.lower(*arguments).compile()
            drawn.append(jax.block_until_ready(compiled(*arguments)))
        line = {"tokens": sum(int(generation.response_mask.sum()) for generation in drawn)}
        line["program_mb"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        return line | (occupancies(drawn[0], spec["slots"]) if HAS_SLOTS else {})

    how = "with `slots`" if HAS_SLOTS else "a batch after the other, `drop_stopped=True`"
    rounds.start(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        trained=0,
        versions=f"Python {platform.python_version()}, JAX {jax.__version__}",
        setting=f"float32 parameters, computed in {spec['dtype']}; `make_generate` under `jit`, {how}",
    )
    repeat(rounds, call)


def ppo(rounds: Rounds, spec: dict[str, Any]) -> None:
    """`jrlhf ppo` with answers of given lengths."""
    lengths = jnp.asarray(spec["lengths"], jnp.int32)

    def jit_generate(fns: DecodeFns, *settings: Any, **more: Any) -> Any:
        return ppo_stage_jit_generate(with_lengths(fns, lengths, prompt=spec["prompt"]), *settings, **more)

    ppo_stage_jit_generate, ppo_stage.jit_generate = ppo_stage.jit_generate, jit_generate
    sampling = {"slots": spec["slots"]} if HAS_SLOTS else {}
    jrlhf_steps.ppo(rounds, spec | {"sampling": sampling}, arch_of_shape(spec["shape"]))


def occupancies(generation: Any, slots: int) -> dict[str, float]:
    """The share of slots whose decoding step drew a token: in all, and until the last answer has begun."""
    begins, tokens = np.asarray(generation.steps_before), np.asarray(generation.response_mask).sum(axis=-1) - 1
    last, end = begins.max(), (begins + tokens).max()
    before_last = np.minimum(tokens, last - begins).sum()
    return {"occupancy": tokens.sum() / (slots * end), "occupancy_of_queue": before_last / max(1, slots * last)}


def main() -> None:
    spec, rounds = read_spec(), open_rounds()
    run = ppo if spec["work"].startswith("ppo") else rollout
    run(rounds, spec)


if __name__ == "__main__":
    main()
