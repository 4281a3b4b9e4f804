"""The protocols of a model that steps call, and the batches that flow between floors.

Every per-token array is ``[B, T]`` and index ``t`` belongs to ``tokens[:, t]``: ``logprobs[:, t]`` scores token ``t``
given the tokens before it, ``values[:, t]`` is the value of the prefix before ``t``. Index 0 is always masked.

The containers are ``NamedTuple``s, hence pytrees: they pass through ``jit``, ``vmap``, ``tree.map`` and shardings as
they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

Params = Any
"""A pytree of arrays, of whatever structure the user's model has."""

TokenMask = Bool[Array, "B T"] | Int[Array, "B T"]
"""True at real tokens. Where several sequences are packed into a row: 0 for padding, else the sequence's number."""

Key = PRNGKeyArray
Metrics = dict[str, Scalar]


@runtime_checkable
class ApplyFn(Protocol):
    """A language model: logits at every position. ``mask`` marks real tokens; positions follow from it.

    Callers that pack several sequences into a row pass segment numbers instead; tokens attend only within their
    segment. A model that is never called on packed rows need not know them.
    """

    def __call__(self, params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T V"]: ...


@runtime_checkable
class LogprobFn(Protocol):
    """``(logprobs, entropy)`` of every token under ``softmax(logits / temperature)``, aligned to ``tokens``.

    Only the numbers at ``where`` are read: elsewhere any number will do, so a model may save the work, or ignore the
    mask. None means everywhere. ``jrlhf.core.from_logits`` makes one of any model that returns logits.
    """

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]: ...


@runtime_checkable
class ScoreFn(Protocol):
    """A scalar at every position ``t``, which has seen ``tokens[:, :t + 1]``: a reward, or (shifted by one) a value."""

    def __call__(self, params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]: ...


@runtime_checkable
class ActorCriticFn(Protocol):
    """A ``LogprobFn`` and a ``ScoreFn`` in one forward pass: ``(logprobs, entropy, scores)``."""

    def __call__(
        self,
        params: "PPOParams",
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]: ...


@runtime_checkable
class InitCacheFn(Protocol):
    """An empty cache for ``batch`` rows of at most ``length`` tokens.

    All of its leaves but scalars have the rows on axis 0.
    """

    def __call__(self, batch: int, length: int, /) -> Any: ...


@runtime_checkable
class DecodeFn(Protocol):
    """Append ``T`` tokens to the cache; return the logits that follow the last of them, and the new cache.

    ``positions`` counts a row's real tokens from 0 and is -1 for padding, which no later query attends to.
    """

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Any, /
    ) -> tuple[Float[Array, "B V"], Any]: ...


@runtime_checkable
class InsertFn(Protocol):
    """Replace ``rows`` of the cache by the rows of ``prefilled``, a cache that holds ``P`` tokens of each and no more.

    A row number past the last row is left out. The cache is a ring: ``decode`` writes a token to one column for all
    rows, and after the last column to the first. So the tokens of ``prefilled`` go to the ``P`` columns before the next
    one, and all other columns of these rows are empty.
    """

    def __call__(self, cache: Any, rows: Int[Array, "R"], prefilled: Any, /) -> Any: ...


def unchanged(params: Params) -> Params:
    """The parameters as they are."""
    return params


class DecodeFns(NamedTuple):
    """Cached decoding as two pure functions; prefill and single-token decode are the same ``decode``."""

    init_cache: InitCacheFn
    decode: DecodeFn
    prepare: Callable[[Params], Params] = unchanged
    """Work on the parameters that ``decode`` would repeat at every token, done once before the first: such as a cast.
    ``decode`` must give the same with prepared parameters as without."""
    insert: InsertFn | None = None
    """Put further prompts into rows whose answers have ended; None: the sampler decodes all answers at once."""


class SFTBatch(NamedTuple):
    """Right-padded sequences, one a row or packed. ``loss_mask`` marks the tokens that are trained on."""

    tokens: Int[Array, "B T"]
    mask: TokenMask
    loss_mask: Bool[Array, "B T"]


class RankingBatch(NamedTuple):
    """``K`` completions of each of ``B`` prompts; ``valid`` marks real ones. Rank 0 is best, equal ranks are ties.

    Of an answer that is labelled by itself, rank 0 says that it is desirable, and 1 that it is not.
    """

    tokens: Int[Array, "B K T"]
    mask: Bool[Array, "B K T"]
    ranks: Int[Array, "B K"]
    valid: Bool[Array, "B K"]
    margin: Float[Array, "B"]
    loss_mask: Bool[Array, "B K T"] | None = None
    """Marks the tokens of the completions themselves, whose log-probs preference losses read."""
    ref_logprobs: Float[Array, "B K"] | None = None
    """Log-prob of each completion under the reference, the sum over its tokens; anything where ``valid`` is False."""


class PackedRankingBatch(NamedTuple):
    """Up to ``G`` rankings a row, the completions of each one after the other in it; see ``RankingBatch``."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    """0 for padding, else the number of the completion in its row."""
    ends: Int[Array, "B G K"]
    """Column of each completion's last token; 0 where ``valid`` is False."""
    ranks: Int[Array, "B G K"]
    valid: Bool[Array, "B G K"]
    margin: Float[Array, "B G"]
    loss_mask: Bool[Array, "B T"] | None = None
    ref_logprobs: Float[Array, "B G K"] | None = None


class UnpairedBatch(NamedTuple):
    """Answers that people have called desirable or not, one a ranking (``K`` = 1), for KTO.

    Both parts have ``loss_mask`` and ``ref_logprobs``, and their rows are laid out alike.
    """

    answers: RankingBatch | PackedRankingBatch
    mismatched: RankingBatch | PackedRankingBatch
    """The same prompts, each with the answer to another prompt, from which the KL is estimated."""


class Generation(NamedTuple):
    """Left-padded prompts followed by sampled responses, as token ids; nothing is ever re-tokenised."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    """Real tokens: prompt and response, the stop token included."""
    response_mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    """The sampler's own log-probs of the response tokens, 0 elsewhere."""
    stopped: Bool[Array, "B"]
    """True where a stop token ended the response, False where the length limit did."""
    steps_before: Int[Array, "B"] | None = None
    """Decoding steps that were made before the response's first token was drawn, while other responses held its slot.
    None if something else than ``make_generate`` drew them."""


class Readings(NamedTuple):
    """Log-probs, entropy and values of a generation, before it is scored. Only response tokens mean anything."""

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    """None without a reference."""
    values: Float[Array, "B T"] | None
    """None without a value network."""


class Rollout(NamedTuple):
    """A batch of experience for PPO or GRPO: what was sampled, how it was scored, and the targets made of it.

    In GRPO the answers of a prompt stand in neighbouring rows, ``values`` and ``returns`` are None, and without a KL
    penalty ``ref_logprobs`` too.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    sampler_logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    values: Float[Array, "B T"] | None
    rewards: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"] | None
    scores: Float[Array, "B"]
    stopped: Bool[Array, "B"]
    ptx: SFTBatch | None = None
    """Text for the PPO-ptx term; its rows are split into as many minibatches as the episodes."""
    kl_coef: Float[Array, "B"] | None = None
    """Coefficient β of the KL penalty in GRPO's loss, the same for every answer; None where the loss has none."""


class PPOParams(NamedTuple):
    """Parameters of policy and critic, moved by one optimizer and saved together. Where they share a network, ``value``
    holds what the critic has besides it, such as a scalar head."""

    policy: Params
    value: Params


class TrainState(NamedTuple):
    """Everything an optimizer step reads and replaces. In PPO ``params`` is a ``PPOParams``, else the model's own."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    """Optimizer updates done."""
    ema: Params | None = None
    """Exponential moving average of the policy's parameters, None where it is off."""
    frozen: Params | None = None
    """The leaves that no optimizer moves, if ``params`` holds only the trained ones (``jrlhf.core.partition``)."""
