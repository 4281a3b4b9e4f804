"""Compares ``jrlhf plan`` with the peak memory of a real run, and measures the planning time of large models.

    python benchmarks/plan.py --work measured --out DIR
    python benchmarks/plan.py --work big --out DIR

``measured``: SFT and PPO of a Llama with 100 MB of parameters on 8 simulated CPU devices: the plan, and the growth of
the process's resident memory until the first checkpoint (which copies to the host); an earlier run has compiled the
programs. ``big``: SFT and PPO of Llama-3's sizes by their config.json on TPUs and H100s, by the compilers that are
installed, and the seconds of each plan.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

DEVICES = 8
LENGTH, PROMPT, NEW = 128, 32, 32
LLAMA3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
}
REWARD = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
SIZES = {
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "70B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}
PLANS = (
    # Model, topology, fsdp, tensor.
    ("1B", "v5e-16", 16, 1),
    ("8B", "v6e-16", 8, 2),
    ("8B", "v5p-64", 32, 1),
    ("8B", "h100x8", 8, 1),
    ("70B", "v5p-256", 32, 4),
)
BIG = """
mesh: {{data: -1, fsdp: {fsdp}, tensor: {tensor}}}
sft:
  model: {{path: {model}, dtype: bfloat16}}
  data: {{train: rows.jsonl, max_length: 2048}}
  batch_size: {sft_rows}
  pack_length: 2048
ppo:
  model: {{path: {model}, dtype: bfloat16}}
  reward: {{path: {model}-reward, dtype: bfloat16}}
  prompts: {{train: prompts.jsonl, max_length: 512}}
  sampling: {{max_new_tokens: 512}}
  episodes: {episodes}
"""
SFT_ROWS, EPISODES = 4, 16
"""Rows and episodes of a device."""
SMALL = """
run: {out}/run
mesh: {{data: 1, fsdp: {devices}, tensor: 1}}
sft:
  model: {{path: {out}/model}}
  data: {{train: {out}/text.jsonl, max_length: {length}, buckets: 1, cache: ""}}
  batch_size: 16
  microbatch: 2
  log: {{progress: false, tensorboard: false, every: 1}}
  checkpoint: {{every: 1000}}
ppo:
  model: {{path: {out}/model}}
  reward: {{path: {out}/reward}}
  prompts: {{train: {out}/prompts.jsonl, max_length: {prompt}, buckets: 1, cache: ""}}
  sampling: {{max_new_tokens: {new}}}
  iterations: 2
  episodes: 16
  epochs: 1
  microbatch: 2
  log: {{progress: false, tensorboard: false, every: 1}}
  checkpoint: {{every: 1000}}
"""


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """Return the peak of the bytes of this process in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_small(out: Path) -> None:
    """Write the models, rows longer than all limits, and the config."""
    import jax
    from common import save_random_model

    from jrlhf import assets
    from jrlhf.models import ArchConfig, load_pretrained, reward_from_pretrained, save_reward_model

    arch = ArchConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        max_positions=1024,
        tie_embeddings=True,
    )
    (out / "model").mkdir(parents=True, exist_ok=True)
    save_random_model(out / "model", arch)
    tokenizer = [file for file in Path(assets.resolve("asset:stories260k")).iterdir() if "token" in file.name]
    for file in tokenizer:
        shutil.copy(file, out / "model")
    reward = reward_from_pretrained(load_pretrained(out / "model", dtype="float32"), jax.random.key(0))
    save_reward_model(replace(reward, config=reward.config | {"pad_token_id": 0}), out / "reward")
    for file in tokenizer:
        shutil.copy(file, out / "reward")
    line = "once upon a time there was a little girl who liked to play outside "
    (out / "text.jsonl").write_text("".join(json.dumps({"text": line * 40}) + "\n" for _ in range(32)))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line * 40}) + "\n" for _ in range(32)))
    text = SMALL.format(out=out, devices=DEVICES, length=LENGTH, prompt=PROMPT, new=NEW)
    (out / "small.yaml").write_text(text)


def run_stage(out: Path, stage: str) -> None:
    """Run a stage in this process until its first checkpoint, and print the memory that it used."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from jrlhf.config import load_config
    from jrlhf.data import load_sft, load_tokenizer
    from jrlhf.runs.checkpoints import Checkpoints
    from jrlhf.stages.ppo import run_ppo
    from jrlhf.stages.sft import run_sft

    jax.block_until_ready(jax.numpy.zeros(8))
    config = load_config(out / "small.yaml")
    # Late imports of libraries must not count as growth.
    tokenizer = load_tokenizer(str(out / "model"))
    load_sft(config.sft.data, config.sft.data.train, tokenizer, train_on="all")

    save = Checkpoints.save

    def stop(checkpoints: Checkpoints, step: int, *arguments: Any, **named: Any) -> None:
        if step == 0:  # the checkpoint before the first step
            return save(checkpoints, step, *arguments, **named)
        print(json.dumps({"resident": highest() - before}), flush=True)
        os._exit(0)

    Checkpoints.save = stop
    before = resident()
    {"sft": run_sft, "ppo": run_ppo}[stage](config)


def measure(out: Path) -> None:
    """Print a JSON line each for SFT and PPO: predicted and measured bytes of the whole process."""
    write_small(out)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Return freed memory to the system at once, so that resident memory is memory in use.
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    planned = plan(out / "small.yaml", f"cpu:{DEVICES}", out)
    for stage in planned["stages"]:
        command = [sys.executable, __file__, "--stage", stage["name"], "--out", str(out)]
        for _ in range(2):  # the second run uses the programs of the first
            shutil.rmtree(out / "run", ignore_errors=True)
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=1800)
        found = json.loads(done.stdout.splitlines()[-1])["resident"]
        predicted = stage["peak"] * DEVICES
        line = {
            "stage": stage["name"],
            "predicted_mb": round(predicted / 1e6),
            "measured_mb": round(found / 1e6),
            "ratio": round(predicted / found, 3),
            "peak_in": stage["peak_in"],
            "state_mb": round(sum(stage["held"].values()) * DEVICES / 1e6),
        }
        print(json.dumps(line), flush=True)


def plan(config: Path, topology: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jrlhf", "plan", "--config", str(config), "--topology", topology]
    subprocess.run([*command, "--out", str(out / "plan.json")], check=True, stdout=subprocess.DEVNULL, timeout=3600)
    return json.loads((out / "plan.json").read_text())


def plan_big(out: Path, only: str) -> None:
    """Print a JSON line for each stage of each plan; CPU seconds are those of a plan on an idle machine."""
    from common import children_cpu_seconds

    for size, sizes in SIZES.items():
        for name, kind in ((size, {}), (f"{size}-reward", REWARD)):
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / "config.json").write_text(json.dumps(LLAMA3 | sizes | kind))
    for size, topology, fsdp, tensor in PLANS:
        if only not in f"{size} {topology}":
            continue
        config = out / f"{size}.yaml"
        rows = {"sft_rows": SFT_ROWS * fsdp, "episodes": EPISODES * fsdp}
        config.write_text(BIG.format(model=out / size, fsdp=fsdp, tensor=tensor, **rows))
        start, used = time.perf_counter(), children_cpu_seconds()
        planned = plan(config, topology, out)
        took = {"planned_in": round(time.perf_counter() - start), "cpu_seconds": round(children_cpu_seconds() - used)}
        about = {"model": size, "topology": topology, "mesh": planned["mesh"], "compiler": planned["compiler"]}
        for stage in planned["stages"]:
            print(json.dumps(about | stage_line(stage) | took), flush=True)


def stage_line(stage: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a stage in GB of a device and in seconds."""
    line = {"stage": stage["name"], "batch": stage["batch"]}
    line |= {name: round(stage["held"].get(name, 0) / 1e9, 2) for name in ("trained", "optimizer", "loaded")}
    line |= {name: round(stage[name] / 1e9, 2) for name in ("cache", "temporaries", "peak", "memory")}
    line |= {name: stage[name] for name in ("peak_in", "fits", "fitting_batch", "seconds", "estimate")}
    return line | {"sent": {axes: round(size / 1e9, 1) for axes, size in stage["sent"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", choices=("", "measured", "big"))
    parser.add_argument(
        "--stage", default="", choices=("", "sft", "ppo"), help="(internal: the stage of a child process)"
    )
    parser.add_argument(
        "--only", default="", help="run only the big plans with this text in their name, such as '8B v5p'"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for models, runs and plans")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        run_stage(out, args.stage)
    elif args.work == "big":
        plan_big(out, args.only)
    else:
        measure(out)


if __name__ == "__main__":
    main()
