"""Where a reward model reads a text: which tokens it is given, and at which of them its score stands."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jrlhf.models.arch import Family
from jrlhf.system.errors import UsageError

ScoreAt = Literal["stop_token", "whole_chat"]

NOTE = "jrlhf"
"""The key of config.json under which jrlhf notes what the format has no place for."""
FIELD = "score_at"

DEFAULT_PADS: Mapping[Family, int] = {"gemma2": 0, "gemma3_text": 0}
"""Families whose ``pad_token_id`` transformers takes for another than none where config.json has none."""


class Reading(NamedTuple):
    """How a reward model reads a text.

    jrlhf trains reward models on what a policy samples: they read up to the token that ends the answer, and the score
    stands there. Everyone else's are given what the common recipe gives them: the chat template over the whole chat,
    or plain text just as it is tokenised; and transformers reads the last token of that which is no padding.
    """

    score_at: ScoreAt
    """stop_token: at the token that ends the answer. whole_chat: at the last token of all but padding."""
    pad_token: int | None = None
    """For whole_chat the model's ``pad_token_id``, passed over wherever it stands: it may be the EOS too."""

    def last(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        """The tokens of a row the last of which has the score; where all are padding the first, as in transformers."""
        if self.pad_token is None:
            return mask
        read = mask & (tokens != self.pad_token)
        first = mask & (jnp.cumsum(mask, axis=-1, dtype=jnp.int32) == 1)
        return jnp.where(jnp.any(read, axis=-1, keepdims=True), read, first)


STOP_TOKEN = Reading("stop_token")
"""How jrlhf's own reward models read."""


def reading_of(config: Mapping[str, Any], family: Family) -> Reading:
    """The reading of a reward model by its config.json: jrlhf's, where that has left its note, else transformers'.

    UsageError for a note that says neither.
    """
    note = config.get(NOTE, {FIELD: "whole_chat"})
    match note.get(FIELD, "stop_token") if isinstance(note, dict) else note:
        case "stop_token":
            return STOP_TOKEN
        case "whole_chat":
            pad = config.get("pad_token_id", DEFAULT_PADS.get(family))
            return Reading("whole_chat", pad if isinstance(pad, int) and not isinstance(pad, bool) else None)
        case other:
            raise UsageError(f"{NOTE}.{FIELD}: expected {' or '.join(get_args(ScoreAt))}, found {other!r}")
