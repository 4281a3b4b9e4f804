"""Policy and value network as one record, whether they share their weights or not."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jrlhf.types import ActorCriticFn, LogprobFn, PPOParams, ScoreFn, TokenMask


class Networks(NamedTuple):
    """A policy and its value network, as functions of ``PPOParams``. Make one with ``separate`` or ``shared``."""

    actor_critic_fn: ActorCriticFn
    """Both at once."""
    logprob_fn: LogprobFn
    """The policy alone, as the reference and the text of the PPO-ptx term are read."""
    value_fn: ScoreFn | None
    """The value network alone; None where it has no forward pass of its own."""


def separate(logprob_fn: LogprobFn, value_fn: ScoreFn) -> Networks:
    """Two networks with a forward pass each: the policy over ``PPOParams.policy``, the critic over its ``value``."""

    def actor_critic_fn(
        params: PPOParams,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
        logprobs, entropy = logprob_fn(params.policy, tokens, mask, temperature=temperature, where=where)
        return logprobs, entropy, value_fn(params.value, tokens, mask)

    def policy_fn(
        params: PPOParams,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        return logprob_fn(params.policy, tokens, mask, temperature=temperature, where=where)

    def critic_fn(params: PPOParams, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]:
        return value_fn(params.value, tokens, mask)

    return Networks(actor_critic_fn, policy_fn, critic_fn)


def shared(actor_critic_fn: ActorCriticFn) -> Networks:
    """One network that gives log-probs and values in one forward pass: the value loss moves the policy's weights too.

    ``PPOParams.value`` is what the critic has besides the policy, such as a scalar head.
    """

    def policy_fn(
        params: PPOParams,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        # Under jit the values, which nobody reads, are not computed.
        logprobs, entropy, _ = actor_critic_fn(params, tokens, mask, temperature=temperature, where=where)
        return logprobs, entropy

    return Networks(actor_critic_fn, policy_fn, None)
