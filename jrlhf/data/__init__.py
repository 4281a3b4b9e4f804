"""Rows in, padded token batches out: formats, chat templates, tokenising, masks, order."""

from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, DataError
from jrlhf.data.load import Columns, load_prompts, load_rankings, load_sft, load_texts
from jrlhf.data.order import Order, Part, steps_per_epoch
from jrlhf.data.packing import PackedRankingRows, PackedSFTRows, pack_rankings, pack_sft
from jrlhf.data.rows import PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.sources import open_source
from jrlhf.data.stamps import SourceRows, stamp, stamps
from jrlhf.data.tokenizer import load_tokenizer, stop_token_ids

__all__ = [
    "BadRow",
    "Columns",
    "DataError",
    "Encoder",
    "Order",
    "PackedRankingRows",
    "PackedSFTRows",
    "Part",
    "PromptRows",
    "RankingRows",
    "SFTRows",
    "SourceRows",
    "TextRows",
    "bucket_lengths",
    "load_prompts",
    "load_rankings",
    "load_sft",
    "load_texts",
    "load_tokenizer",
    "open_source",
    "pack_rankings",
    "pack_sft",
    "stamp",
    "stamps",
    "steps_per_epoch",
    "stop_token_ids",
]
