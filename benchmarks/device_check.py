"""Compares losses, gradients, log-probs and greedy answers of an accelerator with those of a CPU in float32.

    python benchmarks/device_check.py --shape S --device gpu

Each figure is a JSON line: the largest difference as a fraction of the largest value. Exit code 1 if one is too big.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Timing, arch_of, arguments, report

from jrlhf.core import answer_keys
from jrlhf.models import ArchConfig, DecoderFns, decoder_fns, init_params, reward_params
from jrlhf.steps import make_generate, make_reward_step, make_sft_step
from jrlhf.types import RankingBatch, SFTBatch, TrainState

LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
"""Tolerances. bfloat16 has 8 bits: a loss is right within one per cent, the largest gradient within a few."""


class Inputs(NamedTuple):
    params: Any
    reward: Any
    text: SFTBatch
    rankings: RankingBatch


def inputs(arch: ArchConfig, rows: int, length: int) -> Inputs:
    draw = np.random.default_rng(0)
    at, lengths = np.arange(length), draw.integers(length // 2, length + 1, (rows, 2))
    tokens = draw.integers(2, arch.vocab_size, (rows, 2, length), np.int32)
    mask = at < lengths[:, :, None]
    ranks = np.tile(np.arange(2, dtype=np.int32), (rows, 1))
    rankings = RankingBatch(tokens, mask, ranks, np.ones_like(mask[:, :, 0]), np.zeros(rows, np.float32))
    # Larger weights than at the start of training: a softmax of equal logits would hide errors.
    params = jax.tree.map(lambda leaf: 3.0 * leaf if leaf.ndim > 2 else leaf, init_params(arch, jax.random.key(0)))
    text = SFTBatch(tokens[:, 0], mask[:, 0], mask[:, 0])
    return jax.device_get(Inputs(params, reward_params(params, arch, jax.random.key(1)), text, rankings))


def results(fns: DecoderFns, given: Inputs, new: int) -> dict[str, Any]:
    """Compute a gradient as the difference that one step of gradient descent with rate 1 makes."""
    tx = optax.sgd(1.0)

    def after(step: Callable[..., Any], params: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = jax.jit(step)(TrainState(params, tx.init(params), jnp.int32(0)), batch, jax.random.key(0))
        return metrics["loss"], jax.tree.map(jnp.subtract, params, state.params)

    mask = jnp.asarray(given.text.mask)
    logprobs, entropy = jax.jit(lambda params, batch: fns.logprob_fn(params, batch.tokens, mask, temperature=1.0))(
        given.params, given.text
    )
    sft = after(make_sft_step(fns.logprob_fn, tx, accumulation=2), given.params, given.text)
    reward = after(make_reward_step(fns.score_fn, tx, center_coef=0.1, accumulation=2), given.reward, given.rankings)
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "stop_tokens": (), "pad_token": 0}
    keys = answer_keys(jax.random.key(1), jnp.arange(len(mask)), samples=1)
    drawn = jax.jit(make_generate(fns.decode_fns, max_new_tokens=new, **greedy))(
        given.params, given.text.tokens[:, ::-1], given.text.mask[:, ::-1], keys
    )
    found = {
        "log-probs": jnp.where(mask, logprobs, 0.0)[:, 1:],
        "entropy": jnp.where(mask, entropy, 0.0)[:, 1:],
        "SFT loss": sft[0],
        "SFT gradient": sft[1],
        "reward loss": reward[0],
        "reward gradient": reward[1],
    }
    return jax.device_get(found) | {"first greedy tokens": np.asarray(drawn.tokens[:, given.text.tokens.shape[1]])}


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference in all leaves as a fraction of the largest value."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    largest = max(float(np.max(np.abs(b))) for _, b in pairs)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - b))) for a, b in pairs) / largest


def main() -> None:
    # Without this an accelerator rounds float32 products to fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    args = arguments(__doc__, batch=4, length=128, new=8)
    arch, wrong = arch_of(args), 0
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        given = inputs(arch, args.batch, args.length)
        expected = results(decoder_fns(arch, dtype="float32", remat=False), given, args.new)
    kinds = [("float32", "xla"), ("bfloat16", "xla")]
    if jax.devices()[0].platform == "gpu":
        kinds.append(("bfloat16", "cudnn"))
    if jax.devices()[0].platform == "tpu":
        kinds += [("float32", "splash"), ("bfloat16", "splash")]
    for dtype, attention in kinds:
        # At a higher precision the kernel does not accept bfloat16.
        precision = "default" if (dtype, attention) == ("bfloat16", "splash") else "highest"
        with jax.default_matmul_precision(precision):
            found = results(decoder_fns(arch, dtype=dtype, remat=False, attention=attention), given, args.new)
        for name, value in found.items():
            if name == "first greedy tokens":
                off = float(np.mean(value != expected[name]))
                limit = 0.0 if dtype == "float32" else 0.5
            else:
                off, limit = difference(value, expected[name]), LIMITS[dtype]
            wrong += off > limit
            figure = f"{name}, {dtype}, attention {attention}"
            report(figure, off, "off CPU float32", Timing(0, 0, 0, 0), args, limit=limit, right=off <= limit)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
