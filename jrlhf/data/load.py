"""A source and a config to rows: parse, tokenise, cut, and account for every row that cannot be used."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np

from jrlhf.config import DataConfig
from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow, Skips
from jrlhf.data.formats import Answered, Content, parse_answers, parse_prompt, parse_ranking, parse_sft
from jrlhf.data.rows import PromptRows, Ragged, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.sources import Row, open_source
from jrlhf.data.tokenizer import Tokenizer

TrainOn = Literal["completion", "assistant", "all"]
Parsed = TypeVar("Parsed")


def load_sft(config: DataConfig, source: str, tokenizer: Tokenizer, *, train_on: TrainOn) -> SFTRows:
    """Rows to learn from. ``train_on``: the answer (of a conversation each assistant turn); "assistant": those inside a
    chat prompt too; "all": the prompt as well. Plain text is learnt whole, its EOS included.
    """
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> tuple[np.ndarray, np.ndarray]:
        segments = encoder.segments(parse_sft(row), every_turn=train_on == "assistant")
        tokens = np.asarray([token for segment in segments for token in segment.ids], np.int32)
        learnt = np.repeat([s.answer or train_on == "all" for s in segments], [len(s.ids) for s in segments])
        # Nothing predicts a row's first token.
        learnt[0] = False
        if not learnt[: config.max_length].any():
            reason = f"the first token to learn is beyond max_length ({config.max_length}), so nothing would be learnt"
            raise BadRow("completion", reason)
        return tokens[: config.max_length], learnt[: config.max_length]

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for tokens, _ in kept])
    buckets = bucket_lengths(int(tokens.lengths.max()), config.buckets)
    return SFTRows(tokens, Ragged([learnt for _, learnt in kept]), buckets, _pad(tokenizer), skipped)


def load_rankings(config: DataConfig, source: str, tokenizer: Tokenizer) -> RankingRows:
    """Rankings and preferences; a prompt that is too long is cut at its start, so that the answers stay."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> tuple[list[np.ndarray], list[int], float]:
        prompt, completions, ranks, margin = parse_ranking(row)
        pairs = [encoder.answered(Answered(prompt, completion)) for completion in completions]
        tokens = [_fit(encoder, before, after, config.max_length) for before, after in pairs]
        texts = [ids.tobytes() for ids in tokens]
        if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
            reason = f"two answers of unequal rank have the same tokens, of which max_length allows {config.max_length}"
            raise BadRow("completions" if "completions" in row else "chosen", reason)
        return tokens, ranks, margin

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for group, _, _ in kept for tokens in group])
    return RankingRows(
        tokens=tokens,
        first=np.cumsum([0, *(len(group) for group, _, _ in kept)]),
        ranks=np.asarray([rank for _, ranks, _ in kept for rank in ranks], np.int32),
        margin=np.asarray([margin for _, _, margin in kept], np.float32),
        buckets=bucket_lengths(int(tokens.lengths.max()), config.buckets),
        pad=_pad(tokenizer),
        skipped=skipped,
    )


def load_prompts(config: DataConfig, source: str, tokenizer: Tokenizer) -> PromptRows:
    """Prompts; one that is longer than ``max_length`` is cut at its start, a BOS kept."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> tuple[np.ndarray, Content]:
        prompt = parse_prompt(row)
        return _fit(encoder, encoder.prompt(prompt), [], config.max_length), prompt

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for tokens, _ in kept])
    buckets = bucket_lengths(int(tokens.lengths.max()), config.buckets)
    return PromptRows(tokens, [{"prompt": prompt} for _, prompt in kept], buckets, _pad(tokenizer), skipped)


def load_texts(config: DataConfig, source: str, tokenizer: Tokenizer) -> TextRows:
    """Every answer in the rows, one after the other, to be scored."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> list[tuple[np.ndarray, dict[str, Any]]]:
        texts = []
        for answer in parse_answers(row):
            before, after = encoder.answered(answer)
            given = {"completion": answer.completion}
            shown = given if answer.prompt is None else {"prompt": answer.prompt} | given
            texts.append((_fit(encoder, before, after, config.max_length), shown))
        return texts

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for texts in kept for tokens, _ in texts])
    buckets = bucket_lengths(int(tokens.lengths.max()), config.buckets)
    return TextRows(tokens, [shown for texts in kept for _, shown in texts], buckets, _pad(tokenizer), skipped)


def _each(config: DataConfig, source: str, encode: Callable[[Row], Parsed]) -> tuple[list[Parsed], dict[str, int]]:
    """Encode every row that can be; the others end the run or are counted, as the config says."""
    opened = open_source(source)
    skips = Skips(opened.name, skip=config.on_bad_row == "skip")
    kept: list[Parsed] = []
    for place, row in opened.rows:
        try:
            if isinstance(row, BadRow):
                raise row
            kept.append(encode(row))
        except BadRow as error:
            skips.add(error, place)
    return kept, skips.close(len(kept))


def _fit(encoder: Encoder, before: list[int], after: list[int], max_length: int) -> np.ndarray:
    """Cut the prompt at its start, after the BOS; only an answer that is too long by itself is cut at its end."""
    over = len(before) + len(after) - max_length
    if over > 0:
        bos = encoder.bos if before[: len(encoder.bos)] == encoder.bos else []
        rest = before[len(bos) :]
        before = bos + rest[min(over, len(rest)) :]
    return np.asarray((before + after)[:max_length], np.int32)


def _pad(tokenizer: Tokenizer) -> int:
    return int(tokenizer.pad_token_id)
