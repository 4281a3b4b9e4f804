"""Rows of a source as a training stage would see them, one at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np

from jrlhf.config import DataConfig
from jrlhf.data.errors import BadRow, DataError, PlacedRow, Row
from jrlhf.data.kinds import (
    TRUNCATION_NOTE,
    Columns,
    Kind,
    TrainOn,
    prompts_kind,
    rankings_kind,
    sft_kind,
    unpaired_kind,
)
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tally import InspectedRow, InspectedSequence, Tally

KindName = Literal["sft", "reward", "kto", "prompts"]
NO_LIMIT = 2**31 - 1
"""A max_length that cuts nothing."""
COMPARED = {"chosen", "rejected", "completions"}
PROMPTS = {"prompt", "instruction"}
ANSWERED = {"completion", "output", "response", "text", "messages", "conversations"}
"""These sets of columns tell what a row is for; ``jrlhf.data.formats`` documents every column."""


class RowInspector:
    """Encodes rows with the code of the loaders (``load_sft`` and others) and keeps the uncut tokens."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, kind: KindName, train_on: TrainOn) -> None:
        self._max_length = config.max_length

        def kind_with(config: DataConfig) -> Kind:
            match kind:
                case "sft":
                    return sft_kind(config, tokenizer, train_on=train_on)
                case "reward":
                    return rankings_kind(config, tokenizer)
                case "kto":
                    return unpaired_kind(config, tokenizer)
                case "prompts":
                    return prompts_kind(config, tokenizer, Columns())

        self._kind, self._uncut_kind = kind_with(config), kind_with(replace(config, max_length=NO_LIMIT))

    def inspect(self, place: str, row: Row) -> InspectedRow:
        """Encode a row; raise ``BadRow`` where training cannot use it."""
        encoded = self._kind.encode(row)
        tokens = encoded.ragged["tokens"]
        # Only a sequence of full length can have been longer.
        full = any(len(ids) >= self._max_length for ids in tokens)
        uncut = self._uncut_kind.encode(row).ragged["tokens"] if full else tokens
        # Those of a ranking, or of each labelled answer.
        ranks = [rank for ranks in encoded.ragged.get("ranks", []) for rank in ranks]
        # The marks of all sequences of a row, one after the other; prompts have none.
        lengths = [len(ids) for ids in tokens]
        marks = np.asarray(encoded.flat.get("learnt", np.zeros(sum(lengths))), np.bool_)
        mask = np.split(marks, np.cumsum(lengths)[:-1])
        sequences = [InspectedSequence(*parts) for parts in zip(tokens, mask, uncut, strict=True)]
        notes = [note for note in encoded.notes if note != TRUNCATION_NOTE]
        prompts = np.asarray(encoded.flat.get("prompt", [])).tolist()
        return InspectedRow(place, sequences, ranks, self._kind.unread(row), notes, prompts)


def guess_kind(row: Row) -> KindName:
    """Guess from a row's columns which stage it is for."""
    columns = {column for column in row if row[column] is not None}
    if columns & COMPARED:
        return "reward"
    return "prompts" if columns & PROMPTS and not columns & ANSWERED else "sft"


def first_row(rows: Iterable[PlacedRow]) -> tuple[Row, Iterator[PlacedRow]]:
    """Return the first good row (``{}`` if there is none) and an iterator over all rows, the read ones included."""
    read, remaining = list[PlacedRow](), iter(rows)
    for placed in remaining:
        read.append(placed)
        if not isinstance(placed[1], BadRow):
            return placed[1], chain(read, remaining)
    return {}, iter(read)


def inspect_rows(
    inspector: RowInspector, tally: Tally, rows: Iterable[PlacedRow], show: Callable[[InspectedRow], None]
) -> None:
    """Count every row in ``tally`` and call ``show`` with each row that training can use."""
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            inspected = inspector.inspect(place, row)
        except BadRow as error:
            tally.refuse(place, error)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        else:
            tally.add(inspected, row)
            show(inspected)
