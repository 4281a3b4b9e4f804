"""Measures sampling: new tokens per second, compile seconds, fraction of the measured memory bandwidth."""

import jax
import jax.numpy as jnp
import numpy as np
from common import Program, arch_of, arguments, batch_flops, beside_estimate, measure, peaks_of, report

from jrlhf.core import answer_keys
from jrlhf.models import decoder_fns, init_params, int8_cache
from jrlhf.models.flops import decode_bytes
from jrlhf.steps import make_generate


def main() -> None:
    args = arguments(__doc__, batch=32, prompt=64, new=64, kv_cache="compute")
    arch = arch_of(args)
    decode_fns = decoder_fns(arch, dtype=args.dtype, remat=False).decode_fns
    decode_fns = {"compute": decode_fns, "int8": int8_cache(decode_fns)}[args.kv_cache]
    params = init_params(arch, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (args.batch, args.prompt), np.int32)
    prompts, mask = jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.bool_)
    keys = answer_keys(jax.random.key(1), jnp.arange(args.batch), samples=1)

    def sampler(new: int) -> Program:
        # No stop token: every row runs to the limit, so that the work is the same in every repeat.
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_tokens": (), "pad_token": 0}
        return Program(jax.jit(make_generate(decode_fns, max_new_tokens=new, **options)))

    whole, first = sampler(args.new), sampler(1)
    timing = measure(lambda: whole(params, prompts, mask, keys).tokens, repeats=args.repeats)
    prefill = measure(lambda: first(params, prompts, mask, keys).tokens, repeats=args.repeats)
    peaks = peaks_of(args.dtype)
    decode_seconds = timing.median - prefill.median
    report(
        "generate",
        args.batch * args.new / timing.median,
        "new tokens/s",
        timing,
        args,
        prefill_seconds=prefill.median,
        prefill_gflops=batch_flops(arch, args.batch, args.prompt, logits=args.batch) / prefill.median / 1e9,
        share_of_bandwidth_peak=round(read_bytes(arch, args) / decode_seconds / peaks.bytes, 4),
        bandwidth_peak_gb_s=round(peaks.bytes / 1e9, 1),
        **beside_estimate(timing.median, whole, trips=args.new - 1),
    )


def read_bytes(arch, args) -> float:
    """Return the minimum of bytes to read: all weights in each step, and the filled part of the cache."""
    fed = np.tile(np.arange(args.prompt, args.prompt + args.new - 1), args.batch)
    itemsize = jnp.dtype(args.dtype).itemsize
    return float(decode_bytes(arch, fed, steps=args.new - 1, itemsize=itemsize, kv_cache=args.kv_cache))


if __name__ == "__main__":
    main()
