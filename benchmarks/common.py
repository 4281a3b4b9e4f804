"""Shared parts of the benchmarks: flags, timing without compilation, measured peaks, and one JSON line per figure."""

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.models import ArchConfig, init_params
from jrlhf.models.flops import forward_flops
from jrlhf.models.hf.names import language_model_table
from jrlhf.models.hf.write import write_folder
from jrlhf.parallel.devices.estimate import estimate
from jrlhf.parallel.devices.peaks import Peaks, known_chip, known_peaks, measured_peaks
from jrlhf.parallel.devices.topology import Topology

SHAPES = {
    # hidden, layers, heads, key-value heads, feed-forward, vocabulary, tied
    "XS": (64, 5, 8, 4, 172, 512, True),  # the quick start's model
    "S": (384, 6, 6, 6, 1024, 8192, False),
    "M": (576, 30, 9, 3, 1536, 49152, True),  # SmolLM2-135M
    "1B": (2048, 16, 32, 8, 8192, 128256, True),  # Llama 3.2
    "3B": (3072, 28, 24, 8, 8192, 128256, True),  # Llama 3.2
}


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Read the flags of every benchmark, and one more for each of ``defaults``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--shape", default="S", choices=SHAPES, help="sizes of the model; the next flags override one each"
    )
    for name in ("hidden", "layers", "heads", "kv-heads", "ffn", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "xla", "cudnn", "splash"),
        help="implementation of attention in training",
    )
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--device", default=None, help="JAX platform: cpu, gpu or tpu; default: JAX's choice")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed calls, after one that compiles and one that warms up"
    )
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = parser.parse_args()
    if args.device:
        # Add the CPU: comparisons with it run there.
        jax.config.update("jax_platforms", {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}.get(args.device, args.device))
    return args


def arch_of(args: argparse.Namespace) -> ArchConfig:
    """Return the architecture of the Llama that the flags describe."""
    hidden, layers, heads, kv_heads, ffn, vocab, tied = SHAPES[args.shape]
    hidden, heads = args.hidden or hidden, args.heads or heads
    return ArchConfig(
        vocab_size=args.vocab or vocab,
        hidden_size=hidden,
        intermediate_size=args.ffn or ffn,
        num_layers=args.layers or layers,
        num_heads=heads,
        num_kv_heads=args.kv_heads or kv_heads,
        head_dim=hidden // heads,
        max_positions=65536,
        tie_embeddings=tied,
    )


def arch_of_shape(shape: str) -> ArchConfig:
    """Return the architecture of one of ``SHAPES``."""
    return arch_of(argparse.Namespace(shape=shape, hidden=0, layers=0, heads=0, kv_heads=0, ffn=0, vocab=0))


def save_random_model(folder: Path, arch: ArchConfig) -> int:
    """Write a Llama with random weights as a Hugging Face folder without a tokenizer; return the bytes of its
    parameters."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tie_embeddings,
    }
    params = init_params(arch, jax.random.key(0))
    write_folder(folder, config, params, arch, language_model_table(arch), {}, folder, ())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    return size


def batch_flops(arch: ArchConfig, rows: int, length: int, *, logits: int) -> float:
    """Return the model FLOPs of a forward pass over full rows with logits at ``logits`` positions."""
    return rows * float(forward_flops(arch, np.arange(length), logits=logits / rows))


class Timing(NamedTuple):
    """Seconds of a call. ``first`` covers tracing, compilation and one call."""

    first: float
    median: float
    low: float
    high: float


def measure(call: Callable[[], Any], *, repeats: int) -> Timing:
    """Time ``call``, which returns device arrays, until they are ready."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = once()
    once()
    times = [once() for _ in range(repeats)]
    return Timing(first, statistics.median(times), min(times), max(times))


class Program:
    """A jitted function that is compiled in its first call, and whose compiled program can be read afterwards."""

    def __init__(self, jitted: Any) -> None:
        self.jitted, self.compiled = jitted, None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            self.compiled = self.jitted.lower(*args).compile()
        return self.compiled(*args)

    def hlo(self) -> str:
        if self.compiled is None:
            raise ValueError("the program has not been called")
        return self.compiled.as_text()


def beside_estimate(
    seconds: float, *programs: Program, trips: int = 1, kind: str | None = None, name: str = ""
) -> dict[str, float]:
    """Return the estimated seconds of programs, and the measured ones as a multiple of them; nothing where the device
    has no data sheet.

    ``trips`` is that of loops whose end depends on data, ``kind`` JAX's name of a device other than this one, and
    ``name`` precedes the names of the figures.
    """
    chip = known_chip(jax.devices()[0].device_kind if kind is None else kind)
    if chip is None:
        return {}
    device = Topology(chip.name, 1, chip, real=kind is None)
    estimated = sum(estimate(program.hlo(), device, trips=trips).seconds for program in programs)
    return {f"{name}estimated_seconds": estimated, f"{name}measured_over_estimated": round(seconds / estimated, 3)}


def peaks_of(dtype: str) -> Peaks:
    """Measure the peaks of this device in this run. Only large sizes keep an accelerator busy."""
    size, megabytes = (2048, 256) if jax.default_backend() == "cpu" else (8192, 4096)
    return measured_peaks(dtype, size=size, megabytes=megabytes, repeats=9)


def report(figure: str, value: float, unit: str, timing: Timing, args: argparse.Namespace, **more: Any) -> None:
    """Print one figure as a JSON line, with its hardware, versions and flags."""
    device = jax.devices()[0]
    line = {
        "figure": figure,
        "value": round(value, 4),
        "unit": unit,
        "seconds": timing._asdict(),
        **more,
        "peak_memory_mb": peak_memory(),
        "flags": {k: v for k, v in vars(args).items() if v is not None},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(line, default=float), flush=True)


def shares(flops: float, seconds: float, peaks: Peaks) -> dict[str, float]:
    """Return fractions of the measured peak, and on a known accelerator of the peak on its data sheet."""
    known = known_peaks(jax.devices()[0].device_kind, 1)
    mfu = {} if known is None else {"mfu": round(flops / seconds / known.flops, 4)}
    return mfu | {
        "gflops": round(flops / seconds / 1e9, 2),
        "share_of_matmul_peak": round(flops / seconds / peaks.flops, 4),
        "matmul_peak_gflops": round(peaks.flops / 1e9, 1),
    }


def peak_memory() -> int:
    """Return the peak memory in MB: of the device if it reports one, else of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor()


class Spent(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float
    """Over all cores: on a machine that others use too, what it would take alone is this over the cores that it
    keeps busy."""


def run_once(out: Path, command: str, *arguments: str, cwd: Path | None = None) -> Spent:
    """Run a jrlhf command, unless it has finished in an earlier call; return what it took."""
    done = out / f"{command}.spent.json"
    if not done.is_file():
        start, used = time.perf_counter(), children_cpu_seconds()
        subprocess.run([sys.executable, "-m", "jrlhf", command, *arguments], check=True, stdout=sys.stderr, cwd=cwd)
        spent = Spent(round(time.perf_counter() - start, 1), round(children_cpu_seconds() - used, 1))
        done.write_text(json.dumps(spent._asdict()) + "\n", encoding="utf-8")
    return Spent(**json.loads(done.read_text(encoding="utf-8")))


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
