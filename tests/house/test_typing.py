"""The types that a user's type checker sees: py.typed is shipped, right programs pass and wrong ones are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jrlhf
from tests.support import ROOT

PROGRAM = '''
import jax
import optax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import (
    from_logits, gae, kl_penalty, kwise_ranking_loss, masked_mean, masked_whiten, ppo_policy_loss, ppo_value_loss,
    ranking_loss, sample, shape_rewards, token_logprobs, uncached_decode_fns, update_kl_coef,
)
from jrlhf.data import Tokenizer
from jrlhf.models import (
    from_equinox, from_linen, from_nnx, load_pretrained, load_reward_model, save_pretrained,
    file_digest,  # wrong: reportAttributeAccessIssue
)
from jrlhf.parallel import ShardingRules, init_sharded, jit_step, make_mesh, shard_batch, tree_shardings
from jrlhf.steps import (
    PPOSettings, make_experience, make_generate, make_ppo_step, make_reward_step, make_sft_step, separate, shared
)
from jrlhf.types import Params, PPOParams, RankingBatch, Rollout, SFTBatch, TokenMask, TrainState


def apply_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T V"]:
    return params[tokens]


def value_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]:
    return params[tokens]


def own_logprobs(
    params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /, *,
    temperature: float, where: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    return params[tokens] / temperature, params[tokens]


def both(
    params: PPOParams, tokens: Int[Array, "B T"], mask: TokenMask, /, *,
    temperature: float, where: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    return *own_logprobs(params.policy, tokens, mask, temperature=temperature), params.value[tokens]


def cold(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> tuple[Array, Array]:
    return params[tokens], params[tokens]


tx = optax.adam(1e-3)
networks = separate(from_logits(apply_fn), value_fn)
settings = PPOSettings(epochs=4, minibatches=2, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1)
ppo = make_ppo_step(networks, tx, settings)
sft = make_sft_step(own_logprobs, tx, accumulation=1)
reward = make_reward_step(value_fn, tx, center_coef=0.0, accumulation=1)
make_ppo_step(shared(both), tx, settings._replace(clip=0.1))
make_generate(
    uncached_decode_fns(apply_fn), max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, stop_tokens=(), pad_token=0
)


def run(state: TrainState, rollout: Rollout, text: SFTBatch, rankings: RankingBatch, key: Array) -> float:
    state, metrics = ppo(state, rollout, key)
    state, metrics = jax.jit(sft)(state, text, key)
    sft(state, rollout, key)  # wrong: reportArgumentType
    reward(state, text, key)  # wrong: reportArgumentType
    state.parameters  # wrong: reportAttributeAccessIssue
    return float(metrics["loss"])


def spell(tokenizer: Tokenizer) -> str:
    tokenizer.vocab  # wrong: reportAttributeAccessIssue
    return tokenizer.decode([tokenizer.eos_token_id])


class Words:
    """No tokenizer: it has no chat template, no special tokens and cannot be saved."""

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


spell(Words())  # wrong: reportArgumentType
make_sft_step(cold, tx, accumulation=1)  # wrong: reportArgumentType
make_sft_step(own_logprobs, tx, accumulation=1, selective=True)  # wrong: reportCallIssue
make_ppo_step(own_logprobs, tx, settings)  # wrong: reportArgumentType
separate(both, value_fn)  # wrong: reportArgumentType
PPOSettings(epochs=4, minibatches=2, temperature=1.0, value_clip=0.2, value_coef=0.1)  # wrong: reportCallIssue
PPOSettings(4, 2, 1.0, 0.2, 0.2, 0.1, kl_coef=0.1)  # wrong: reportCallIssue
make_experience(networks, temperature=1.0)  # wrong: reportCallIssue
load_pretrained("folder")  # wrong: reportCallIssue
gae(1.0)  # wrong: reportCallIssue
'''
"""A user's program. Every line that ends in ``# wrong: RULE`` must be an error of that rule, and no other line one."""


def expected_errors() -> set[tuple[int, str]]:
    marks = ((number, line.partition("# wrong: ")[2]) for number, line in enumerate(PROGRAM.splitlines(), start=1))
    return {(number, rule) for number, rule in marks if rule}


def test_a_users_type_checker_tells_right_from_wrong(tmp_path: Path) -> None:
    """Checked as an installed package, which is typed only if it says so: found by the interpreter's own path."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(program)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    errors = {(note["range"]["start"]["line"] + 1, note.get("rule")) for note in report["generalDiagnostics"]}
    assert errors == expected_errors(), run.stdout


def test_the_marker_of_a_typed_package_is_there() -> None:
    assert (Path(jrlhf.__file__).parent / "py.typed").read_bytes() == b""
