"""The parser of answers that are labelled one by one, as KTO learns from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow, missing_value
from jrlhf.data.formats import Example, parse_answer, parse_pair
from jrlhf.data.labels import label_of
from jrlhf.data.messages import last_assistant
from jrlhf.data.repeats import Note, ignore_note

UNPAIRED_FORMS = "the loss kto reads prompt, completion and label, or chosen and rejected"
RANKED = f"their ranks say which answer is better, not which is good; {UNPAIRED_FORMS}"
NO_PROMPT = "none, but the loss kto also reads each prompt with an answer to another one"


class LabelledAnswer(NamedTuple):
    """An answer with its prompt, and whether people find it desirable."""

    example: Example
    desirable: bool


def parse_unpaired(row: Mapping[str, Any], *, chat: bool = True, note: Note = ignore_note) -> list[LabelledAnswer]:
    """Parse the labelled answer of a row; a preference is two, of which the chosen one is desirable.

    Raises ``BadRow`` for a ranking, whose ranks say nothing about single answers, and for an answer without a prompt.
    """
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen, rejected = parse_pair(row, chat=chat, note=note)
        if chosen.completion == rejected.completion:
            raise BadRow("chosen", "is the same as rejected")
        return [LabelledAnswer(_with_prompt(chosen), True), LabelledAnswer(_with_prompt(rejected), False)]
    if row.get("label") is None:
        if row.get("completions") is not None:
            raise BadRow("completions", RANKED)
        raise missing_value(row, "label", rest=f"; {UNPAIRED_FORMS}")
    return [LabelledAnswer(_with_prompt(parse_answer(row, chat=chat, note=note)), label_of(row["label"]))]


def _with_prompt(example: Example) -> Example:
    """Return the example; raise ``BadRow`` if nothing stands before its answer."""
    prompt, completion, _ = example
    if prompt is None and isinstance(completion, list):
        prompt = completion[: last_assistant(completion)]
    if not prompt:
        raise BadRow("prompt", NO_PROMPT)
    return example
