"""The row encoders of the stages: each parses, tokenises and cuts a row and notes what is unusual about it."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from jrlhf.config import DataConfig
from jrlhf.data.columns import Encoded, Schema
from jrlhf.data.encode import Encoder, Segment
from jrlhf.data.errors import BadRow, Row, missing_value
from jrlhf.data.formats import Example, parse_answers, parse_prompt, parse_ranking, parse_sft, parse_tools
from jrlhf.data.messages import Content, Tools, has_weights
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.recipe import encoder_for
from jrlhf.data.unpaired import parse_unpaired
from jrlhf.data.unread import unread_of
from jrlhf.models.reading import STOP_TOKEN, Reading

TrainOn = Literal["completion", "assistant", "all"]

TRUNCATION_NOTE = "cut to max_length"
"""Note on rows that lost tokens; ``rows.cut`` counts them."""

RECORD_SCHEMA = Schema(ragged={"tokens": np.int32, "shown": np.uint8}, flat={})
"""Schema of rows that are shown beside their answers or scores; JSON text takes less memory than Python objects."""


class Kind(NamedTuple):
    """The encoder and schema of a stage's rows; name and settings go into the cache's key."""

    name: str
    settings: Mapping[str, Any]
    schema: Schema
    encode: Callable[[Row], Encoded]
    unread: Callable[[Row], list[str]]
    """Function from a row to the names in it that nothing reads."""


def sft_kind(config: DataConfig, tokenizer: Tokenizer, *, train_on: TrainOn) -> Kind:
    """Return the kind of rows that ``load_sft`` loads."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        notes = list[str]()
        encode_example = parse_sft(row, chat=encoder.chat, note=notes.append)
        # A turn of weight 0 is not learnt even inside a prompt.
        every_turn = train_on == "assistant" or (train_on == "all" and has_weights(encode_example.prompt))
        segments = encoder.segments(encode_example, every_turn=every_turn)
        tokens = np.asarray([token for segment in segments for token in segment.ids], np.int32)
        marks = [(s.answer or train_on == "all") and not s.zero_weight for s in segments]
        learnt = np.repeat(marks, [len(s.ids) for s in segments])
        if all(s.zero_weight for s in segments if s.answer):
            raise BadRow("weight", "is 0 for every assistant turn, so nothing would be learnt")
        # Nothing predicts a row's first token.
        learnt[0] = False
        if not learnt[: config.max_length].any():
            reason = f"starts beyond max_length ({config.max_length}), so nothing would be learnt"
            raise BadRow("completion", reason)
        encoded = {"tokens": [tokens[: config.max_length]]}, {"learnt": learnt[: config.max_length]}
        return Encoded(*encoded, notes + truncation_notes([len(tokens)], config.max_length))

    schema = Schema(ragged={"tokens": np.int32}, flat={"learnt": np.bool_})
    return Kind("sft", {"train_on": train_on}, schema, encode, unread_of("sft", tokenizer))


def rankings_kind(config: DataConfig, tokenizer: Tokenizer) -> Kind:
    """Return the kind of rows that ``load_rankings`` loads."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        notes = list[str]()
        prompt, completions, ranks, margin, tools = parse_ranking(row, chat=encoder.chat, note=notes.append)
        segments = [encoder.example_segments(Example(prompt, completion, tools)) for completion in completions]
        tokens, learnt, _ = zip(*(_judged_answer(encoder, each, config.max_length) for each in segments), strict=True)
        texts = [ids.tobytes() for ids in tokens]
        if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
            reason = f"two answers of unequal rank have the same tokens after the cut to max_length {config.max_length}"
            raise BadRow("completions" if "completions" in row else "chosen", reason)
        flat = {"margin": [margin], "longest": [max(map(len, tokens))], "learnt": np.concatenate(learnt)}
        notes += truncation_notes((sum(len(s.ids) for s in each) for each in segments), config.max_length)
        return Encoded({"tokens": list(tokens), "ranks": [ranks]}, flat, notes)

    flat_types = {"margin": np.float32, "longest": np.int32, "learnt": np.bool_}
    schema = Schema(ragged={"tokens": np.int32, "ranks": np.int32}, flat=flat_types)
    return Kind("rankings", {}, schema, encode, unread_of("rankings", tokenizer))


def unpaired_kind(config: DataConfig, tokenizer: Tokenizer) -> Kind:
    """Return the kind of rows that ``load_unpaired`` loads."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        notes = list[str]()
        answers = parse_unpaired(row, chat=encoder.chat, note=notes.append)
        segments = [encoder.example_segments(answer.example) for answer in answers]
        judged = [_judged_answer(encoder, each, config.max_length) for each in segments]
        if len({answer.tokens.tobytes() for answer in judged}) < len(judged):
            raise BadRow("chosen", f"has the same tokens as rejected after the cut to max_length {config.max_length}")
        # Answers to one prompt are known by it, since it may be cut to different lengths before each.
        prompts = [xxhash.xxh3_64_intdigest(np.asarray(each[0].ids, np.int32).tobytes()) for each in segments]
        ragged = {"tokens": [a.tokens for a in judged], "ranks": [[int(not answer.desirable)] for answer in answers]}
        flat = {"learnt": np.concatenate([a.marks for a in judged]), "start": [a.start for a in judged]}
        notes += truncation_notes((sum(len(s.ids) for s in each) for each in segments), config.max_length)
        return Encoded(ragged, flat | {"prompt": prompts}, notes)

    flat_types = {"learnt": np.bool_, "start": np.int32, "prompt": np.uint64}
    schema = Schema(ragged={"tokens": np.int32, "ranks": np.int32}, flat=flat_types)
    return Kind("unpaired", {}, schema, encode, unread_of("unpaired", tokenizer))


class _Judged(NamedTuple):
    """A prompt with one of its answers, cut to ``max_length``."""

    tokens: np.ndarray
    marks: np.ndarray
    """True at the answer's own tokens."""
    start: int
    """Number of tokens of the prompt."""


def _judged_answer(encoder: Encoder, segments: list[Segment], max_length: int) -> _Judged:
    """Return the ids of a prompt with one of its answers, and a mask of the answer's tokens."""
    before, *after = segments
    prompt = encoder.cut_prompt(before.ids, sum(len(s.ids) for s in after), max_length)
    tokens = np.asarray((prompt + [token for s in after for token in s.ids])[:max_length], np.int32)
    marks = np.repeat([False, *(s.answer for s in after)], [len(prompt), *(len(s.ids) for s in after)])
    # Nothing predicts a row's first token.
    marks[0] = False
    return _Judged(tokens, marks[:max_length], len(prompt))


class Columns(NamedTuple):
    """The columns of a prompt's row that ``shown`` holds in addition to the prompt."""

    needed: tuple[str, ...] = ()
    """Columns that every row must have."""
    optional: tuple[str, ...] = ()
    """Columns to include where a row has them."""
    every: bool = False
    """Include all columns of the row."""
    reader: str = ""
    """Name of the reader of the needed columns, for errors."""


def prompts_kind(config: DataConfig, tokenizer: Tokenizer, columns: Columns) -> Kind:
    """Return the kind of rows that ``load_prompts`` loads."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        prompt = parse_prompt(row, chat=encoder.chat)
        tools = parse_tools(row, prompt)
        for name in columns.needed:
            if row.get(name) is None:
                raise missing_value(row, name, rest=f", but {columns.reader} reads it" if columns.reader else "")
        names = row if columns.every else (*columns.needed, *columns.optional)
        others = {name: row[name] for name in names if name in row}
        prompt_ids = encoder.prompt(prompt, tools)
        tokens = encoder.truncate(prompt_ids, [], config.max_length)
        encoded = {"tokens": [tokens], "shown": [_json(others | _prompt_columns(prompt, tools))]}
        return Encoded(encoded, {}, truncation_notes([len(prompt_ids)], config.max_length))

    kept_columns = {name: value for name, value in columns._asdict().items() if name != "reader"}
    settings = kept_columns if any(kept_columns.values()) else {}
    unread = unread_of("prompts", tokenizer, (*columns.needed, *columns.optional))
    return Kind("prompts", settings, RECORD_SCHEMA, encode, (lambda row: []) if columns.every else unread)


def texts_kind(config: DataConfig, tokenizer: Tokenizer, reading: Reading) -> Kind:
    """Return the kind of rows that ``load_texts`` loads for a reward model with this ``reading``."""
    encoder = encoder_for(tokenizer, reading)

    def encode(row: Row) -> Encoded:
        tokens, texts, totals, notes = [], [], [], list[str]()
        for answer in parse_answers(row, chat=encoder.chat, note=notes.append):
            before, after = encoder.encode_example(answer)
            texts.append(_json(_prompt_columns(answer.prompt, answer.tools) | {"completion": answer.completion}))
            tokens.append(encoder.truncate(before, after, config.max_length))
            totals.append(len(before) + len(after))
        return Encoded({"tokens": tokens, "shown": texts}, {}, notes + truncation_notes(totals, config.max_length))

    settings = {} if reading == STOP_TOKEN else {"score_at": reading.score_at}
    return Kind("texts", settings, RECORD_SCHEMA, encode, unread_of("texts", tokenizer))


def _prompt_columns(prompt: Content | None, tools: Tools | None) -> dict[str, Any]:
    """Return the columns ``prompt`` and ``tools`` of a row, without those that are None."""
    return {name: value for name, value in (("prompt", prompt), ("tools", tools)) if value is not None}


def truncation_notes(lengths: Iterable[int], max_length: int) -> list[str]:
    """Return the notes on a row whose sequences have these lengths before they are cut."""
    return [TRUNCATION_NOTE] if any(length > max_length for length in lengths) else []


def _json(value: Mapping[str, Any]) -> np.ndarray:
    """Encode as the bytes of a JSON text; values that JSON lacks, such as dates from Parquet, become strings."""
    return np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)
