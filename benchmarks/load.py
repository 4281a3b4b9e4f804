"""Measures seconds and peak host memory of reading a Hugging Face folder: a Llama of the flags' size, random weights.

    python benchmarks/load.py --hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 16000

Linux only. The figure includes mapped files, ``private`` does not; both exclude the memory from before.
"""

import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from common import Timing, arch_of, arguments, report, save_random_model

from jrlhf.models import load_pretrained
from jrlhf.parallel import make_mesh


def resident() -> dict[str, int]:
    """Return the bytes in memory: private ("RssAnon") and all ("VmRSS")."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


class Watch(threading.Thread):
    """Records the highest figures while it runs, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = resident()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.highest = {name: max(self.highest[name], value) for name, value in resident().items()}


def main() -> None:
    args = arguments(__doc__)
    arch = arch_of(args)
    with TemporaryDirectory() as folder:
        size = save_random_model(Path(folder), arch)
        mesh, before, watch = make_mesh(data=-1, fsdp=1, tensor=1), resident(), Watch()
        watch.start()
        start = time.perf_counter()
        model = load_pretrained(folder, dtype=args.dtype, mesh=mesh)
        jax.block_until_ready(model.params)
        seconds = time.perf_counter() - start
        watch.ended.set()
        watch.join()
        peaks = {name: (watch.highest[name] - before[name]) / size for name in before}
        timing = Timing(seconds, seconds, seconds, seconds)
        more = {
            "private": round(peaks["RssAnon"], 3),
            "parameters_mb": size // 2**20,
            "seconds_to_load": round(seconds, 2),
        }
        report("load_peak_memory", peaks["VmRSS"], "of the parameters' size", timing, args, **more)


if __name__ == "__main__":
    main()
