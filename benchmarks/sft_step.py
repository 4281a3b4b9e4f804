"""Measures an SFT step: tokens per second, compile seconds, fraction of the measured matmul peak."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Program, arch_of, arguments, batch_flops, beside_estimate, measure, peaks_of, report, shares

from jrlhf.models import decoder_fns, init_params
from jrlhf.steps import make_sft_step
from jrlhf.types import SFTBatch, TrainState


def main() -> None:
    args = arguments(__doc__, batch=8, length=256, accumulation=1)
    arch = arch_of(args)
    fns = decoder_fns(arch, dtype=args.dtype, remat=args.remat, attention=args.attention)
    params = init_params(arch, jax.random.key(0))
    tx = optax.adamw(1e-5)
    step = Program(jax.jit(make_sft_step(fns.logprob_fn, tx, accumulation=args.accumulation), donate_argnums=0))
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (args.batch, args.length), np.int32)
    mask = jnp.ones(tokens.shape, jnp.bool_)
    batch = SFTBatch(jnp.asarray(tokens), mask, mask)
    state, key = TrainState(params, tx.init(params), jnp.int32(0)), jax.random.key(1)

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics["loss"]

    timing = measure(call, repeats=args.repeats)
    flops = 3 * batch_flops(arch, args.batch, args.length, logits=args.batch * args.length)
    used = shares(flops, timing.median, peaks_of(args.dtype)) | beside_estimate(timing.median, step)
    report("sft_step", args.batch * args.length / timing.median, "tokens/s", timing, args, **used)


if __name__ == "__main__":
    main()
