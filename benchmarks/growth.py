"""Measures how time and memory grow with row length, rows, layers and answer length, compared with their FLOPs.

    python benchmarks/growth.py --shape S --out benchmarks/results/growth.png > growth.jsonl

Each point is a JSON line: seconds (the median; all points of a sweep run in turn), the program's memory without its
arguments, and model FLOPs. Each sweep ends with two exponents: time and memory grow as FLOPs to that power.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Timing, arch_of, arguments, batch_flops, report

from jrlhf.core import answer_keys
from jrlhf.models import ArchConfig, decoder_fns, init_params, reward_params
from jrlhf.steps import make_generate, make_reward_step, make_sft_step
from jrlhf.types import RankingBatch, SFTBatch, TrainState


class Point(NamedTuple):
    size: int
    call: Callable[[], Any]
    first: float
    memory: int
    """Bytes that the program uses besides its arguments and results."""
    flops: float


def compiled(fn: Callable[..., Any], *inputs: Any, donate: tuple[int, ...] = ()) -> tuple[Any, float, int]:
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=donate).lower(*inputs).compile()
    return program, time.perf_counter() - start, program.memory_analysis().temp_size_in_bytes


def training(step: Any, params: Any, tx: optax.GradientTransformation, batch: Any) -> tuple[Any, float, int]:
    state, key = TrainState(params, tx.init(params), jnp.int32(0)), jax.random.key(1)
    program, first, memory = compiled(step, state, batch, key, donate=(0,))

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, batch, key)
        return metrics["loss"]

    return call, first, memory


def sft(arch: ArchConfig, dtype: str, rows: int, length: int) -> tuple[Any, float, int, float]:
    fns, tx = decoder_fns(arch, dtype=dtype, remat=False), optax.adamw(1e-5)
    tokens, mask = jnp.ones((rows, length), jnp.int32), jnp.ones((rows, length), jnp.bool_)
    step = make_sft_step(fns.logprob_fn, tx, accumulation=1)
    program = training(step, init_params(arch, jax.random.key(0)), tx, SFTBatch(tokens, mask, mask))
    return *program, 3 * batch_flops(arch, rows, length, logits=rows * length)


def reward(arch: ArchConfig, dtype: str, rows: int, length: int) -> tuple[Any, float, int, float]:
    fns, tx = decoder_fns(arch, dtype=dtype, remat=False), optax.adamw(1e-5)
    params = reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(1))
    tokens = jnp.ones((rows, 2, length), jnp.int32)
    ranks = jnp.tile(jnp.arange(2, dtype=jnp.int32), (rows, 1))
    batch = RankingBatch(tokens, tokens > 0, ranks, ranks >= 0, jnp.zeros(rows))
    step = make_reward_step(fns.score_fn, tx, center_coef=0.0, accumulation=1)
    return *training(step, params, tx, batch), 3 * batch_flops(arch, 2 * rows, length, logits=0)


def generation(arch: ArchConfig, dtype: str, rows: int, new: int) -> tuple[Any, float, int, float]:
    fns, prompt = decoder_fns(arch, dtype=dtype, remat=False).decode_fns, 16
    sampler = make_generate(fns, max_new_tokens=new, temperature=1.0, top_k=0, top_p=1.0, stop_tokens=(), pad_token=0)
    params, tokens = init_params(arch, jax.random.key(0)), jnp.ones((rows, prompt), jnp.int32)
    inputs = params, tokens, tokens > 0, answer_keys(jax.random.key(1), jnp.arange(rows), samples=1)
    program, first, memory = compiled(sampler, *inputs)
    return lambda: program(*inputs).tokens, first, memory, batch_flops(arch, rows, prompt + new, logits=rows * new)


SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[ArchConfig, str, int], tuple[Any, float, int, float]]]] = {
    "SFT step: tokens a row": ((128, 256, 512, 1024), lambda arch, dtype, n: sft(arch, dtype, 2, n)),
    "SFT step: rows": ((1, 2, 4, 8, 16), lambda arch, dtype, n: sft(arch, dtype, n, 128)),
    "SFT step: layers": ((2, 4, 8, 16), lambda arch, dtype, n: sft(replace(arch, num_layers=n), dtype, 4, 128)),
    "reward step: tokens a row": ((64, 128, 256, 512), lambda arch, dtype, n: reward(arch, dtype, 2, n)),
    "reward step: pairs": ((1, 2, 4, 8), lambda arch, dtype, n: reward(arch, dtype, n, 128)),
    "generation: tokens of an answer": ((32, 64, 128, 256), lambda arch, dtype, n: generation(arch, dtype, 16, n)),
    "generation: rows": ((4, 8, 16, 32), lambda arch, dtype, n: generation(arch, dtype, n, 64)),
}


def measure(points: list[Point], repeats: int) -> list[Timing]:
    """Measure all points in turn, so that a slower minute affects all of them."""
    times: list[list[float]] = [[] for _ in points]
    for _ in range(repeats + 1):
        for point, seconds in zip(points, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(point.call())
            seconds.append(time.perf_counter() - start)
    return [
        Timing(point.first + warm, statistics.median(rest), min(rest), max(rest))
        for point, (warm, *rest) in zip(points, times, strict=True)
    ]


def exponent(flops: list[float], values: list[float]) -> float:
    """Return the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(flops), np.log(values), 1)[0])


def main() -> None:
    args = arguments(__doc__, out="", sweeps="")
    arch = arch_of(args)
    results: dict[str, tuple[list[Point], list[Timing]]] = {}
    for name, (sizes, build) in SWEEPS.items():
        if args.sweeps not in name:
            continue
        points = [Point(size, *build(arch, args.dtype, size)) for size in sizes]
        times = measure(points, args.repeats)
        for point, timing in zip(points, times, strict=True):
            figures = {"size": point.size, "program_mb": round(point.memory / 2**20, 2), "gflop": point.flops / 1e9}
            report(name, timing.median, "seconds", timing, args, **figures)
        flops = [point.flops for point in points]
        grown = {
            "time": exponent(flops, [timing.median for timing in times]),
            "memory": exponent(flops, [float(point.memory) for point in points]),
        }
        for what, value in grown.items():
            report(f"{name}: growth of {what}", value, "power of FLOPs", times[-1], args)
        results[name] = points, times
    if args.out:
        draw(Path(args.out), results)


def draw(path: Path, results: dict[str, tuple[list[Point], list[Timing]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(results), figsize=(3 * len(results), 5.5), squeeze=False, layout="constrained"
    )
    for column, (name, (points, times)) in enumerate(results.items()):
        sizes, flops = [point.size for point in points], np.array([point.flops for point in points])
        rows = {"seconds": [timing.median for timing in times], "MB": [point.memory / 2**20 for point in points]}
        for axis, (unit, values) in zip(axes[:, column], rows.items(), strict=True):
            axis.loglog(sizes, values, "o-", label="measured")
            axis.loglog(sizes, values[-1] * flops / flops[-1], "--", color="grey", label="as its FLOPs")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.set_ylabel(unit)
        what, by = name.split(": ")
        axes[0, column].set_title(what, fontsize=10)
        axes[1, column].set_xlabel(by)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
