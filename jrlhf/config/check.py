"""What a config's values must satisfy, alone and together, before any device or file is touched. Imports no JAX."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

from jrlhf.config.errors import LOGIN, ConfigError
from jrlhf.config.gates import FORM, is_gate
from jrlhf.config.rewards_check import rewards_rules
from jrlhf.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    OptimConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.config.tools import (
    GenerateConfig,
    QuickstartConfig,
    RankConfig,
    SampleConfig,
    ScoreConfig,
    ShowConfig,
    VerifyConfig,
)
from jrlhf.config.watch_check import canary_rules, guards_rules, safety_rules

Rule = tuple[bool, str, Any, str]
"""Whether it holds, the field's name, its value, and what the value must be."""


def check(config: Any) -> None:
    """ConfigError with every field whose value is out of range or does not fit another's, one a line."""
    rules = (*_no_logins(config), *_rules(config))
    problems = [f"{name}: must be {must}, got {value!r}" for holds, name, value, must in rules if not holds]
    if problems:
        raise ConfigError("\n".join(problems))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every field that is no section."""
    for field in fields(config):
        value = vars(config)[field.name]
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _no_logins(config: Any) -> Iterator[Rule]:
    """A run writes its config into its folder, its checkpoints and its report: no place for a password."""
    for name, value in leaves(config):
        yield not LOGIN.search(str(value)), name, value, "without a user and password"


def _run_folder(name: str, path: str) -> Iterator[Rule]:
    """A run is where its name says: what another program would decode or resolve to a folder elsewhere is refused."""
    yield bool(path.strip()) and "\0" not in path and "://" not in path, name, path, "a folder"
    climbs = ".." in PurePath(unquote(path)).parts
    yield not climbs, name, path, "without '..'; a folder elsewhere has an absolute path"


def _rules(config: Any) -> Iterator[Rule]:
    match config:
        case Config():
            if isinstance(config, PlanConfig):
                yield config.completions >= 2, "completions", config.completions, "2 or more"
            yield from _run_folder("run", config.run)
            yield _seed(config.seed)
            yield from _mesh("mesh", config.mesh)
            yield from _distributed("distributed", config.distributed)
            yield from safety_rules("safety", config.safety)
            yield from _sft("sft", config.sft)
            yield from _reward("reward", config.reward)
            yield from _ppo("ppo", config.ppo)
        case QuickstartConfig():
            yield from _run_folder("out", config.out)
            yield _seed(config.seed)
        case GenerateConfig():
            if isinstance(config, SampleConfig):
                yield 2 <= config.samples <= 9, "samples", config.samples, "from 2 to 9"
                temperature = config.sampling.temperature
                yield temperature != 0, "sampling.temperature", temperature, "above 0: without it all answers are one"
            yield config.samples >= 1, "samples", config.samples, "1 or more"
            yield _seed(config.seed)
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
            yield from _sampling("sampling", config.sampling)
        case RankConfig():
            yield bool(config.tasks.strip()), "tasks", config.tasks, "a file"
            yield bool(config.host.strip()), "host", config.host, "an address"
            yield 0 <= config.port < 2**16, "port", config.port, "from 0 to 65535"
            modes = [bool(config.export), bool(config.import_from), config.report]
            yield sum(modes) <= 1, "report", config.report, "alone: export, import_from and report are one at a time"
            moves = bool(config.export or config.import_from)
            yield moves or config.format == "ranking", "format", config.format, "given with export or import_from"
        case ScoreConfig():
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case ShowConfig():
            yield config.rows >= 0, "rows", config.rows, "0 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case VerifyConfig():
            yield _seed(config.seed)
            yield config.temperature > 0, "temperature", config.temperature, "above 0"
            yield config.max_new_tokens >= 1, "max_new_tokens", config.max_new_tokens, "1 or more"
            yield config.batch_size >= 1, "batch_size", config.batch_size, "1 or more"
            yield config.max_length >= 1, "max_length", config.max_length, "1 or more"
        case _:
            return


def _seed(seed: int) -> Rule:
    return 0 <= seed < 2**32, "seed", seed, "from 0 to 2³² - 1"


def _mesh(path: str, mesh: MeshConfig) -> Iterator[Rule]:
    yield mesh.data >= 1 or mesh.data == -1, f"{path}.data", mesh.data, "1 or more, or -1 for all that are left"
    yield mesh.fsdp >= 1, f"{path}.fsdp", mesh.fsdp, "1 or more"
    yield mesh.tensor >= 1, f"{path}.tensor", mesh.tensor, "1 or more"


def _distributed(path: str, distributed: DistributedConfig) -> Iterator[Rule]:
    yield distributed.processes >= 0, f"{path}.processes", distributed.processes, "1 or more, or 0 (found out)"
    yield distributed.process >= -1, f"{path}.process", distributed.process, "0 or more, or -1 (found out)"
    yield distributed.start_timeout >= 1, f"{path}.start_timeout", distributed.start_timeout, "1 or more"
    yield distributed.heartbeat_timeout >= 5, f"{path}.heartbeat_timeout", distributed.heartbeat_timeout, "5 or more"
    yield distributed.stall_timeout >= 1, f"{path}.stall_timeout", distributed.stall_timeout, "1 or more"


def _optim(path: str, optim: OptimConfig) -> Iterator[Rule]:
    yield optim.lr >= 0, f"{path}.lr", optim.lr, "0 or more"
    yield 0 <= optim.warmup <= 1, f"{path}.warmup", optim.warmup, "a share of the updates, from 0 to 1"
    yield 0 <= optim.b1 < 1, f"{path}.b1", optim.b1, "from 0 to below 1"
    yield 0 <= optim.b2 < 1, f"{path}.b2", optim.b2, "from 0 to below 1"
    yield optim.eps > 0, f"{path}.eps", optim.eps, "above 0"
    yield optim.weight_decay >= 0, f"{path}.weight_decay", optim.weight_decay, "0 or more"
    yield optim.max_grad_norm >= 0, f"{path}.max_grad_norm", optim.max_grad_norm, "0 or more"


def _data(path: str, data: DataConfig) -> Iterator[Rule]:
    weights = [1.0] if isinstance(data.train, str) else list(data.train.values())
    weighted = bool(weights) and all(weight > 0 for weight in weights)
    yield weighted, f"{path}.train", data.train, "a source, or sources with weights above 0"
    yield data.max_length >= 1, f"{path}.max_length", data.max_length, "1 or more"
    yield data.buckets >= 1, f"{path}.buckets", data.buckets, "1 or more"


def _checkpoint(path: str, checkpoint: CheckpointConfig) -> Iterator[Rule]:
    yield checkpoint.every >= 1, f"{path}.every", checkpoint.every, "1 or more"
    yield checkpoint.keep >= 1, f"{path}.keep", checkpoint.keep, "1 or more"
    yield checkpoint.keep_best >= 0, f"{path}.keep_best", checkpoint.keep_best, "0 or more"


def _log(path: str, log: LogConfig) -> Iterator[Rule]:
    yield log.every >= 1, f"{path}.every", log.every, "1 or more"
    yield log.eval_every >= 1, f"{path}.eval_every", log.eval_every, "1 or more"
    yield log.eval_rows >= 0, f"{path}.eval_rows", log.eval_rows, "0 or more"
    yield bool(log.project.strip()), f"{path}.project", log.project, "a name"
    yield log.samples >= 0, f"{path}.samples", log.samples, "0 or more"


def _sampling(path: str, sampling: SamplingConfig) -> Iterator[Rule]:
    yield sampling.max_new_tokens >= 1, f"{path}.max_new_tokens", sampling.max_new_tokens, "1 or more"
    yield sampling.temperature >= 0, f"{path}.temperature", sampling.temperature, "0 or more"
    yield sampling.top_k >= 0, f"{path}.top_k", sampling.top_k, "0 or more"
    yield 0 < sampling.top_p <= 1, f"{path}.top_p", sampling.top_p, "above 0 and at most 1"
    yield all(sampling.stop), f"{path}.stop", sampling.stop, "without empty strings"


def _batches(path: str, rows: int, microbatch: int) -> Iterator[Rule]:
    yield rows >= 1, f"{path}.batch_size", rows, "1 or more"
    yield microbatch >= 0, f"{path}.microbatch", microbatch, "0 (all) or more"


def _packing(path: str, pack_length: int, max_length: int) -> Iterator[Rule]:
    fits = pack_length == 0 or pack_length >= max_length
    yield fits, f"{path}.pack_length", pack_length, f"0 (off), or at least {path}.data.max_length ({max_length})"


def _lora(path: str, lora: LoRAConfig) -> Iterator[Rule]:
    yield lora.rank >= 0, f"{path}.rank", lora.rank, "0 (off) or more"
    yield lora.alpha > 0, f"{path}.alpha", lora.alpha, "above 0"
    yield _is_regex(lora.targets), f"{path}.targets", lora.targets, "a regular expression"


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _gates(path: str, gates: tuple[str, ...], heldout: str, source: str) -> Iterator[Rule]:
    yield all(map(is_gate, gates)), path, gates, FORM
    yield bool(heldout) or not gates, source, heldout, f"set, as {path} are bounds on held-out figures"


def _sft(path: str, sft: SFTConfig) -> Iterator[Rule]:
    yield from _data(f"{path}.data", sft.data)
    yield from _lora(f"{path}.lora", sft.lora)
    yield from _optim(f"{path}.optim", sft.optim)
    yield from _checkpoint(f"{path}.checkpoint", sft.checkpoint)
    yield from _log(f"{path}.log", sft.log)
    yield from _sampling(f"{path}.sampling", sft.sampling)
    yield sft.epochs > 0, f"{path}.epochs", sft.epochs, "above 0"
    yield from _batches(path, sft.batch_size, sft.microbatch)
    yield from _packing(path, sft.pack_length, sft.data.max_length)
    yield sft.max_skipped >= 1, f"{path}.max_skipped", sft.max_skipped, "1 or more"
    yield from _gates(f"{path}.gates", sft.gates, sft.data.eval, f"{path}.data.eval")
    yield sft.candidates >= 1, f"{path}.candidates", sft.candidates, "1 or more"


def _reward(path: str, reward: RewardConfig) -> Iterator[Rule]:
    yield from _data(f"{path}.data", reward.data)
    yield from _lora(f"{path}.lora", reward.lora)
    yield from _optim(f"{path}.optim", reward.optim)
    yield from _checkpoint(f"{path}.checkpoint", reward.checkpoint)
    yield from _log(f"{path}.log", reward.log)
    yield reward.epochs > 0, f"{path}.epochs", reward.epochs, "above 0"
    yield from _batches(path, reward.batch_size, reward.microbatch)
    yield from _packing(path, reward.pack_length, reward.data.max_length)
    yield reward.max_skipped >= 1, f"{path}.max_skipped", reward.max_skipped, "1 or more"
    yield from _gates(f"{path}.gates", reward.gates, reward.data.eval, f"{path}.data.eval")
    yield reward.center_coef >= 0, f"{path}.center_coef", reward.center_coef, "0 or more"


def _ppo(path: str, ppo: PPOConfig) -> Iterator[Rule]:
    yield from _data(f"{path}.prompts", ppo.prompts)
    yield from _lora(f"{path}.lora", ppo.lora)
    yield from _optim(f"{path}.optim", ppo.optim)
    yield from _checkpoint(f"{path}.checkpoint", ppo.checkpoint)
    yield from _log(f"{path}.log", ppo.log)
    yield from _data(f"{path}.ptx", ppo.ptx)
    yield from _ppo_sampling(f"{path}.sampling", ppo.sampling)
    yield from _ppo_batches(path, ppo)
    yield _old_logprobs(path, ppo)
    yield from _ppo_loss(path, ppo)
    yield ppo.kl.coef >= 0, f"{path}.kl.coef", ppo.kl.coef, "0 or more"
    yield ppo.kl.target >= 0, f"{path}.kl.target", ppo.kl.target, "0 or more"
    yield ppo.kl.horizon >= 1, f"{path}.kl.horizon", ppo.kl.horizon, "1 or more"
    yield ppo.max_skipped >= 1, f"{path}.max_skipped", ppo.max_skipped, "1 or more"
    yield from guards_rules(f"{path}.guards", ppo.guards)
    yield from canary_rules(path, ppo)
    yield from _gates(f"{path}.gates", ppo.gates, ppo.prompts.eval, f"{path}.prompts.eval")
    yield from rewards_rules(f"{path}.rewards", ppo.rewards, value_from=ppo.value_from)


def _ppo_sampling(path: str, sampling: SamplingConfig) -> Iterator[Rule]:
    same = "as the update uses the same distribution as the sampler"
    yield from _sampling(path, sampling)
    yield sampling.temperature != 0, f"{path}.temperature", sampling.temperature, f"above 0, {same}"
    yield sampling.top_k == 0, f"{path}.top_k", sampling.top_k, f"0 (off), {same}"
    yield sampling.top_p == 1, f"{path}.top_p", sampling.top_p, f"1 (off), {same}"


def _ppo_batches(path: str, ppo: PPOConfig) -> Iterator[Rule]:
    yield ppo.iterations >= 1, f"{path}.iterations", ppo.iterations, "1 or more"
    yield ppo.episodes >= 1, f"{path}.episodes", ppo.episodes, "1 or more"
    yield ppo.rollout_parts >= 1, f"{path}.rollout_parts", ppo.rollout_parts, "1 or more"
    whole = ppo.rollout_parts < 1 or ppo.episodes % ppo.rollout_parts == 0
    yield whole, f"{path}.rollout_parts", ppo.rollout_parts, f"a divisor of {path}.episodes ({ppo.episodes})"
    yield ppo.epochs >= 1, f"{path}.epochs", ppo.epochs, "1 or more"
    yield ppo.minibatches >= 1, f"{path}.minibatches", ppo.minibatches, "1 or more"
    divides = ppo.minibatches < 1 or ppo.episodes % ppo.minibatches == 0
    yield divides, f"{path}.minibatches", ppo.minibatches, f"a divisor of {path}.episodes ({ppo.episodes})"
    yield ppo.microbatch >= 0, f"{path}.microbatch", ppo.microbatch, "0 (all) or more"


def _old_logprobs(path: str, ppo: PPOConfig) -> Rule:
    exact = ppo.model.dtype == "float32" and ppo.sampling.kv_cache == "compute" and ppo.value_from != "shared"
    must = f"policy, unless {path}.model.dtype is float32, {path}.sampling.kv_cache compute, and value_from not shared"
    return exact or ppo.old_logprobs == "policy", f"{path}.old_logprobs", ppo.old_logprobs, must


def _ppo_loss(path: str, ppo: PPOConfig) -> Iterator[Rule]:
    yield ppo.value_lr >= 0, f"{path}.value_lr", ppo.value_lr, "0 or more"
    yield 0 <= ppo.gamma <= 1, f"{path}.gamma", ppo.gamma, "from 0 to 1"
    yield 0 <= ppo.lam <= 1, f"{path}.lam", ppo.lam, "from 0 to 1"
    yield 0 < ppo.clip < 1, f"{path}.clip", ppo.clip, "above 0 and below 1"
    yield ppo.dual_clip == 0 or ppo.dual_clip > 1, f"{path}.dual_clip", ppo.dual_clip, "above 1, or 0 (off)"
    yield ppo.value_clip > 0, f"{path}.value_clip", ppo.value_clip, "above 0"
    yield ppo.value_coef >= 0, f"{path}.value_coef", ppo.value_coef, "0 or more"
    yield ppo.entropy_coef >= 0, f"{path}.entropy_coef", ppo.entropy_coef, "0 or more"
    yield ppo.missing_eos_penalty >= 0, f"{path}.missing_eos_penalty", ppo.missing_eos_penalty, "0 or more"
    yield ppo.target_approx_kl >= 0, f"{path}.target_approx_kl", ppo.target_approx_kl, "0 or more"
    yield ppo.critic_warmup >= 0, f"{path}.critic_warmup", ppo.critic_warmup, "0 or more"
    yield 0 <= ppo.ema_decay < 1, f"{path}.ema_decay", ppo.ema_decay, "from 0 to below 1"
    yield ppo.ptx_coef >= 0, f"{path}.ptx_coef", ppo.ptx_coef, "0 or more"
    has_text = ppo.ptx_coef <= 0 or bool(ppo.ptx.train)
    yield has_text, f"{path}.ptx.train", ppo.ptx.train, f"set, as {path}.ptx_coef is {ppo.ptx_coef}"
