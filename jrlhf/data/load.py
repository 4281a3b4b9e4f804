"""Sources and a config to rows: parse, tokenise, cut, and account for every row that cannot be used."""

import logging
import time
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple, TypedDict

import numpy as np

from jrlhf.config import DataConfig, Sources
from jrlhf.data.cache import cache_folder, cache_key, cached
from jrlhf.data.columns import Encoded, Table, Writer, in_memory, joined
from jrlhf.data.errors import BadRow, Row, Skips
from jrlhf.data.kinds import CUT, Columns, Kind, TrainOn, prompts_kind, rankings_kind, sft_kind, texts_kind
from jrlhf.data.order import Part
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.ragged import Objects, Ragged
from jrlhf.data.rows import PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.sources import Source, open_source
from jrlhf.data.stamps import SourceRows, stamps
from jrlhf.data.vocabulary import vocabulary_limit
from jrlhf.data.workers import encode_all
from jrlhf.models.reading import STOP_TOKEN, Reading
from jrlhf.parallel.hosts import same_everywhere

log = logging.getLogger("jrlhf.data")

NOT_OF_ROWS = ("train", "eval", "buckets", "cache")
"""The settings that change no row of a source; every other one has a part in the cache's key."""

PATIENCE = 10.0
"""Seconds between lines that say how far a long source is."""


def load_sft(config: DataConfig, sources: Sources, tokenizer: Tokenizer, *, train_on: TrainOn) -> SFTRows:
    """Rows to learn from. ``train_on``: the answer (of a conversation each assistant turn); "assistant": those inside a
    chat prompt too; "all": the prompt as well. Plain text is learnt whole, its EOS included.
    """
    loaded = _load(config, sources, tokenizer, sft_kind(config, tokenizer, train_on=train_on))
    tokens = loaded.ragged("tokens")
    # The mask's rows end where the tokens' do.
    masks = [table.ragged["tokens"]._replace(flat=table.flat["learnt"]) for table in loaded.tables]
    return SFTRows(tokens, Ragged(masks), _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


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


def load_prompts(
    config: DataConfig, sources: Sources, tokenizer: Tokenizer, columns: Columns | None = None
) -> PromptRows:
    """Prompts; one that is longer than ``max_length`` is cut at its start, a BOS kept. ``columns``: what is kept of
    a row besides."""
    loaded = _load(config, sources, tokenizer, prompts_kind(config, tokenizer, columns or Columns()))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return PromptRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


def load_texts(config: DataConfig, sources: Sources, tokenizer: Tokenizer, reading: Reading = STOP_TOKEN) -> TextRows:
    """Every answer in the rows, one after the other, to be scored by a reward model of that ``reading``."""
    loaded = _load(config, sources, tokenizer, texts_kind(config, tokenizer, reading))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return TextRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.account("tokens"))


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
        return in_memory(kind.schema, lambda writer: _each(config, opened, kind, writer))
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_OF_ROWS}
    # Rows are held to the model's embeddings when they are made: those of a larger model do for no smaller one.
    limit = {} if (rows := vocabulary_limit(tokenizer)) is None else {"embedding_rows": rows}
    key = cache_key(kind.name, opened.name, opened.files, tokenizer, {**settings, **kind.settings, **limit})
    return cached(folder, key, kind.schema, lambda writer: _each(config, opened, kind, writer))


def _each(config: DataConfig, source: Source, kind: Kind, writer: Writer) -> Skips:
    """Encode every row that can be; the others end the run or are counted, as the config says."""
    skips = Skips(source.name, skip=config.on_bad_row == "skip")

    def encode(row: Row) -> Encoded:
        encoded = kind.encode(row)
        return encoded._replace(unread=names) if (names := kind.unread(row)) else encoded

    start = said = time.monotonic()
    for place, row in encode_all(source.rows, encode):
        if isinstance(row, BadRow):
            skips.add(row, place)
        else:
            writer.add(row)
            for note in row.notes:
                skips.notes.add(note, place)
            skips.add_unread(row.unread)
        if (now := time.monotonic()) - said > PATIENCE:
            said = now
            log.info("%s: %d rows tokenised, %d a second", source.name, writer.rows, writer.rows / (now - start))
    return skips


def _pad(tokenizer: Tokenizer) -> int:
    return int(tokenizer.pad_token_id)


def _buckets(config: DataConfig, tokens: Ragged) -> tuple[int, ...]:
    return bucket_lengths(int(tokens.lengths.max()), config.buckets)
