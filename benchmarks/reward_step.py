"""Measures a reward-model step on K-wise rankings: pairs and completions per second, fraction of the matmul peak."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Program, arch_of, arguments, batch_flops, beside_estimate, measure, peaks_of, report, shares

from jrlhf.models import decoder_fns, init_params, reward_params
from jrlhf.steps import make_reward_step
from jrlhf.types import RankingBatch, TrainState


def main() -> None:
    args = arguments(__doc__, batch=8, completions=2, length=256, accumulation=1)
    arch = arch_of(args)
    fns = decoder_fns(arch, dtype=args.dtype, remat=args.remat, attention=args.attention)
    params = reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(1))
    tx = optax.adamw(1e-5)
    pure = make_reward_step(fns.score_fn, tx, center_coef=0.0, accumulation=args.accumulation)
    step = Program(jax.jit(pure, donate_argnums=0))
    shape = (args.batch, args.completions, args.length)
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, shape, np.int32)
    ranks = jnp.broadcast_to(jnp.arange(args.completions, dtype=jnp.int32), shape[:2])
    batch = RankingBatch(
        jnp.asarray(tokens),
        jnp.ones(shape, jnp.bool_),
        ranks,
        jnp.ones(shape[:2], jnp.bool_),
        jnp.zeros(args.batch, jnp.float32),
    )
    state, key = TrainState(params, tx.init(params), jnp.int32(0)), jax.random.key(2)

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics["loss"]

    timing = measure(call, repeats=args.repeats)
    rows = args.batch * args.completions
    flops = 3 * batch_flops(arch, rows, args.length, logits=0)
    used = shares(flops, timing.median, peaks_of(args.dtype)) | beside_estimate(timing.median, step)
    pairs = args.batch * args.completions * (args.completions - 1) // 2
    report(
        "reward_step", pairs / timing.median, "pairs/s", timing, args, **used, completions_per_s=rows / timing.median
    )


if __name__ == "__main__":
    main()
