"""What is compared: each work's sizes, equal for all sides, and what it takes at least."""

import math
import random
from argparse import Namespace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from common import SHAPES, arch_of_shape, batch_flops
from ppo_iteration import iteration_flops

from jrlhf.models import flops as model_flops

DTYPES = ("float32", "bfloat16")


class Work(NamedTuple):
    title: str
    unit: str
    """What is counted a second; PPO's figure is seconds an iteration."""
    sides: tuple[str, ...]
    """Who can do it, in the order of a round."""
    calls: int
    """Calls a round."""


STEPS = {
    "sft": Work("SFT step", "tokens", ("jrlhf", "trl", "tunix"), 4),
    "sft-lora": Work("SFT step, LoRA of rank 8", "tokens", ("jrlhf", "trl"), 4),
    "reward": Work("reward step, pairs", "pairs", ("jrlhf", "trl", "tunix"), 3),
    "reward-k4": Work("reward step, rankings of 4", "pairs", ("jrlhf",), 3),
    "generate": Work("generation", "new tokens", ("jrlhf", "trl", "tunix"), 4),
    "generate-stops": Work("generation, answers that stop", "new tokens", ("jrlhf", "trl", "tunix"), 4),
    "ppo": Work("PPO iteration", "iterations", ("jrlhf", "trl-ppo", "tunix"), 1),
    "ppo-shared": Work("PPO iteration, critic on the policy's network", "iterations", ("jrlhf",), 1),
}
"""What compare.py compares."""
ROLLOUT_SIDES = ("jrlhf", "vllm", "trl", "tunix")
ROLLOUTS = {
    "rollout-64": Work("one answer a prompt, 64 slots", "new tokens", ROLLOUT_SIDES, 1),
    "rollout-16": Work("one answer a prompt, 16 slots", "new tokens", ROLLOUT_SIDES, 1),
    "rollout-4x64": Work("four answers a prompt, 64 slots", "new tokens", ROLLOUT_SIDES, 1),
    "rollout-4x16": Work("four answers a prompt, 16 slots", "new tokens", ROLLOUT_SIDES, 1),
}
"""What rollouts.py compares."""
RAGGED_PPO = {
    "ppo-ragged": Work("PPO iteration", "iterations", ("jrlhf",), 1),
    "ppo-ragged-lean": Work("PPO iteration, one epoch, critic on the policy's network", "iterations", ("jrlhf",), 1),
}
"""Iterations around a rollout, which rollouts.py compares with those of an earlier commit."""
WORKS = STEPS | ROLLOUTS | RAGGED_PPO
PPO_EPOCHS = 4
OPTIMIZER = {"lr": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}


class Case(NamedTuple):
    work: str
    shape: str
    dtype: str


def spec(case: Case) -> dict[str, Any]:
    """All that a side is told."""
    tiny, quarter = case.shape == "XS", case.shape == "M"
    share = 4 if quarter or tiny else 1
    told: dict[str, Any] = {**case._asdict(), "sizes": SHAPES[case.shape], "optimizer": OPTIMIZER}
    length, prompt = (32, 8) if tiny else (256, 64)
    match case.work:
        case "sft" | "sft-lora":
            told |= {"rows": 8 // share, "length": length, "rank": 8 if case.work == "sft-lora" else 0, "alpha": 16.0}
        case "reward":
            told |= {"rows": 8 // share, "completions": 2, "length": length}
        case "reward-k4":
            told |= {"rows": 4 // share, "completions": 4, "length": length}
        case "generate" | "generate-stops":
            told |= answers(32 // share, prompt, prompt, stops=case.work == "generate-stops")
        case "ppo" | "ppo-shared":
            shared = {"value_from": "shared" if case.work == "ppo-shared" else "auto"}
            told |= answers(32 // share, prompt, prompt, stops=False) | {"epochs": PPO_EPOCHS} | shared
        case "ppo-ragged" | "ppo-ragged-lean":
            lean = case.work == "ppo-ragged-lean"
            slots = 4 if tiny else 16
            told |= {"slots": slots} | ragged_answers(4 * slots, 1, prompt, 16 if tiny else 256)
            told |= {"epochs": 1 if lean else PPO_EPOCHS, "value_from": "shared" if lean else "auto"}
        case _:
            samples, slots = rollout_of(case.work)
            count, new = (48, 128) if case.shape == "M" else (128, 16 if tiny else 256)
            told |= {"samples": samples, "slots": min(slots, count)} | ragged_answers(count, samples, prompt, new)
    return told


def rollout_of(work: str) -> tuple[int, int]:
    """Answers to a prompt and slots of a work of ``ROLLOUTS``."""
    *samples, slots = map(int, work.removeprefix("rollout-").split("x"))
    return samples[0] if samples else 1, slots


def ragged_answers(count: int, samples: int, prompt: int, new: int) -> dict[str, Any]:
    """Answers in any order of lengths: log-normal with sigma 0.7, a quarter of the limit in the middle, 2 at least."""
    normal = NormalDist(math.log(new / 4), 0.7)
    lengths = [min(max(round(math.exp(normal.inv_cdf((i + 0.5) / count))), 2), new) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return {"rows": count // samples, "prompt": prompt, "new": new, "lengths": lengths}


def batch_occupancy(told: dict[str, Any]) -> float:
    """The share of slots whose decoding step draws a token where a rollout is drawn in batches of ``slots`` answers."""
    lengths = np.asarray(told["lengths"]).reshape(-1, told["slots"])
    return float((lengths - 1).sum() / (lengths.shape[1] * (lengths.max(axis=1) - 1).sum()))


def answers(rows: int, prompt: int, new: int, *, stops: bool) -> dict[str, Any]:
    """Prompts and answers of so many tokens each.

    With ``stops`` the answers' lengths are log-normal, about 3/8 of the limit in the middle, and the same every time:
    each row's prompt is so much shorter than the others as its answer is longer, so that all stop at one position.
    """
    lengths = [new] * rows
    if stops:
        normal = [NormalDist(math.log(new * 3 / 8), 0.6).inv_cdf((i + 0.5) / rows) for i in range(rows)]
        lengths = [min(max(round(math.exp(x)), new // 16, 1), new) for x in normal]
        random.Random(0).shuffle(lengths)
    stop_at = prompt + min(lengths) if stops else 0
    prompts = [stop_at - length for length in lengths] if stops else [prompt] * rows
    sizes = {"rows": rows, "prompt": prompt, "new": new}
    return sizes | {"prompts": prompts, "lengths": lengths, "stop_at": stop_at}


def units(case: Case) -> int:
    """What a call does, in the work's unit."""
    told = spec(case)
    match case.work:
        case "sft" | "sft-lora":
            return told["rows"] * told["length"]
        case "reward" | "reward-k4":
            return told["rows"] * math.comb(told["completions"], 2)
        case "ppo" | "ppo-shared" | "ppo-ragged" | "ppo-ragged-lean":
            return 1
        case _:
            return sum(told["lengths"])


def flops(case: Case) -> float:
    """Model FLOPs of a call; attention halved for causality, log-probs where they are needed."""
    told, model = spec(case), arch_of_shape(case.shape)
    match case.work:
        case "sft" | "sft-lora":
            tokens = told["rows"] * told["length"]
            # Frozen weights get no gradient: a third of the work is not there.
            return (2 if told["rank"] else 3) * batch_flops(model, told["rows"], told["length"], logits=tokens)
        case "reward" | "reward-k4":
            return 3 * batch_flops(model, told["rows"] * told["completions"], told["length"], logits=0)
        case "ppo" | "ppo-shared":
            args = Namespace(prompt=told["prompt"], new=told["new"], episodes=told["rows"], epochs=told["epochs"])
            return iteration_flops(model, args, shared=case.work == "ppo-shared")
        case _:
            rows = zip(told["prompts"], told["lengths"], strict=True)
            return sum(batch_flops(model, 1, prompt + length, logits=length) for prompt, length in rows)


def decode_bytes(case: Case) -> float:
    """The least that a generation must read: weights once a step, each row's cache as far as it is filled."""
    told, model = spec(case), arch_of_shape(case.shape)
    rows = zip(told["prompts"], told["lengths"], strict=True)
    fed = np.concatenate([np.arange(prompt, prompt + length - 1) for prompt, length in rows])
    steps, itemsize = max(told["lengths"]) - 1, 4 if case.dtype == "float32" else 2
    return float(model_flops.decode_bytes(model, fed, steps=steps, itemsize=itemsize, kv_cache="compute"))
