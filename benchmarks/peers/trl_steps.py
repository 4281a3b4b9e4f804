"""TRL's side: its trainers, held at the end of each step, and Hugging Face's generate. See protocol.py.

    python -m peers.trl_steps SPEC      (in benchmarks/; compare.py starts it)

PPO is in the environment of trl-ppo.txt alone: TRL took its trainer away after 1.12.
"""

import itertools
import os
import platform
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import datasets
import numpy as np
import torch
import transformers
from peers.llama import llama, size
from peers.protocol import Rounds, median_seconds, open_rounds, read_spec, repeat
from peers.tokenizer import PAD, make_tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

STEPS = 10**6
"""More than anybody waits for: the trainer is ended from its callback."""
ROWS = 256
"""Batches in the data set, which is then begun again."""


def main() -> None:
    spec, rounds = read_spec(), open_rounds()
    torch.manual_seed(0)
    match spec["work"]:
        case "peaks":
            peaks(rounds, spec)
        case "sft" | "sft-lora":
            sft(rounds, spec)
        case "reward":
            reward(rounds, spec)
        case "generate" | "generate-stops":
            generate(rounds, spec)
        case "ppo":
            with TemporaryDirectory() as folder:
                ppo(rounds, spec, Path(folder))
        case _:
            rollout(rounds, spec)


def facts(parameters: int, trained: int, setting: str) -> dict[str, Any]:
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl")]
    versions = ", ".join([f"Python {platform.python_version()}", *versions])
    return {"parameters": parameters, "trained": trained, "versions": versions, "setting": setting}


def peaks(rounds: Rounds, spec: dict[str, Any], *, side: int = 2048, megabytes: int = 256) -> None:
    """What torch makes of a matrix product and of an array copied; sizes as in common.py."""
    squares = {dtype: torch.randn(side, side).to(getattr(torch, dtype)) for dtype in spec["dtypes"]}
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)

    def call() -> dict[str, Any]:
        products = {dtype: 2 * side**3 / median_seconds(lambda x=x: x @ x) for dtype, x in squares.items()}
        return {"flops": products, "bytes": 2 * source.nbytes / median_seconds(lambda: target.copy_(source))}

    rounds.start(**facts(0, 0, "eager"))
    repeat(rounds, call)


def tokens(spec: dict[str, Any], rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, spec["sizes"][5], (rows, length))


class Held(TrainerCallback):
    """Ticks at the end of each step."""

    def __init__(self, rounds: Rounds, start: dict[str, Any]) -> None:
        self.rounds, self.start = rounds, start

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.rounds.start(**self.start)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rounds.tick()


def training(spec: dict[str, Any], folder: str, **options: Any) -> dict[str, Any]:
    """TRL's plain setting, but nothing recomputed: AdamW and clipping as everybody's, no evaluation, no saving."""
    adam = spec["optimizer"]
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "learning_rate": adam["lr"],
        "adam_beta1": adam["b1"],
        "adam_beta2": adam["b2"],
        "adam_epsilon": adam["eps"],
        "weight_decay": adam["weight_decay"],
        "max_grad_norm": adam["max_grad_norm"],
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }


def setting(spec: dict[str, Any], what: str) -> str:
    computed = "bfloat16 autocast (`bf16=True`)" if spec["dtype"] == "bfloat16" else "float32"
    return f"float32 parameters, computed in {computed}; {what}, `gradient_checkpointing=False`, SDPA attention"


def sft(rounds: Rounds, spec: dict[str, Any]) -> None:
    from trl import SFTConfig, SFTTrainer

    data = {"input_ids": tokens(spec, ROWS * spec["rows"], spec["length"]).tolist()}
    with TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": spec["rows"], "max_length": spec["length"], "max_steps": STEPS}
        trainer = SFTTrainer(
            model=llama(spec, LlamaForCausalLM),
            args=SFTConfig(**training(spec, folder, **batch)),
            train_dataset=datasets.Dataset.from_dict(data),
            processing_class=make_tokenizer(spec["sizes"][5]),
            peft_config=lora(spec) if spec["rank"] else None,
        )
        run(rounds, trainer, setting(spec, "`SFTTrainer`" + (" with PEFT" if spec["rank"] else "")))


def lora(spec: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")


def run(rounds: Rounds, trainer: Any, how: str) -> None:
    start = facts(size(trainer.model), size(trainer.model, trained=True), how)
    trainer.add_callback(Held(rounds, start))
    trainer.train()


def reward(rounds: Rounds, spec: dict[str, Any]) -> None:
    from trl import RewardConfig, RewardTrainer

    rows = ROWS * spec["rows"]
    data = {
        "chosen_ids": tokens(spec, rows, spec["length"]).tolist(),
        "rejected_ids": tokens(spec, rows, spec["length"], seed=1).tolist(),
    }
    with TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": spec["rows"], "max_length": spec["length"], "max_steps": STEPS}
        trainer = RewardTrainer(
            model=llama(spec, LlamaForSequenceClassification, num_labels=1),
            args=RewardConfig(**training(spec, folder, **batch)),
            train_dataset=datasets.Dataset.from_dict(data),
            processing_class=make_tokenizer(spec["sizes"][5]),
        )
        run(rounds, trainer, setting(spec, "`RewardTrainer`"))


def generate(rounds: Rounds, spec: dict[str, Any]) -> None:
    model = llama(spec, LlamaForCausalLM).to(getattr(torch, spec["dtype"])).eval()
    columns, starts = torch.arange(spec["prompt"]), spec["prompt"] - torch.tensor(spec["prompts"])[:, None]
    mask = (columns >= starts).long()
    lengths, total = torch.tensor(spec["lengths"]), spec["prompt"] + spec["new"]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": spec["new"]}
    if spec["stop_at"]:
        stops = [lambda ids, scores, **rest: ids.shape[1] - spec["prompt"] >= lengths]
        options["stopping_criteria"] = transformers.StoppingCriteriaList(stops)
    seeds = itertools.count()

    def call() -> dict[str, Any]:
        prompts = torch.from_numpy(tokens(spec, *mask.shape, seed=next(seeds))) * mask
        with torch.no_grad():
            drawn = model.generate(prompts, attention_mask=mask, eos_token_id=None, pad_token_id=PAD, **options)
        assert drawn.shape[1] == total
        return {"tokens": int(lengths.sum())}

    how = f"{spec['dtype']} parameters; `generate` with its dynamic cache, SDPA attention"
    rounds.start(**facts(size(model), 0, how))
    repeat(rounds, call)


def rollout(rounds: Rounds, spec: dict[str, Any]) -> None:
    """Batches of ``slots`` answers; a batch ends with its longest one."""
    model = llama(spec, LlamaForCausalLM).to(getattr(torch, spec["dtype"])).eval()
    batches = torch.tensor(spec["lengths"]).split(spec["slots"])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": spec["new"]}
    seeds = itertools.count()

    def call() -> dict[str, Any]:
        rows = tokens(spec, spec["rows"], spec["prompt"], seed=next(seeds)).repeat(spec["samples"], axis=0)
        for lengths, prompts in zip(batches, torch.from_numpy(rows).split(spec["slots"]), strict=True):
            stops = [lambda ids, scores, lengths=lengths, **rest: ids.shape[1] - spec["prompt"] >= lengths]
            criteria = transformers.StoppingCriteriaList(stops)
            with torch.no_grad():
                drawn = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    eos_token_id=None,
                    pad_token_id=PAD,
                    stopping_criteria=criteria,
                    **options,
                )
            assert drawn.shape[1] == spec["prompt"] + lengths.max()
        return {"tokens": sum(spec["lengths"])}

    how = f"{spec['dtype']} parameters; `generate` with its dynamic cache, SDPA attention, a batch after the other"
    rounds.start(**facts(size(model), 0, how))
    repeat(rounds, call)


def ppo(rounds: Rounds, spec: dict[str, Any], folder: Path) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = tokens(spec, ROWS * spec["rows"], spec["prompt"])
    data = datasets.Dataset.from_dict({"input_ids": prompts.tolist()})
    options = {
        "per_device_train_batch_size": spec["rows"],
        "local_rollout_forward_batch_size": spec["rows"],
        "num_mini_batches": 1,
        "num_ppo_epochs": spec["epochs"],
        "total_episodes": STEPS * spec["rows"],
        "response_length": spec["new"],
        "temperature": 1.0,
        "num_sample_generations": 0,
    }
    policy, reference = (llama(spec, LlamaForCausalLM) for _ in range(2))
    scorer, value = (llama(spec, LlamaForSequenceClassification, num_labels=1) for _ in range(2))
    trainer = PPOTrainer(
        args=PPOConfig(**training(spec, str(folder), **options)),
        processing_class=make_tokenizer(spec["sizes"][5], padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(spec["rows"])),
    )
    models = size(policy, reference, scorer, value)
    start = facts(models, size(trainer.model, trained=True), setting(spec, "`PPOTrainer`"))
    trainer.add_callback(Held(rounds, start))
    trainer.train()


if __name__ == "__main__":
    main()
