"""Rows as a stage would see them, one by one, and counts of what is odd about them."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.config import DataConfig
from jrlhf.data.errors import BadRow, DataError, LeftOut, Placed, Row
from jrlhf.data.formats import parse_prompt
from jrlhf.data.kinds import CUT, Columns, Kind, TrainOn, prompts_kind, rankings_kind, sft_kind
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer import stop_token_ids

KindName = Literal["sft", "reward", "prompts"]
UNCUT = 2**31 - 1
"""A max_length that cuts nothing."""
COMPARED = {"chosen", "rejected", "completions"}
PROMPTS = {"prompt", "instruction"}
ANSWERED = {"completion", "output", "response", "text", "messages", "conversations"}
"""Columns by which a row's purpose is guessed; ``jrlhf.data.formats`` says what each holds."""
SPEAKERS = ("role", "from")

UNSTOPPED = "no stop token in what is learnt"
UNENDED = "an answer without its stop token"
REPEATED = "the very tokens of an earlier row"
SAME_PROMPT = "the prompt of an earlier row"
UNKNOWN = "unknown tokens"
PADDED = "the pad token in the text"
CONTROL = "special tokens written in the text"


class Sequence(NamedTuple):
    """What goes through the model at once."""

    tokens: np.ndarray
    marked: np.ndarray
    """True where a token is learnt (SFT), or from where the answers of a ranking differ; of a prompt nowhere."""
    whole: np.ndarray
    """The tokens before they were cut to max_length."""


class Seen(NamedTuple):
    """A row as a stage sees it: one sequence, or one a completion, with its rank."""

    place: str
    sequences: list[Sequence]
    ranks: list[int]
    unread: Collection[str] = ()
    """Columns and message fields that nothing reads."""
    notes: Collection[str] = ()
    """What loading notes of such a row, but that it is cut."""


class Lens:
    """Makes of rows what ``load_sft``, ``load_rankings`` and ``load_prompts`` make of them, by the same code."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, kind: KindName, train_on: TrainOn) -> None:
        self._limit = config.max_length

        def made(config: DataConfig) -> Kind:
            match kind:
                case "sft":
                    return sft_kind(config, tokenizer, train_on=train_on)
                case "reward":
                    return rankings_kind(config, tokenizer)
                case "prompts":
                    return prompts_kind(config, tokenizer, Columns())

        self._cut, self._whole = made(config), made(replace(config, max_length=UNCUT))

    def see(self, place: str, row: Row) -> Seen:
        """``BadRow`` for what cannot be trained on."""
        encoded = self._cut.encode(row)
        tokens = encoded.ragged["tokens"]
        # Only what has the full length can have been longer.
        full = any(len(ids) >= self._limit for ids in tokens)
        whole = self._whole.encode(row).ragged["tokens"] if full else tokens
        ranks = encoded.ragged["ranks"][0] if "ranks" in encoded.ragged else []
        if "learnt" in encoded.flat:
            marked = [encoded.flat["learnt"]]
        else:
            marked = _differing(tokens, whole) if ranks else [np.zeros(len(ids), np.bool_) for ids in tokens]
        sequences = [Sequence(*parts) for parts in zip(tokens, marked, whole, strict=True)]
        notes = [note for note in encoded.notes if note != CUT]
        return Seen(place, sequences, list(ranks), self._cut.unread(row), notes)


def _differing(rows: list[np.ndarray], whole: list[np.ndarray]) -> list[np.ndarray]:
    """What of a ranking's sequences is no shared prompt; where that lost its start, they end at least as before."""
    prompt = _shared(whole)
    starts = [len(ids) - (len(uncut) - prompt) for ids, uncut in zip(rows, whole, strict=True)]
    return [np.arange(len(ids)) >= max(start, _shared(rows)) for ids, start in zip(rows, starts, strict=True)]


def _shared(rows: list[np.ndarray]) -> int:
    """Tokens with which all rows begin."""
    shortest = min(map(len, rows))
    same = np.all([ids[:shortest] == rows[0][:shortest] for ids in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def kind_of(row: Row) -> KindName:
    """What a row is for, by its columns."""
    has = {column for column in row if row[column] is not None}
    if has & COMPARED:
        return "reward"
    return "prompts" if has & PROMPTS and not has & ANSWERED else "sft"


def first_row(rows: Iterable[Placed]) -> tuple[Row, Iterator[Placed]]:
    """The first row that is one (empty where there is none), and all rows, it and those before it too."""
    before, unread = list[Placed](), iter(rows)
    for placed in unread:
        before.append(placed)
        if not isinstance(placed[1], BadRow):
            return placed[1], chain(before, unread)
    return {}, iter(before)


@dataclass
class Count:
    """How many rows, and the first of them."""

    rows: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        self.first = self.first or place
        self.rows += 1


@dataclass
class Tally:
    """Counts over a whole source. ``add`` each row that is seen, ``refuse`` each that is bad."""

    tokenizer: Tokenizer
    kind: KindName
    odd: dict[str, Count] = field(init=False)
    bad: dict[str, Count] = field(default_factory=dict)
    left_out: dict[str, Count] = field(default_factory=dict)
    """Good rows that are not for the stage, by reason."""
    noted: dict[str, Count] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    """Rows that have a column, or a message field, that nothing reads; by its name."""
    error: str = ""
    """The first bad row: where it stands, and what is wrong with it."""
    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """Of every sequence, in tokens."""
    learnt: int = 0
    cut: int = 0
    """Tokens cut off."""
    pairs: int = 0
    longer_wins: float = 0.0
    """Pairs whose better answer has more tokens; as many count half."""

    def __post_init__(self) -> None:
        self._stops = np.asarray(stop_token_ids(self.tokenizer, ()))
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted({str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens))
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._tokens_seen, self._prompts_seen = set[bytes](), set[bytes]()
        ends = {"sft": [UNSTOPPED], "reward": [UNENDED], "prompts": []}[self.kind]
        self.odd = {name: Count() for name in (CUT, *ends, REPEATED, SAME_PROMPT, UNKNOWN, PADDED, CONTROL)}

    def refuse(self, place: str, error: BadRow) -> None:
        if isinstance(error, LeftOut):
            self.left_out.setdefault(error.reason, Count()).add(place)
            return
        self.error = self.error or f"{place}: {error}"
        self.bad.setdefault(error.reason, Count()).add(place)

    def add(self, seen: Seen, row: Row) -> None:
        self.rows += 1
        for ids, marked, whole in seen.sequences:
            self.lengths.append(len(ids))
            self.learnt += int(marked.sum()) if self.kind == "sft" else 0
            self.cut += len(whole) - len(ids)
        self._compare(seen)
        for note in seen.notes:
            self.noted.setdefault(note, Count()).add(seen.place)
        for name in seen.unread:
            self.unread[name] = self.unread.get(name, 0) + 1
        for name, holds in self._oddities(seen, row):
            if holds:
                self.odd[name].add(seen.place)

    def _oddities(self, seen: Seen, row: Row) -> Iterator[tuple[str, bool]]:
        ids = np.concatenate([sequence.tokens for sequence in seen.sequences])
        yield CUT, any(len(s.whole) > len(s.tokens) for s in seen.sequences)
        yield UNKNOWN, bool(np.isin(ids, [-1 if (i := self.tokenizer.unk_token_id) is None else i]).any())
        yield PADDED, bool((ids == self.tokenizer.pad_token_id).any())
        yield CONTROL, any(self._special.search(text) for text in texts_of(row, seen.unread))
        parts = [part for s in seen.sequences for part in (s.tokens.tobytes(), b"|")]
        yield REPEATED, _met(self._tokens_seen, b"".join([*parts, repr(seen.ranks).encode()]))
        try:
            prompt = repr(parse_prompt(row)).encode()
        except BadRow:
            prompt = b""
        yield SAME_PROMPT, bool(prompt) and _met(self._prompts_seen, prompt)
        if self.kind == "sft":
            yield UNSTOPPED, not all(np.isin(s.tokens[s.marked], self._stops).any() for s in seen.sequences)
        elif self.kind == "reward":
            yield UNENDED, not all(s.tokens[-1] in self._stops for s in seen.sequences)

    def _compare(self, seen: Seen) -> None:
        for (a, rank_a), (b, rank_b) in combinations(zip(seen.sequences, seen.ranks, strict=False), 2):
            if rank_a != rank_b:
                better, worse = (a, b) if rank_a < rank_b else (b, a)
                difference = len(better.whole) - len(worse.whole)
                self.pairs += 1
                self.longer_wins += 0.5 if difference == 0 else float(difference > 0)


def texts_of(row: Row, unread: Collection[str]) -> Iterator[str]:
    """Every string of a row that a stage reads, but who speaks."""
    return chain.from_iterable(_strings(value) for column, value in row.items() if column not in unread)


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            yield from chain.from_iterable(map(_strings, value))
        case dict():
            yield from chain.from_iterable(_strings(inner) for key, inner in value.items() if key not in SPEAKERS)


def _met(known: set[bytes], what: bytes) -> bool:
    """Whether it was there before; from now on it is. A digest of 16 bytes stands for it."""
    digest = blake2b(what, digest_size=16).digest()
    met = digest in known
    known.add(digest)
    return met


def look(lens: Lens, tally: Tally, rows: Iterable[Placed], show: Callable[[Seen], None]) -> None:
    """Every row counted, and shown where it can be trained on."""
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            seen = lens.see(place, row)
        except BadRow as error:
            tally.refuse(place, error)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        else:
            tally.add(seen, row)
            show(seen)
