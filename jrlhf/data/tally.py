"""Counts over the inspected rows of a source: lengths, learnt tokens, and rows that look odd."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np

from jrlhf.data.errors import BadRow, ExcludedRow, Row
from jrlhf.data.formats import parse_prompt
from jrlhf.data.kinds import TRUNCATION_NOTE
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer import stop_token_ids

SPEAKERS = ("role", "from")
"""Fields of a message that name its speaker."""

NO_STOP_LEARNT = "no stop token in what is learnt"
NO_FINAL_STOP = "an answer without its stop token"
REPEATED_ROW = "the very tokens of an earlier row"
REPEATED_PROMPT = "the prompt of an earlier row"
UNKNOWN_TOKENS = "unknown tokens"
PAD_TOKENS = "the pad token in the text"
SPECIAL_TOKENS = "special tokens written in the text"


class InspectedSequence(NamedTuple):
    """One sequence that the model reads."""

    tokens: np.ndarray
    mask: np.ndarray
    """True at learnt tokens (SFT) or at the tokens of a ranking's answer; False throughout a prompt."""
    uncut: np.ndarray
    """The tokens before they were cut to max_length."""


class InspectedRow(NamedTuple):
    """A row as a stage sees it: one sequence, or one sequence and rank per completion (KTO: 0 if it is desirable)."""

    place: str
    sequences: list[InspectedSequence]
    ranks: list[int]
    unread: Collection[str] = ()
    """Columns and message fields that nothing reads."""
    notes: Collection[str] = ()
    """The loader's notes on the row, without the note that it was cut."""
    prompts: Collection[int] = ()
    """Digests of the prompts of labelled answers (KTO only)."""


@dataclass
class Count:
    """A number of rows and the place of the first one."""

    rows: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        """Count one more row."""
        self.first = self.first or place
        self.rows += 1


@dataclass
class Tally:
    """Counts over a source: call ``add`` for each usable row and ``refuse`` for each other row."""

    tokenizer: Tokenizer
    kind: str
    """The stage that reads the rows: "sft", "reward" or "prompts"."""
    oddities: dict[str, Count] = field(init=False)
    bad: dict[str, Count] = field(default_factory=dict)
    excluded: dict[str, Count] = field(default_factory=dict)
    """Good rows that are not for the stage, by reason."""
    notes: dict[str, Count] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    """Number of rows per column or message field that nothing reads."""
    error: str = ""
    """Place and error of the first bad row."""
    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """Length of every sequence in tokens."""
    learnt: int = 0
    """Number of learnt tokens (SFT only)."""
    cut: int = 0
    """Number of tokens that max_length cut off."""
    pairs: int = 0
    desirable: int = 0
    """Number of answers that are labelled as desirable (KTO only); the others are not."""
    prompts: set[int] = field(default_factory=set)
    """Digests of the prompts of labelled answers (KTO only)."""
    longer_wins: float = 0.0
    """Number of pairs whose better answer has more tokens; a pair of equal lengths counts one half."""

    def __post_init__(self) -> None:
        self._stops = np.asarray(stop_token_ids(self.tokenizer, ()))
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted({str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens))
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._token_digests, self._prompt_digests = set[bytes](), set[bytes]()
        ends = {"sft": [NO_STOP_LEARNT], "reward": [NO_FINAL_STOP], "kto": [NO_FINAL_STOP], "prompts": []}[self.kind]
        names = (TRUNCATION_NOTE, *ends, REPEATED_ROW, REPEATED_PROMPT, UNKNOWN_TOKENS, PAD_TOKENS, SPECIAL_TOKENS)
        self.oddities = {name: Count() for name in names}

    def refuse(self, place: str, error: BadRow) -> None:
        """Count a row that is bad, or that is not for the stage."""
        if isinstance(error, ExcludedRow):
            self.excluded.setdefault(error.reason, Count()).add(place)
            return
        self.error = self.error or f"{place}: {error}"
        self.bad.setdefault(error.reason, Count()).add(place)

    def add(self, inspected: InspectedRow, row: Row) -> None:
        """Count a usable row with its tokens, pairs, notes and oddities."""
        self.rows += 1
        for ids, mask, uncut in inspected.sequences:
            self.lengths.append(len(ids))
            self.learnt += int(mask.sum()) if self.kind == "sft" else 0
            self.cut += len(uncut) - len(ids)
        if self.kind == "kto":
            self.desirable += inspected.ranks.count(0)
            self.prompts.update(inspected.prompts)
        else:
            self._add_pairs(inspected)
        for note in inspected.notes:
            self.notes.setdefault(note, Count()).add(inspected.place)
        for name in inspected.unread:
            self.unread[name] = self.unread.get(name, 0) + 1
        for name, holds in self._row_oddities(inspected, row):
            if holds:
                self.oddities[name].add(inspected.place)

    def _row_oddities(self, inspected: InspectedRow, row: Row) -> Iterator[tuple[str, bool]]:
        """Yield the name of each oddity and whether the row has it."""
        ids = np.concatenate([sequence.tokens for sequence in inspected.sequences])
        yield TRUNCATION_NOTE, any(len(s.uncut) > len(s.tokens) for s in inspected.sequences)
        yield UNKNOWN_TOKENS, bool(np.isin(ids, [-1 if (i := self.tokenizer.unk_token_id) is None else i]).any())
        yield PAD_TOKENS, bool((ids == self.tokenizer.pad_token_id).any())
        yield SPECIAL_TOKENS, any(self._special.search(text) for text in row_texts(row, inspected.unread))
        parts = [part for s in inspected.sequences for part in (s.tokens.tobytes(), b"|")]
        yield REPEATED_ROW, _is_repeat(self._token_digests, b"".join([*parts, repr(inspected.ranks).encode()]))
        try:
            prompt = repr(parse_prompt(row)).encode()
        except BadRow:
            prompt = b""
        yield REPEATED_PROMPT, bool(prompt) and _is_repeat(self._prompt_digests, prompt)
        if self.kind == "sft":
            yield NO_STOP_LEARNT, not all(np.isin(s.tokens[s.mask], self._stops).any() for s in inspected.sequences)
        elif self.kind in ("reward", "kto"):
            yield NO_FINAL_STOP, not all(s.tokens[-1] in self._stops for s in inspected.sequences)

    def _add_pairs(self, inspected: InspectedRow) -> None:
        for (a, rank_a), (b, rank_b) in combinations(zip(inspected.sequences, inspected.ranks, strict=False), 2):
            if rank_a != rank_b:
                better, worse = (a, b) if rank_a < rank_b else (b, a)
                difference = len(better.uncut) - len(worse.uncut)
                self.pairs += 1
                self.longer_wins += 0.5 if difference == 0 else float(difference > 0)


def row_texts(row: Row, unread: Collection[str]) -> Iterator[str]:
    """Yield every string of a row that a stage reads, without the names of speakers."""
    return chain.from_iterable(_strings(value) for column, value in row.items() if column not in unread)


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            yield from chain.from_iterable(map(_strings, value))
        case dict():
            yield from chain.from_iterable(_strings(inner) for key, inner in value.items() if key not in SPEAKERS)


def _is_repeat(digests: set[bytes], content: bytes) -> bool:
    """Add the content's 16-byte digest to the set and tell whether it was there before."""
    digest = blake2b(content, digest_size=16).digest()
    repeat = digest in digests
    digests.add(digest)
    return repeat
