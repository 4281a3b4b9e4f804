"""Sources and a config to rows: parse, tokenise, cut, and account for every row that cannot be used."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from jrlhf.config import DataConfig, Sources
from jrlhf.data.cache import cache_folder, cache_key, cached
from jrlhf.data.columns import Encoded, Schema, Table, Writer, in_memory, joined
from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, Skips
from jrlhf.data.formats import Answered, parse_answers, parse_prompt, parse_ranking, parse_sft
from jrlhf.data.order import Part
from jrlhf.data.ragged import Objects, Ragged
from jrlhf.data.rows import PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.sources import Row, Source, open_source
from jrlhf.data.stamps import SourceRows, stamps
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.data.workers import encode_all
from jrlhf.parallel import same_everywhere

log = logging.getLogger("jrlhf.data")

TrainOn = Literal["completion", "assistant", "all"]

NOT_OF_ROWS = ("train", "eval", "buckets", "cache")
"""The settings that change no row of a source; every other one has a part in the cache's key."""

CUT = "cut to max_length"
"""The note of rows that lost tokens, which are counted in ``rows.cut``."""

PATIENCE = 10.0
"""Seconds between lines that say how far a long source is."""


def sft_kind(config: DataConfig, tokenizer: Tokenizer, *, train_on: TrainOn) -> "Kind":
    """How ``load_sft`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        segments = encoder.segments(parse_sft(row), every_turn=train_on == "assistant")
        tokens = np.asarray([token for segment in segments for token in segment.ids], np.int32)
        learnt = np.repeat([s.answer or train_on == "all" for s in segments], [len(s.ids) for s in segments])
        # Nothing predicts a row's first token.
        learnt[0] = False
        if not learnt[: config.max_length].any():
            reason = f"the first token to learn is beyond max_length ({config.max_length}), so nothing would be learnt"
            raise BadRow("completion", reason)
        encoded = {"tokens": [tokens[: config.max_length]]}, {"learnt": learnt[: config.max_length]}
        return Encoded(*encoded, cut_note([len(tokens)], config.max_length))

    schema = Schema(ragged={"tokens": np.int32}, flat={"learnt": np.bool_})
    return Kind("sft", {"train_on": train_on}, schema, encode)


def load_sft(config: DataConfig, sources: Sources, tokenizer: Tokenizer, *, train_on: TrainOn) -> SFTRows:
    """Rows to learn from. ``train_on``: the answer (of a conversation each assistant turn); "assistant": those inside a
    chat prompt too; "all": the prompt as well. Plain text is learnt whole, its EOS included.
    """
    loaded = _load(config, sources, tokenizer, sft_kind(config, tokenizer, train_on=train_on))
    tokens = loaded.ragged("tokens")
    # The mask's rows end where the tokens' do.
    masks = [table.ragged["tokens"]._replace(flat=table.flat["learnt"]) for table in loaded.tables]
    return SFTRows(tokens, Ragged(masks), _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


def rankings_kind(config: DataConfig, tokenizer: Tokenizer) -> "Kind":
    """How ``load_rankings`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        prompt, completions, ranks, margin = parse_ranking(row)
        pairs = [encoder.answered(Answered(prompt, completion)) for completion in completions]
        tokens = [encoder.fitted(before, after, config.max_length) for before, after in pairs]
        texts = [ids.tobytes() for ids in tokens]
        if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
            reason = f"two answers of unequal rank have the same tokens, of which max_length allows {config.max_length}"
            raise BadRow("completions" if "completions" in row else "chosen", reason)
        longest = {"margin": [margin], "longest": [max(map(len, tokens))]}
        return Encoded({"tokens": tokens, "ranks": [ranks]}, longest, cut_note(map(_total, pairs), config.max_length))

    schema = Schema(ragged={"tokens": np.int32, "ranks": np.int32}, flat={"margin": np.float32, "longest": np.int32})
    return Kind("rankings", {}, schema, encode)


def load_rankings(config: DataConfig, sources: Sources, tokenizer: Tokenizer) -> RankingRows:
    """Rankings and preferences; a prompt that is too long is cut at its start, so that the answers stay."""
    loaded = _load(config, sources, tokenizer, rankings_kind(config, tokenizer))
    tokens = loaded.ragged("tokens")
    return RankingRows(
        tokens=tokens,
        ranks=loaded.ragged("ranks"),
        margin=loaded.flat("margin"),
        lengths=loaded.flat("longest"),
        buckets=_buckets(config, tokens),
        pad=_pad(tokenizer),
        **loaded.account("ranks"),
    )


class Columns(NamedTuple):
    """The columns of a prompt's row, besides the prompt, that are kept in ``shown``."""

    needed: tuple[str, ...] = ()
    """A row without one of them is bad."""
    optional: tuple[str, ...] = ()
    """Kept where a row has them."""
    every: bool = False
    """Keep all that a row has."""


def prompts_kind(config: DataConfig, tokenizer: Tokenizer, columns: Columns) -> "Kind":
    """How ``load_prompts`` makes its rows."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        prompt = parse_prompt(row)
        for name in columns.needed:
            if row.get(name) is None:
                raise BadRow(name, "no such column, but a rule of ppo.rewards reads it")
        kept = row if columns.every else (*columns.needed, *columns.optional)
        others = {name: row[name] for name in kept if name in row}
        whole = encoder.prompt(prompt)
        tokens = encoder.fitted(whole, [], config.max_length)
        encoded = {"tokens": [tokens], "shown": [_json(others | {"prompt": prompt})]}
        return Encoded(encoded, {}, cut_note([len(whole)], config.max_length))

    settings = columns._asdict() if any(columns) else {}
    return Kind("prompts", settings, SHOWN, encode)


def load_prompts(
    config: DataConfig, sources: Sources, tokenizer: Tokenizer, columns: Columns | None = None
) -> PromptRows:
    """Prompts; one that is longer than ``max_length`` is cut at its start, a BOS kept. ``columns``: what is kept of
    a row besides."""
    loaded = _load(config, sources, tokenizer, prompts_kind(config, tokenizer, columns or Columns()))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return PromptRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


def load_texts(config: DataConfig, sources: Sources, tokenizer: Tokenizer) -> TextRows:
    """Every answer in the rows, one after the other, to be scored."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> Encoded:
        tokens, texts, totals = [], [], []
        for answer in parse_answers(row):
            before, after = encoder.answered(answer)
            given = {"completion": answer.completion}
            texts.append(_json(given if answer.prompt is None else {"prompt": answer.prompt} | given))
            tokens.append(encoder.fitted(before, after, config.max_length))
            totals.append(len(before) + len(after))
        return Encoded({"tokens": tokens, "shown": texts}, {}, cut_note(totals, config.max_length))

    loaded = _load(config, sources, tokenizer, Kind("texts", {}, SHOWN, encode))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return TextRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


def cut_note(lengths: Iterable[int], max_length: int) -> list[str]:
    """What is noted of a row whose sequences have so many tokens before they are cut."""
    return [CUT] if any(length > max_length for length in lengths) else []


def _total(pair: tuple[list[int], list[int]]) -> int:
    return len(pair[0]) + len(pair[1])


SHOWN = Schema(ragged={"tokens": np.int32, "shown": np.uint8}, flat={})
"""Rows that are shown beside their answers or scores: as JSON, so that none is an object in memory."""


class Kind(NamedTuple):
    """How a stage wants its rows: the name and settings go into the cache's key."""

    name: str
    settings: Mapping[str, Any]
    schema: Schema
    encode: Callable[[Row], Encoded]


class Loaded(NamedTuple):
    """A table a source, the weights they are mixed by, and what their rows are known by."""

    tables: list[Table]
    weights: list[float]
    sources: list[SourceRows]

    def ragged(self, name: str) -> Ragged:
        return Ragged([table.ragged[name] for table in self.tables])

    def flat(self, name: str) -> np.ndarray:
        return joined([table.flat[name] for table in self.tables])

    def account(self, name: str) -> "Account":
        """The sources, each with as many rows as it has in a ragged column, and what became of their rows."""
        rows = [len(table.ragged[name].lengths) for table in self.tables]
        parts = [Part(count, weight) for count, weight in zip(rows, self.weights, strict=True)]
        skipped: Counter[str] = Counter()
        for table in self.tables:
            skipped.update(table.skipped)
        cut = sum(table.notes.get(CUT, 0) for table in self.tables)
        return Account(skipped=dict(skipped), parts=parts, cut=cut, sources=self.sources)


class Account(TypedDict):
    """The fields of all kinds of rows that say where they are from: see ``jrlhf.data.rows``."""

    skipped: dict[str, int]
    parts: list[Part]
    cut: int
    sources: list[SourceRows]


def _load(config: DataConfig, sources: Sources, tokenizer: Tokenizer, kind: Kind) -> Loaded:
    weighted = {sources: 1.0} if isinstance(sources, str) else sources
    opened = [open_source(source) for source in weighted]
    # Taken before a row is read: a file that changes meanwhile is then another one.
    files = [stamps(source.files) for source in opened]
    tables = [_table(config, source, tokenizer, kind) for source in opened]
    # Hosts with files of their own would put together batches of rows that are not the same ones.
    same_everywhere(f"rows of {', '.join(weighted)}", lambda: " ".join(table.digest for table in tables))
    known = zip(weighted, tables, files, opened, strict=True)
    sources_of = [SourceRows(name, table.digest, at, source.local) for name, table, at, source in known]
    return Loaded(tables, list(weighted.values()), sources_of)


def _table(config: DataConfig, opened: Source, tokenizer: Tokenizer, kind: Kind) -> Table:
    """The rows of one source, from the cache or into it where the config asks for one."""
    folder = cache_folder(config.cache, opened.files)
    if folder is None:
        return in_memory(kind.schema, lambda writer: _each(config, opened, kind.encode, writer))
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_OF_ROWS}
    key = cache_key(kind.name, opened.name, opened.files, tokenizer, {**settings, **kind.settings})
    return cached(folder, key, kind.schema, lambda writer: _each(config, opened, kind.encode, writer))


def _each(config: DataConfig, source: Source, encode: Callable[[Row], Encoded], writer: Writer) -> Skips:
    """Encode every row that can be; the others end the run or are counted, as the config says."""
    skips = Skips(source.name, skip=config.on_bad_row == "skip")
    start = said = time.monotonic()
    for place, row in encode_all(source.rows, encode):
        if isinstance(row, BadRow):
            skips.add(row, place)
        else:
            writer.add(row)
            for note in row.notes:
                skips.notes.add(note, place)
        if (now := time.monotonic()) - said > PATIENCE:
            said = now
            log.info("%s: %d rows tokenised, %d a second", source.name, writer.rows, writer.rows / (now - start))
    return skips


def _json(value: Mapping[str, Any]) -> np.ndarray:
    """As bytes of a JSON text; what JSON does not know, such as the date in a Parquet cell, as a string."""
    return np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)


def _pad(tokenizer: Tokenizer) -> int:
    return int(tokenizer.pad_token_id)


def _buckets(config: DataConfig, tokens: Ragged) -> tuple[int, ...]:
    return bucket_lengths(int(tokens.lengths.max()), config.buckets)
