"""Seconds and peak host memory of reading a Hugging Face folder, of random weights in a Llama of the flags' sizes.

    python benchmarks/load.py --hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 16000

Linux only. The figure counts mapped files too, ``private`` does not; both are above what the process held before.
"""

import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from common import Timing, arch_of, arguments, report

from jrlhf.models import init_params, load_pretrained
from jrlhf.models.hf_write import write_folder
from jrlhf.models.names import language_model_table
from jrlhf.parallel import make_mesh


def resident() -> dict[str, int]:
    """Bytes in memory: private ("RssAnon") and all ("VmRSS")."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


class Watch(threading.Thread):
    """The highest figures while it runs, looked at every millisecond."""

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
    with TemporaryDirectory() as folder:
        params = init_params(arch, jax.random.key(0))
        write_folder(Path(folder), config, params, arch, language_model_table(arch), {}, Path(folder), ())
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        jax.tree.map(lambda leaf: leaf.delete(), params)
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
