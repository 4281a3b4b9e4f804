"""The methods that benchmarks/algorithms.py compares, as flags over the quick start's settings."""

import os
from pathlib import Path
from typing import NamedTuple

from jrlhf.config import Config, load_config
from jrlhf.config.files import config_path

Flags = dict[str, str]


class Method(NamedTuple):
    """A method as a stage with its own settings."""

    stage: str
    flags: Flags
    reference_batches: int = 0
    """Number of batches that the reference reads before the first step."""


BATCHES = 60
"""Batches of an epoch of DPO: 475 rankings, 8 in each."""
RLOO = {
    "grpo.baseline": "leave_one_out",
    "grpo.scale": "false",
    "grpo.aggregation": "token",
    "grpo.kl.place": "reward",
    "grpo.kl.estimator": "k1",
}
DR_GRPO = {"grpo.scale": "false", "grpo.aggregation": "constant", "grpo.kl.coef": "0"}
METHODS = {
    "PPO": Method("ppo", {}),
    "PPO, shared critic": Method("ppo", {"ppo.value_from": "shared"}),
    "GRPO": Method("grpo", {}),
    "RLOO": Method("grpo", RLOO),
    "Dr. GRPO": Method("grpo", DR_GRPO),
    "DPO": Method("dpo", {}, reference_batches=BATCHES),
    "SimPO": Method("dpo", {"dpo.loss": "simpo", "dpo.beta": "2", "dpo.gamma": "1"}),
}
SFT, BEST_OF = "SFT", "best of n"
"""The model that all start from, and the search of its answers, beside the methods that train."""
SIZES = (4, 16)
"""Numbers of answers of best of n."""
READING = 1 / 3
"""CPU time in which the reference reads a batch, as a fraction of a training step: one of its three passes."""
HELDOUT = "heldout.jsonl"
"""File of the held-out prompts, in the folder of all output."""


def base_flags(folder: Path, seed: int) -> list[str]:
    """Return the flags of the pipeline that trains the quick start's SFT model and reward model."""
    recipe = str(config_path("quickstart/full.yaml"))
    return ["--config", recipe, "--run", str(folder), "--seed", str(seed), "--stages", "sft", "reward"]


def method_config(out: Path, name: str, seed: int, run: str, *, lr: float) -> Config:
    """Return the config of an endless run of a method, at ``lr`` times the quick start's learning rate.

    The rate is constant, since the run ends where its time is spent, which no schedule knows.
    """
    method, base = METHODS[name], out / f"seed{seed}"
    stage, quick = method.stage, load_config(config_path("quickstart/full.yaml"))
    rate = {"ppo": quick.ppo, "grpo": quick.grpo, "dpo": quick.dpo}[stage].optim.lr
    flags = {
        "run": str(base / run),
        "seed": str(seed),
        f"{stage}.model.path": str(base / "sft"),
        # The benchmark evaluates all methods in the same way; no stage does so itself.
        f"{stage}.prompts.eval": "",
        f"{stage}.optim.lr": repr(lr * rate),
        f"{stage}.optim.schedule": "constant",
        f"{stage}.optim.warmup": "0",
        f"{stage}.log.every": "1",
        f"{stage}.log.progress": "false",
        f"{stage}.log.tensorboard": "false",
        f"{stage}.checkpoint.every": "100000",
    }
    flags |= {"dpo.data.eval": ""} if stage == "dpo" else {f"{stage}.reward.path": str(base / "reward")}
    flags |= {"dpo.epochs" if stage == "dpo" else f"{stage}.iterations": "1000"}
    return load_config(config_path("quickstart/full.yaml"), {n: [v] for n, v in (flags | method.flags).items()})


def child_environment(out: Path) -> dict[str, str]:
    """Return the variables that jrlhf sets for itself, and a cache of compiled programs in ``out``."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | cache
