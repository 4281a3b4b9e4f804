"""How each stage makes its rows: a row of a source is parsed, tokenised and cut, and what is odd about it is noted."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.config import DataConfig
from jrlhf.data.columns import Encoded, Schema
from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, Row, absent
from jrlhf.data.formats import Answered, parse_answers, parse_prompt, parse_ranking, parse_sft, parse_tools
from jrlhf.data.messages import Content, Tools, has_weights
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.recipe import encoder_for
from jrlhf.data.unread import unread_of
from jrlhf.models.reading import STOP_TOKEN, Reading

TrainOn = Literal["completion", "assistant", "all"]

CUT = "cut to max_length"
"""The note of rows that lost tokens, which are counted in ``rows.cut``."""

SHOWN = Schema(ragged={"tokens": np.int32, "shown": np.uint8}, flat={})
"""Rows that are shown beside their answers or scores: as JSON, so that none is an object in memory."""


class Kind(NamedTuple):
    """How a stage wants its rows: the name and settings go into the cache's key."""

    name: str
    settings: Mapping[str, Any]
    schema: Schema
    encode: Callable[[Row], Encoded]
    unread: Callable[[Row], list[str]]
    """The names in a row that nothing reads."""


def sft_kind(config: DataConfig, tokenizer: Tokenizer, *, train_on: TrainOn) -> Kind:
    """How ``load_sft`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        notes = list[str]()
        answered = parse_sft(row, chat=encoder.chat, note=notes.append)
        # A turn of weight 0 is not learnt inside a prompt either.
        every_turn = train_on == "assistant" or (train_on == "all" and has_weights(answered.prompt))
        segments = encoder.segments(answered, every_turn=every_turn)
        tokens = np.asarray([token for segment in segments for token in segment.ids], np.int32)
        marks = [(s.answer or train_on == "all") and not s.barred for s in segments]
        learnt = np.repeat(marks, [len(s.ids) for s in segments])
        if all(s.barred for s in segments if s.answer):
            raise BadRow("weight", "0 for every turn of the assistant, so nothing would be learnt")
        # Nothing predicts a row's first token.
        learnt[0] = False
        if not learnt[: config.max_length].any():
            reason = f"the first token to learn is beyond max_length ({config.max_length}), so nothing would be learnt"
            raise BadRow("completion", reason)
        encoded = {"tokens": [tokens[: config.max_length]]}, {"learnt": learnt[: config.max_length]}
        return Encoded(*encoded, notes + cut_note([len(tokens)], config.max_length))

    schema = Schema(ragged={"tokens": np.int32}, flat={"learnt": np.bool_})
    return Kind("sft", {"train_on": train_on}, schema, encode, unread_of("sft", tokenizer))


def rankings_kind(config: DataConfig, tokenizer: Tokenizer) -> Kind:
    """How ``load_rankings`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        notes = list[str]()
        prompt, completions, ranks, margin, tools = parse_ranking(row, chat=encoder.chat, note=notes.append)
        pairs = [encoder.answered(Answered(prompt, completion, tools)) for completion in completions]
        tokens = [encoder.fitted(before, after, config.max_length) for before, after in pairs]
        texts = [ids.tobytes() for ids in tokens]
        if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
            reason = f"two answers of unequal rank have the same tokens, of which max_length allows {config.max_length}"
            raise BadRow("completions" if "completions" in row else "chosen", reason)
        longest = {"margin": [margin], "longest": [max(map(len, tokens))]}
        notes += cut_note(map(_total, pairs), config.max_length)
        return Encoded({"tokens": tokens, "ranks": [ranks]}, longest, notes)

    schema = Schema(ragged={"tokens": np.int32, "ranks": np.int32}, flat={"margin": np.float32, "longest": np.int32})
    return Kind("rankings", {}, schema, encode, unread_of("rankings", tokenizer))


class Columns(NamedTuple):
    """The columns of a prompt's row, besides the prompt, that are kept in ``shown``."""

    needed: tuple[str, ...] = ()
    """A row without one of them is bad."""
    optional: tuple[str, ...] = ()
    """Kept where a row has them."""
    every: bool = False
    """Keep all that a row has."""
    reader: str = ""
    """What reads the needed ones, for errors."""


def prompts_kind(config: DataConfig, tokenizer: Tokenizer, columns: Columns) -> Kind:
    """How ``load_prompts`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        prompt = parse_prompt(row, chat=encoder.chat)
        tools = parse_tools(row, prompt)
        for name in columns.needed:
            if row.get(name) is None:
                raise absent(row, name, rest=f", but {columns.reader} reads it" if columns.reader else "")
        kept = row if columns.every else (*columns.needed, *columns.optional)
        others = {name: row[name] for name in kept if name in row}
        whole = encoder.prompt(prompt, tools)
        tokens = encoder.fitted(whole, [], config.max_length)
        encoded = {"tokens": [tokens], "shown": [_json(others | _shown(prompt, tools))]}
        return Encoded(encoded, {}, cut_note([len(whole)], config.max_length))

    kept_columns = {name: value for name, value in columns._asdict().items() if name != "reader"}
    settings = kept_columns if any(kept_columns.values()) else {}
    unread = unread_of("prompts", tokenizer, (*columns.needed, *columns.optional))
    return Kind("prompts", settings, SHOWN, encode, (lambda row: []) if columns.every else unread)


def texts_kind(config: DataConfig, tokenizer: Tokenizer, reading: Reading) -> Kind:
    """How ``load_texts`` makes its rows, for a reward model of that ``reading``."""
    encoder = encoder_for(tokenizer, reading)

    def encode(row: Row) -> Encoded:
        tokens, texts, totals, notes = [], [], [], list[str]()
        for answer in parse_answers(row, chat=encoder.chat, note=notes.append):
            before, after = encoder.answered(answer)
            texts.append(_json(_shown(answer.prompt, answer.tools) | {"completion": answer.completion}))
            tokens.append(encoder.fitted(before, after, config.max_length))
            totals.append(len(before) + len(after))
        return Encoded({"tokens": tokens, "shown": texts}, {}, notes + cut_note(totals, config.max_length))

    settings = {} if reading == STOP_TOKEN else {"score_at": reading.score_at}
    return Kind("texts", settings, SHOWN, encode, unread_of("texts", tokenizer))


def _shown(prompt: Content | None, tools: Tools | None) -> dict[str, Any]:
    """What a row asks, in columns of their own that are read as it was."""
    return {name: value for name, value in (("prompt", prompt), ("tools", tools)) if value is not None}


def cut_note(lengths: Iterable[int], max_length: int) -> list[str]:
    """What is noted of a row whose sequences have so many tokens before they are cut."""
    return [CUT] if any(length > max_length for length in lengths) else []


def _total(pair: tuple[list[int], list[int]]) -> int:
    return len(pair[0]) + len(pair[1])


def _json(value: Mapping[str, Any]) -> np.ndarray:
    """As bytes of a JSON text; what JSON does not know, such as the date in a Parquet cell, as a string."""
    return np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)
