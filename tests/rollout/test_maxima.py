"""A log line shows the greatest value for exactly those metrics of which a step itself takes the greatest."""

import jax
import jax.numpy as jnp

from jrlhf.core import from_logits
from jrlhf.rollout.iteration import MAXIMA
from jrlhf.steps import rollout_metrics
from jrlhf.steps.networks import apart
from jrlhf.steps.ppo import PPOLoss, episode_loss
from jrlhf.types import PPOParams
from tests.support.batches import rollout_batch
from tests.support.tiny_models import plain_model


def test_maxima_are_those_of_the_step_and_of_the_rollout() -> None:
    model = plain_model()
    rollout = rollout_batch(model.apply_fn, model.params)
    terms = PPOLoss(0.7, clip=0.2, dual_clip=None, value_clip=0.2, value_coef=0.5, entropy_coef=0.0)
    both = apart(from_logits(model.apply_fn), model.score_fn, selective=False)
    params = PPOParams(model.params, model.value_params)
    _, sums = jax.eval_shape(episode_loss(both, terms)(jnp.float32(1.0)), params, rollout)
    of_the_first_minibatch = "policy/first_minibatch_max_abs_log_ratio"
    of_the_rollout = {name for name in rollout_metrics(rollout) if "max" in name.split("/")[-1]}
    assert {*MAXIMA} == {*sums.maximum, of_the_first_minibatch, *of_the_rollout}
