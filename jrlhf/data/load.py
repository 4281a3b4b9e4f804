"""Loaders that parse, tokenise and cut the rows of sources and account for every row that they cannot use."""

import logging
import time
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple, TypedDict

import numpy as np

from jrlhf.config import DataConfig, Sources
from jrlhf.data.cache import cache_folder, cache_key, cached_table
from jrlhf.data.columns import Encoded, Table, Writer, concatenate, memory_table
from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, DataError, Row, Skips
from jrlhf.data.kinds import (
    TRUNCATION_NOTE,
    Columns,
    Kind,
    TrainOn,
    prompts_kind,
    rankings_kind,
    sft_kind,
    texts_kind,
    unpaired_kind,
)
from jrlhf.data.mismatched import UnpairedRows, unpaired_rows
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

NON_ROW_SETTINGS = ("train", "eval", "buckets", "cache")
"""Settings that do not affect the rows of a source; all others are part of the cache's key."""

PROGRESS_INTERVAL = 10.0
"""Seconds between progress lines while a long source is tokenised."""


def load_sft(config: DataConfig, sources: Sources, tokenizer: Tokenizer, *, train_on: TrainOn) -> SFTRows:
    """Load rows for SFT.

    ``train_on`` selects the learnt tokens. "completion" is the answer, or each assistant turn of a conversation;
    "assistant" adds the assistant turns in a chat prompt; "all" adds the prompt. Plain text is learnt with its EOS.
    """
    loaded = _load(config, sources, tokenizer, sft_kind(config, tokenizer, train_on=train_on))
    tokens, learnt = loaded.ragged("tokens"), loaded.beside("tokens", "learnt")
    return SFTRows(tokens, learnt, _buckets(config, tokens), _pad(tokenizer), **loaded.source_fields("tokens"))


def load_rankings(config: DataConfig, sources: Sources, tokenizer: Tokenizer) -> RankingRows:
    """Load rankings and preferences; a prompt that is too long is cut at its start so that the answers stay intact."""
    loaded = _load(config, sources, tokenizer, rankings_kind(config, tokenizer))
    tokens = loaded.ragged("tokens")
    return RankingRows(
        tokens=tokens,
        loss_mask=loaded.beside("tokens", "learnt"),
        ranks=loaded.ragged("ranks"),
        margin=loaded.flat("margin"),
        lengths=loaded.flat("longest"),
        buckets=_buckets(config, tokens),
        pad=_pad(tokenizer),
        **loaded.source_fields("ranks"),
    )


def load_unpaired(config: DataConfig, sources: Sources, tokenizer: Tokenizer) -> UnpairedRows:
    """Load answers that are labelled as desirable or not; of a preference each answer is one.

    Raises ``DataError`` if all answers have the same label or the same prompt.
    """
    loaded = _load(config, sources, tokenizer, unpaired_kind(config, tokenizer))
    tokens, ranks = loaded.ragged("tokens"), loaded.ragged("ranks")
    answers = RankingRows(
        tokens=tokens,
        loss_mask=loaded.beside("tokens", "learnt"),
        ranks=ranks,
        margin=np.zeros(len(ranks), np.float32),
        lengths=tokens.lengths,
        buckets=_buckets(config, tokens),
        pad=_pad(tokenizer),
        **loaded.source_fields("ranks"),
    )
    starts, prompts = loaded.flat("start"), loaded.flat("prompt")
    try:
        return unpaired_rows(answers, starts=starts, prompts=prompts, bos=Encoder(tokenizer).bos, config=config)
    except ValueError as error:
        raise DataError(f"{', '.join(source.source for source in loaded.sources)}: {error}") from error


def load_prompts(
    config: DataConfig, sources: Sources, tokenizer: Tokenizer, columns: Columns | None = None
) -> PromptRows:
    """Load prompts; one that is longer than ``max_length`` is cut at its start, after the BOS.

    ``columns`` selects the other columns of a row to keep.
    """
    loaded = _load(config, sources, tokenizer, prompts_kind(config, tokenizer, columns or Columns()))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return PromptRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.source_fields("tokens"))


def load_texts(config: DataConfig, sources: Sources, tokenizer: Tokenizer, reading: Reading = STOP_TOKEN) -> TextRows:
    """Load every answer in the rows, one after the other, for scoring by a reward model with this ``reading``."""
    loaded = _load(config, sources, tokenizer, texts_kind(config, tokenizer, reading))
    tokens, shown = loaded.ragged("tokens"), Objects(loaded.ragged("shown"))
    return TextRows(tokens, shown, _buckets(config, tokens), _pad(tokenizer), **loaded.source_fields("tokens"))


class SourceTables(NamedTuple):
    """One table per source, with the sources' mixing weights and identities."""

    tables: list[Table]
    weights: list[float]
    sources: list[SourceRows]

    def ragged(self, name: str) -> Ragged:
        return Ragged([table.ragged[name] for table in self.tables])

    def beside(self, name: str, flat: str) -> Ragged:
        """Return the flat column ``flat`` by rows that have the ends of the ragged column ``name``."""
        return Ragged([table.ragged[name]._replace(flat=table.flat[flat]) for table in self.tables])

    def flat(self, name: str) -> np.ndarray:
        return concatenate([table.flat[name] for table in self.tables])

    def source_fields(self, name: str) -> "SourceFields":
        """Return the fields about sources, counting each source's rows in the ragged column ``name``."""
        rows = [len(table.ragged[name].lengths) for table in self.tables]
        parts = [Part(count, weight) for count, weight in zip(rows, self.weights, strict=True)]
        skipped: Counter[str] = Counter()
        for table in self.tables:
            skipped.update(table.skipped)
        cut = sum(table.notes.get(TRUNCATION_NOTE, 0) for table in self.tables)
        return SourceFields(skipped=dict(skipped), parts=parts, cut=cut, sources=self.sources)


class SourceFields(TypedDict):
    """The fields about sources that all kinds of rows have; ``jrlhf.data.rows`` explains them."""

    skipped: dict[str, int]
    parts: list[Part]
    cut: int
    sources: list[SourceRows]


def _load(config: DataConfig, sources: Sources, tokenizer: Tokenizer, kind: Kind) -> SourceTables:
    weighted = {sources: 1.0} if isinstance(sources, str) else sources
    source_list = [open_source(source) for source in weighted]
    # Stamped before the first row is read, so that a file that changes meanwhile counts as another one.
    files = [stamps(source.files) for source in source_list]
    tables = [_table(config, source, tokenizer, kind) for source in source_list]
    # Hosts whose files differ would assemble different batches.
    same_everywhere(f"rows of {', '.join(weighted)}", lambda: " ".join(table.digest for table in tables))
    origins = zip(weighted, tables, files, source_list, strict=True)
    source_rows = [SourceRows(name, table.digest, files_of, source.local) for name, table, files_of, source in origins]
    return SourceTables(tables, list(weighted.values()), source_rows)


def _table(config: DataConfig, source: Source, tokenizer: Tokenizer, kind: Kind) -> Table:
    """Return the rows of one source, using the cache if the config has one."""
    folder = cache_folder(config.cache, source.files)
    if folder is None:
        return memory_table(kind.schema, lambda writer: _encode_source(config, source, kind, writer))
    settings = {name: value for name, value in asdict(config).items() if name not in NON_ROW_SETTINGS}
    # Ids are checked against the model's embeddings when rows are encoded, so the limit is part of the key.
    limit = {} if (rows := vocabulary_limit(tokenizer)) is None else {"embedding_rows": rows}
    key = cache_key(kind.name, source.name, source.files, tokenizer, {**settings, **kind.settings, **limit})
    return cached_table(folder, key, kind.schema, lambda writer: _encode_source(config, source, kind, writer))


def _encode_source(config: DataConfig, source: Source, kind: Kind, writer: Writer) -> Skips:
    """Encode every usable row; bad rows end the run or are counted, as the config says."""
    skips = Skips(source.name, skip=config.on_bad_row == "skip")

    def encode(row: Row) -> Encoded:
        encoded = kind.encode(row)
        return encoded._replace(unread=names) if (names := kind.unread(row)) else encoded

    start = last_report = time.monotonic()
    for place, row in encode_all(source.rows, encode):
        if isinstance(row, BadRow):
            skips.add(row, place)
        else:
            writer.add(row)
            for note in row.notes:
                skips.notes.add(note, place)
            skips.add_unread(row.unread)
        if (now := time.monotonic()) - last_report > PROGRESS_INTERVAL:
            last_report = now
            log.info("%s: %d rows tokenised, %d per second", source.name, writer.rows, writer.rows / (now - start))
    return skips


def _pad(tokenizer: Tokenizer) -> int:
    return int(tokenizer.pad_token_id)


def _buckets(config: DataConfig, tokens: Ragged) -> tuple[int, ...]:
    return bucket_lengths(int(tokens.lengths.max()), config.buckets)
