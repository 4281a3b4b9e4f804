"""Loading of data: rows become padded token batches by way of formats, chat templates, tokenisation and an order."""

from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, DataError
from jrlhf.data.kinds import Columns
from jrlhf.data.load import load_prompts, load_rankings, load_sft, load_texts, load_unpaired
from jrlhf.data.mismatched import UnpairedRows, pack_unpaired
from jrlhf.data.order import Order, Part, steps_per_epoch
from jrlhf.data.packing import PackedRankingRows, PackedSFTRows, pack_rankings, pack_sft
from jrlhf.data.preferences import PreferenceRows, UnpairedPreferenceRows
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.recipe import encoder_for
from jrlhf.data.rows import PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.sources import open_source
from jrlhf.data.stamps import SourceRows, stamp, stamps
from jrlhf.data.tokenizer import load_tokenizer, stop_token_ids
from jrlhf.data.tokenizer_files import tokenizer_files

__all__ = [
    "BadRow",
    "Columns",
    "DataError",
    "Encoder",
    "Order",
    "PackedRankingRows",
    "PackedSFTRows",
    "Part",
    "PreferenceRows",
    "PromptRows",
    "RankingRows",
    "SFTRows",
    "SourceRows",
    "TextRows",
    "Tokenizer",
    "UnpairedPreferenceRows",
    "UnpairedRows",
    "bucket_lengths",
    "encoder_for",
    "load_prompts",
    "load_rankings",
    "load_sft",
    "load_texts",
    "load_tokenizer",
    "load_unpaired",
    "open_source",
    "pack_rankings",
    "pack_sft",
    "pack_unpaired",
    "stamp",
    "stamps",
    "steps_per_epoch",
    "stop_token_ids",
    "tokenizer_files",
]
