"""Losses and advantages against TRL's own methods on the same numbers, in values and in gradients.

The methods are called without a trainer: ``self`` is a record of the settings that they read, and the model returns
log-probs that are given. So nothing is sampled, and the mathematics are TRL's own.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import dpo_loss, group_advantages, kto_loss, reference_point
from jrlhf.steps.grpo import GRPOSettings, grpo_gradients, learnt_tokens
from jrlhf.types import Rollout

pytestmark = pytest.mark.slow
REASON = "TRL is not installed; this was written for 1.16: pip install torch==2.13.0 trl==1.16.0 -e .[test]"
torch = pytest.importorskip("torch", reason=REASON)
trl = pytest.importorskip("trl", reason=REASON)

ROWS, LENGTH = 8, 7
RNG = np.random.default_rng(0)
MASK = np.arange(LENGTH)[None] < RNG.integers(2, LENGTH + 1, (ROWS, 1))
"""Tokens of answers, of which the first is never predicted."""
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def logprobs_of(seed, scale=1.0):
    """Log-probs of single tokens, 0 beside the answers and at index 0."""
    values = np.random.default_rng(seed).normal(-2.0, scale, (ROWS, LENGTH)).astype(np.float32)
    return np.where(MASK & (np.arange(LENGTH) > 0), values, np.float32(0.0))


def stand_in(**fields):
    """What TRL's methods read of a trainer on one process, and nothing else."""
    same = lambda x, **how: x  # noqa: E731
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1, process_index=0
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**common | fields)


class GivenModel:
    """A model that returns given log-probs for each tensor of ids, as TRL's fused head does: without index 0."""

    def __init__(self, *given):
        self.given = given
        self.training = True

    def __call__(self, *, input_ids, **how):
        [logprobs] = [logprobs for ids, logprobs in self.given if ids is input_ids]
        rest = torch.zeros_like(logprobs[:, 1:])
        return SimpleNamespace(log_probs=logprobs[:, 1:], entropy=rest, mean_logits=rest, is_top1=rest.bool())


def tensor(array, *, grad=False):
    return torch.tensor(np.asarray(array), requires_grad=grad)


def assert_same(value, gradient, theirs, given):
    """The same loss, and the same gradient of the log-prob of every token but the first, which nothing predicts."""
    theirs.backward()
    found, expected = np.asarray(gradient)[:, 1:], given.grad.numpy()[:, 1:]
    print(f"difference of the loss {abs(float(value) - theirs.item()):.1e}, of its gradient "
          f"{np.max(np.abs(found - expected)):.1e} of {np.max(np.abs(expected)):.1e}")  # fmt: skip
    np.testing.assert_allclose(value, theirs.item(), **TOLERANCE)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def assert_same_loss(ours, logprobs, theirs, given):
    assert_same(*jax.value_and_grad(ours)(jnp.asarray(logprobs)), theirs, given)


def trl_dpo(loss_type, logprobs, reference, *, beta=0.4, order=slice(None)):
    """The first half of the rows are the better answers."""
    ids, mask = torch.zeros((ROWS, LENGTH), dtype=torch.long), tensor(MASK[order] & (np.arange(LENGTH) > 0))
    total = tensor(reference[order].sum(axis=1))
    inputs = {
        "input_ids": ids,
        "attention_mask": tensor(MASK[order]).long(),
        "completion_mask": mask.long(),
        "ref_chosen_logps": total[: ROWS // 2],
        "ref_rejected_logps": total[ROWS // 2 :],
    }
    trainer = stand_in(
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    return trl.DPOTrainer._compute_loss(trainer, GivenModel((ids, logprobs[order])), inputs, False)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(kind):
    logprobs, reference = logprobs_of(1), logprobs_of(2)
    count = np.sum(MASK, axis=1) - 1.0 if kind == "ipo" else np.ones(ROWS)
    of_reference = reference.sum(axis=1) / count

    def ours(x):
        totals = jnp.sum(x, axis=1) / count.astype(np.float32)
        margins = (t[: ROWS // 2] - t[ROWS // 2 :] for t in (totals, jnp.asarray(of_reference, jnp.float32)))
        return jnp.mean(dpo_loss(*margins, beta=0.4, kind=kind, label_smoothing=0.0))

    given = tensor(logprobs, grad=True)
    assert_same_loss(ours, logprobs, trl_dpo(kind, given, reference), given)


def test_conservative_dpo_is_a_mixture_of_both_orders():
    """TRL has smooth labels only in ``robust``, which is another combination of the same two losses."""
    logprobs, reference, smooth = logprobs_of(1), logprobs_of(2), 0.2

    def ours(x):
        totals = jnp.sum(x, axis=1), jnp.asarray(reference.sum(axis=1))
        margins = (t[: ROWS // 2] - t[ROWS // 2 :] for t in totals)
        return jnp.mean(dpo_loss(*margins, beta=0.4, kind="sigmoid", label_smoothing=smooth))

    given, swapped = tensor(logprobs, grad=True), np.roll(np.arange(ROWS), ROWS // 2)
    right, wrong = (trl_dpo("sigmoid", given, reference, order=order) for order in (slice(None), swapped))
    assert_same_loss(ours, logprobs, (1 - smooth) * right + smooth * wrong, given)


@pytest.mark.parametrize("lift", [-0.5, 0.5], ids=["clamped", "positive"])
def test_kto(lift):
    """``lift``: nats a token by which the policy likes the mismatched pairs better than the reference does."""
    logprobs, reference, labels = logprobs_of(1), logprobs_of(2), RNG.random(ROWS) < 0.4
    mismatched = np.where(logprobs_of(3) == 0.0, np.float32(0.0), logprobs_of(3))
    of_mismatched = np.where(mismatched == 0.0, np.float32(0.0), mismatched - np.float32(lift))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    assert 0 < labels.sum() < ROWS

    def ours(x):
        point = reference_point(jnp.sum(jnp.asarray(mismatched - of_mismatched)), jnp.float32(ROWS))
        ratios = jnp.sum(x - reference, axis=1)
        return jnp.mean(kto_loss(ratios, jnp.asarray(labels), point, beta=0.3, **weights))

    given, mask = tensor(logprobs, grad=True), tensor(MASK).long()
    ids, other_ids = (torch.zeros((ROWS, LENGTH), dtype=torch.long) for _ in range(2))
    model = GivenModel((ids, given), (other_ids, tensor(mismatched)))
    inputs = {
        "input_ids": ids, "attention_mask": mask, "completion_mask": mask, "KL_input_ids": other_ids,
        "KL_attention_mask": mask, "KL_completion_mask": mask, "label": tensor(labels),
        "ref_logps": tensor(reference.sum(axis=1)), "ref_KL_logps": tensor(of_mismatched.sum(axis=1)),
    }  # fmt: skip
    trainer = stand_in(calculate_KL=True, loss_type="kto", beta=0.3, **weights)
    trainer._compute_kl_logps = partial(trl.KTOTrainer._compute_kl_logps, trainer)
    theirs = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
    [point] = trainer._metrics["train"]["kl"]
    assert (point > 0) == (lift > 0)
    assert_same_loss(ours, logprobs, theirs, given)


def scored(trainer_class, scores, **fields):
    """The advantages of one process's answers, two tokens each, with these scores; NaN: not scored."""
    rows = len(scores)
    zeros = torch.zeros((rows, 2))
    fields |= {
        "environment_factories": None, "environments": None, "tools": None, "pad_to_multiple_of": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "mask_truncated_completions": False, "use_vllm": False,
        "num_iterations": 1, "beta": 0.0, "ref_model": None, "num_generations": 4, "reward_weights": torch.ones(1),
        "reward_funcs": [None], "reward_func_names": ["score"], "_logs": defaultdict(partial(defaultdict, list)),
        "_pending_extra_logs": {}, "_pending_metrics": {}, "log_multimodal": False, "reward_clip_range": None,
        "args": SimpleNamespace(
            per_device_train_batch_size=rows, gradient_checkpointing_kwargs=None, steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
    }  # fmt: skip
    trainer = stand_in(**fields)
    trainer._logs |= {name: [] for name in ("prompt", "completion", "advantages", "images")}
    ids = [[1, 2]] * rows
    answers = ids, ids, None, [""] * rows, None, {}, None, None
    trainer._generate = lambda prompts: answers if trainer_class is trl.GRPOTrainer else (ids, ids, [""] * rows)
    trainer._calculate_rewards = lambda *of: tensor(scores)[:, None]
    trainer._get_per_token_logps_and_entropies = lambda *of, **how: (zeros, zeros, None)
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": "Q"}] * rows)["advantages"].numpy()


SCORES = np.float32([1.0, 0.0, 0.5, 3.0, 2.0, 2.0, 2.0, 2.0, -1.0, np.nan, 4.0, 0.25])
"""Three groups: one of different scores, one of equal ones, and one with an answer that was not scored."""


def assert_same_advantages(ours, theirs):
    print(f"difference of the advantages {np.max(np.abs(np.asarray(ours) - theirs)):.1e}")
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_grpo(scale):
    ours = group_advantages(jnp.asarray(SCORES), jnp.arange(12) // 4, baseline="mean", scale=scale)
    how = {"scale_rewards": "group" if scale else "none", "multi_objective_aggregation": "sum_then_normalize"}
    assert_same_advantages(ours, scored(trl.GRPOTrainer, SCORES, **how))


def test_advantages_of_rloo():
    ours = group_advantages(jnp.asarray(SCORES), jnp.arange(12) // 4, baseline="leave_one_out", scale=False)
    assert_same_advantages(ours, scored(trl.RLOOTrainer, SCORES, normalize_advantages=False))


PLAIN = {"loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2}
OURS = {"loss": "clip", "ratio": "token", "aggregation": "sequence", "clip": 0.2, "clip_high": 0.2}
GRPO = {
    "sequence means": ({}, {}, 0.0, None),
    "all tokens of a minibatch (bnpo)": ({"loss_type": "bnpo"}, {"aggregation": "token"}, 0.0, None),
    "all tokens of a batch (dapo)": (
        {"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token", "clip_high": 0.28}, 0.0, None,
    ),
    "a constant (dr_grpo)": ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}, 0.0, None),
    "the KL in the loss": ({}, {}, 0.3, None),
    "the ratio of sequences (gspo)": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
        {"ratio": "sequence", "clip": 0.1, "clip_high": 0.15}, 0.0, None,
    ),
    "a second bound": ({}, {"dual_clip": 1.5}, 0.0, 1.5),
    # TRL's bound is that of the weight itself, and there is none below.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"loss": "cispo", "aggregation": "token", "clip": 1.0, "clip_high": 0.3}, 0.0, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRPO)
def test_the_loss_of_grpo(name):
    theirs_of, ours_of, beta, delta = GRPO[name]
    logprobs, old, reference = logprobs_of(1, 0.4), logprobs_of(1, 0.4) + 0.3 * logprobs_of(2, 3.0), logprobs_of(3)
    old, reference = (np.where(logprobs == 0.0, np.float32(0.0), x) for x in (old + 0.6, reference))
    advantages = np.random.default_rng(4).normal(size=ROWS).astype(np.float32)
    learnt = MASK & (np.arange(LENGTH) > 0)

    settings = GRPOSettings(
        epochs=1, minibatches=1, temperature=1.0, max_new_tokens=LENGTH, kl_estimator="k3", **OURS | ours_of
    )  # fmt: skip
    rollout = Rollout(
        tokens=jnp.zeros((ROWS, LENGTH), jnp.int32), mask=jnp.asarray(MASK), response_mask=jnp.asarray(learnt),
        logprobs=jnp.asarray(old), ref_logprobs=jnp.asarray(reference), sampler_logprobs=jnp.asarray(old),
        entropy=jnp.zeros((ROWS, LENGTH)), values=None, rewards=jnp.zeros((ROWS, LENGTH)),
        advantages=jnp.asarray(np.where(learnt, advantages[:, None], np.float32(0.0))), returns=None,
        scores=jnp.zeros(ROWS), stopped=jnp.ones(ROWS, bool),
        kl_coef=jnp.full(ROWS, beta, jnp.float32) if beta else None,
    )  # fmt: skip

    def logprob_fn(params, tokens, mask, /, *, temperature, where=None):
        return params, jnp.zeros((ROWS, LENGTH))

    gradient, sums = grpo_gradients(
        logprob_fn, settings, jnp.asarray(logprobs), rollout, learnt_tokens(rollout, settings), None
    )
    given = tensor(logprobs, grad=True)
    trainer = stand_in(
        **PLAIN | theirs_of, beta=beta, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *of, **how: (given, torch.zeros_like(given), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros((ROWS, 1), dtype=torch.long), "prompt_mask": torch.ones((ROWS, 1), dtype=torch.long),
        "completion_ids": torch.zeros((ROWS, LENGTH), dtype=torch.long), "completion_mask": tensor(learnt).long(),
        "advantages": tensor(advantages), "old_per_token_logps": tensor(old),
        "ref_per_token_logps": tensor(reference), "num_items_in_batch": tensor(learnt.sum()),
    }  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    ratio = np.exp(logprobs - old)[learnt]
    assert (ratio > 1.3).any(), "a ratio that is clipped above"
    assert (ratio < 0.8).any(), "and one below"
    assert_same(sums.total["loss"], gradient, theirs, given)
