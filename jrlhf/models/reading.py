"""The reading of a reward model: which tokens of a text it receives, and at which token its score is read."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jrlhf.models.arch import Family
from jrlhf.system.errors import UsageError

ScoreAt = Literal["stop_token", "whole_chat"]

NOTE_KEY = "jrlhf"
"""Key of config.json under which jrlhf stores what Hugging Face's format has no field for."""
SCORE_AT_KEY = "score_at"

DEFAULT_PADS: Mapping[Family, int] = {"gemma2": 0, "gemma3_text": 0}
"""transformers' default ``pad_token_id`` of families that have one; for all others it is None."""


class Reading(NamedTuple):
    """The way a reward model reads a text.

    A reward model of jrlhf reads what a policy samples, up to the stop token of the answer, and its score is read
    there. Models of other tools follow the common recipe: they read the chat template over the whole chat, or plain
    text as it is tokenised, and transformers reads the score at the last token that is not padding.
    """

    score_at: ScoreAt
    """Token of the score: "stop_token" ends the answer, "whole_chat" is the last token that is not padding."""
    pad_token: int | None = None
    """For "whole_chat" the model's ``pad_token_id``, which is skipped wherever it stands; it may also be the EOS."""

    def last(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        """Return a mask whose last True token has the score; if all are padding it is the first, as in transformers."""
        if self.pad_token is None:
            return mask
        read = mask & (tokens != self.pad_token)
        first = mask & (jnp.cumsum(mask, axis=-1, dtype=jnp.int32) == 1)
        return jnp.where(jnp.any(read, axis=-1, keepdims=True), read, first)


STOP_TOKEN = Reading("stop_token")
"""Reading of jrlhf's own reward models."""


def reading_of(config: Mapping[str, Any], family: Family) -> Reading:
    """Return a reward model's reading from its config.json: jrlhf's if the note is there, otherwise transformers'.

    Raises UsageError for a note with an unknown value.
    """
    note = config.get(NOTE_KEY, {SCORE_AT_KEY: "whole_chat"})
    match note.get(SCORE_AT_KEY, "stop_token") if isinstance(note, dict) else note:
        case "stop_token":
            return STOP_TOKEN
        case "whole_chat":
            pad = config.get("pad_token_id", DEFAULT_PADS.get(family))
            return Reading("whole_chat", pad if isinstance(pad, int) and not isinstance(pad, bool) else None)
        case other:
            raise UsageError(f"{NOTE_KEY}.{SCORE_AT_KEY}: expected {' or '.join(get_args(ScoreAt))}, found {other!r}")
