"""Sampling: new tokens a second, compile seconds, share of the measured memory bandwidth that decoding uses."""

import jax
import jax.numpy as jnp
import numpy as np
from common import arch_of, arguments, forward_flops, measure, measured_peaks, report

from jrlhf.models import decoder_fns, init_params
from jrlhf.steps import make_generate


def main() -> None:
    args = arguments(__doc__, batch=32, prompt=64, new=64)
    arch = arch_of(args)
    fns = decoder_fns(arch, dtype=args.dtype, remat=False)
    params = init_params(arch, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (args.batch, args.prompt), np.int32)
    prompts, mask, key = jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.bool_), jax.random.key(1)

    def sampler(new: int):
        # No stop token: every row runs to the limit, so that the work is the same in every repeat.
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_tokens": (), "pad_token": 0}
        generate = jax.jit(make_generate(fns.decode_fns, max_new_tokens=new, **options))
        return lambda: generate(params, prompts, mask, key).tokens

    timing = measure(sampler(args.new), repeats=args.repeats)
    prefill = measure(sampler(1), repeats=args.repeats)
    peaks = measured_peaks(args.dtype)
    decode_seconds = timing.median - prefill.median
    report(
        "generate",
        args.batch * args.new / timing.median,
        "new tokens/s",
        timing,
        args,
        prefill_seconds=prefill.median,
        prefill_gflops=forward_flops(arch, args.batch, args.prompt, logits=args.batch) / prefill.median / 1e9,
        share_of_bandwidth_peak=round(decode_bytes(arch, params, args) / decode_seconds / peaks.bytes, 4),
        bandwidth_peak_gb_s=round(peaks.bytes / 1e9, 1),
    )


def decode_bytes(arch, params, args) -> float:
    """The least that must be read: all weights each step, and the cache as far as it is filled."""
    # An untied embedding is looked up, not read whole.
    skipped = 0 if arch.tie_embeddings else params["embed"].size
    weights = (sum(leaf.size for leaf in jax.tree.leaves(params)) - skipped) * 4
    item = jnp.dtype(args.dtype).itemsize
    a_position = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * args.batch * item
    filled = sum(range(args.prompt + 1, args.prompt + args.new))
    return weights * (args.new - 1) + a_position * filled


if __name__ == "__main__":
    main()
