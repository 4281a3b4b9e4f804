"""A source and a config to rows: parse, tokenise, cut, and account for every row that cannot be used."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np

from jrlhf.config import DataConfig
from jrlhf.data.encode import Encoder, Segment
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

    def encode(row: Row) -> tuple[list[int], list[bool]]:
        segments = _segments(encoder, parse_sft(row), train_on)
        tokens = [token for segment in segments for token in segment.ids][: config.max_length]
        learnt = [segment.answer or train_on == "all" for segment in segments for _ in segment.ids]
        # Nothing predicts a row's first token.
        learnt = [False, *learnt[1 : config.max_length]]
        if not any(learnt):
            raise BadRow("max_length", f"the answer begins beyond {config.max_length} tokens, so nothing is learnt")
        return tokens, learnt

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for tokens, _ in kept])
    buckets = bucket_lengths(int(tokens.lengths.max()), config.buckets)
    return SFTRows(tokens, Ragged([learnt for _, learnt in kept], np.bool_), buckets, _pad(tokenizer), skipped)


def _segments(encoder: Encoder, row: Answered, train_on: TrainOn) -> list[Segment]:
    prompt, completion = row
    if isinstance(completion, list) and prompt is None:
        return encoder.conversation(completion)
    if isinstance(prompt, list) and train_on == "assistant":
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return encoder.conversation(prompt + answer)
    before, after = encoder.answered(row)
    return [Segment(before, answer=False), Segment(after, answer=True)]


def load_rankings(config: DataConfig, source: str, tokenizer: Tokenizer) -> RankingRows:
    """Rankings and preferences; a prompt that is too long is cut at its start, so that the answers stay."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> tuple[list[list[int]], list[int], float]:
        prompt, completions, ranks, margin = parse_ranking(row)
        pairs = [encoder.answered(Answered(prompt, completion)) for completion in completions]
        tokens = [_fit(encoder, before, after, config.max_length) for before, after in pairs]
        if len({(tuple(t), r) for t, r in zip(tokens, ranks, strict=True)}) > len({tuple(t) for t in tokens}):
            raise BadRow("max_length", f"cut to {config.max_length} tokens, two answers of unequal rank are the same")
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

    def encode(row: Row) -> tuple[list[int], Content]:
        prompt = parse_prompt(row)
        return _fit(encoder, encoder.prompt(prompt), [], config.max_length), prompt

    kept, skipped = _each(config, source, encode)
    tokens = Ragged([tokens for tokens, _ in kept])
    buckets = bucket_lengths(int(tokens.lengths.max()), config.buckets)
    return PromptRows(tokens, [{"prompt": prompt} for _, prompt in kept], buckets, _pad(tokenizer), skipped)


def load_texts(config: DataConfig, source: str, tokenizer: Tokenizer) -> TextRows:
    """Every answer in the rows, one after the other, to be scored."""
    encoder = Encoder(tokenizer)

    def encode(row: Row) -> list[tuple[list[int], dict[str, Any]]]:
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
    for number, row in enumerate(opened.rows):
        try:
            kept.append(encode(row))
        except BadRow as error:
            skips.add(error, lambda number=number: opened.where(number))
    return kept, skips.close(len(kept))


def _fit(encoder: Encoder, before: list[int], after: list[int], max_length: int) -> list[int]:
    """Cut the prompt at its start, after the BOS; only an answer that is too long by itself is cut at its end."""
    over = len(before) + len(after) - max_length
    if over > 0:
        bos = encoder.bos if before[: len(encoder.bos)] == encoder.bos else []
        rest = before[len(bos) :]
        before = bos + rest[min(over, len(rest)) :]
    return (before + after)[:max_length]


def _pad(tokenizer: Tokenizer) -> int:
    return int(tokenizer.pad_token_id)
