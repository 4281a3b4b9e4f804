"""Policy and value network as one function, whether they share their weights or not."""

from jaxtyping import Array, Bool, Float, Int

from jrlhf.types import ActorCriticFn, LogprobFn, PPOParams, ScoreFn, SelectiveLogprobFn, TokenMask


def apart(logprob_fn: LogprobFn | SelectiveLogprobFn, value_fn: ScoreFn, *, selective: bool) -> ActorCriticFn:
    """Two networks, each with a forward pass of its own. ``selective``: the first is a ``SelectiveLogprobFn``."""

    def both(
        params: PPOParams,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        wanted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
        only = {"wanted": wanted} if selective else {}
        logprobs, entropy = logprob_fn(params.policy, tokens, mask, temperature=temperature, **only)
        return logprobs, entropy, value_fn(params.value, tokens, mask)

    return both
