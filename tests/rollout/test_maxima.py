"""A log line shows the greatest value for exactly those metrics of which a step itself takes the greatest."""

import jax
import jax.numpy as jnp

from jrlhf.core import from_logits
from jrlhf.rollout.iteration import MAXIMA
from jrlhf.steps import rollout_metrics, separate
from jrlhf.steps.ppo import episode_loss
from jrlhf.types import PPOParams
from tests.support.batches import ppo_settings, rollout_batch
from tests.support.tiny_models import plain_model


def test_maxima_are_those_of_the_step_and_of_the_rollout() -> None:
    model = plain_model()
    rollout = rollout_batch(model.apply_fn, model.params)
    networks = separate(from_logits(model.apply_fn), model.score_fn)
    params = PPOParams(model.params, model.value_params)
    _, sums = jax.eval_shape(
        episode_loss(networks, ppo_settings(sampler_weight_cap=2.0), jnp.float32(1.0)), params, rollout
    )
    of_the_first_minibatch = "policy/first_minibatch_max_abs_log_ratio"
    of_the_rollout = {name for name in rollout_metrics(rollout) if "max" in name.split("/")[-1]}
    assert {*MAXIMA} == {*sums.maximum, of_the_first_minibatch, *of_the_rollout}
