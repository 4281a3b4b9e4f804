"""Labelled answers for KTO, and the mismatched pairs of prompts and answers from which it estimates a KL."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, UInt

from jrlhf.config import DataConfig
from jrlhf.data.packing import PackedRankingRows, pack_parts
from jrlhf.data.preferences import Unpaired
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.ragged import Ragged
from jrlhf.data.rows import PromptRows, RankingRows, bucket_lengths
from jrlhf.data.stamps import SourceRows


def mismatches(prompts: UInt[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Return for each row a row with another prompt, whose answer is then paired with this row's prompt.

    ``prompts`` are digests of the prompts. In their order, which has nothing to do with that of the rows, the answer
    number k to a prompt gets that of the k-th row after all answers to this prompt, and so on from the start. So it is
    a pure function of the rows, and if all prompts have as many answers, each answer is used once. There must be two
    prompts.
    """
    order, rows = np.argsort(prompts, kind="stable"), len(prompts)
    _, first, sizes = np.unique(prompts[order], return_index=True, return_counts=True)
    starts, counts = np.repeat(first, sizes), np.repeat(sizes, sizes)
    others = (starts + counts + (np.arange(rows) - starts) % (rows - counts)) % rows
    partners = np.empty(rows, np.int64)
    partners[order] = order[others]
    return partners


@dataclass(frozen=True)
class Joints:
    """Where the sequences of mismatched pairs are cut out of rows: the prompt of one row, the answer of another."""

    tokens: Ragged
    starts: Int[np.ndarray, "N"]
    """Number of tokens of each row's prompt."""
    partners: Int[np.ndarray, "N"]
    bos: list[int]
    max_length: int

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Length of the sequence of each row's prompt."""
        answers = self.tokens.lengths - self.starts
        lengths = np.minimum(self.starts + answers[self.partners], self.max_length)
        return np.asarray(lengths, np.int32)

    def parts(self, row: int) -> tuple[np.ndarray, slice]:
        """Return the columns of the prompt in ``row``, and those of the answer in its partner.

        As in ``Encoder.cut_prompt``, a prompt that is too long is cut at its start, after the BOS.
        """
        start, partner = int(self.starts[row]), int(self.partners[row])
        answer = slice(int(self.starts[partner]), int(self.tokens.lengths[partner]))
        over = max(start + answer.stop - answer.start - self.max_length, 0)
        bos = len(self.bos) if over and self.tokens[row][: min(len(self.bos), start)].tolist() == self.bos else 0
        columns = np.r_[:bos, min(bos + over, start) : start]
        return columns, slice(answer.start, min(answer.stop, answer.start + self.max_length - len(columns)))


class Mismatched(Ragged):
    """A column of the sequences of mismatched pairs, put together when they are read."""

    def __init__(self, column: Ragged, joints: Joints) -> None:
        self._column, self._joints = column, joints
        self.lengths = joints.lengths

    @property
    def dtype(self) -> np.dtype:
        return self._column.dtype

    def __getitem__(self, row: int) -> np.ndarray:
        columns, answer = self._joints.parts(row)
        return np.concatenate([self._column[row][columns], self._column[int(self._joints.partners[row])][answer]])

    def start(self, row: int) -> int:
        return int(self.lengths[:row].sum())

    def release(self) -> None:
        self._column.release()
        self._joints.tokens.release()


class UnpairedRows(Unpaired[RankingRows]):
    """Labelled answers and their mismatched pairs, one to a row.

    Both have one completion a row, whose rank is 0 if the answer is desirable, else 1, and the same lengths: that of
    the longer of the two sequences, so that both are padded alike.
    """

    @property
    def skipped(self) -> dict[str, int]:
        return self.answers.skipped

    @property
    def cut(self) -> int:
        return self.answers.cut

    @property
    def sources(self) -> Sequence[SourceRows]:
        return self.answers.sources

    def prompts(self, count: int, tokenizer: Tokenizer) -> PromptRows:
        """Return the prompts of the first ``count`` rows, at least one token of each."""
        return self.answers.prompts(count, tokenizer)


def check_unpaired(answers: int, *, desirable: int, prompts: int) -> None:
    """Raise ValueError if all ``answers`` are desirable or none is, or if they are answers to a single prompt."""
    if desirable in (0, answers):
        label = "true" if desirable else "false"
        raise ValueError(f"label: all {answers} answers are labelled {label}, and the loss kto learns from both kinds")
    if prompts == 1:
        raise ValueError(f"prompt: all {answers} answers have the same, but the loss kto also needs answers to others")


def unpaired_rows(
    answers: RankingRows,
    *,
    starts: Int[np.ndarray, "N"],
    prompts: UInt[np.ndarray, "N"],
    bos: list[int],
    config: DataConfig,
) -> UnpairedRows:
    """Pair the prompts of ``answers`` with other answers; ``starts`` are the lengths of prompts, the rest as above.

    Raises ValueError if all answers have the same label or the same prompt.
    """
    desirable = sum(int(answers.ranks[row][0]) == 0 for row in range(len(answers)))
    check_unpaired(len(answers), desirable=desirable, prompts=len(np.unique(prompts)))
    joints = Joints(answers.tokens, starts, mismatches(prompts), bos, config.max_length)
    lengths = np.maximum(answers.tokens.lengths, joints.lengths)
    alike = replace(answers, lengths=lengths, buckets=bucket_lengths(int(lengths.max()), config.buckets))
    tokens, loss_mask = (Mismatched(column, joints) for column in (answers.tokens, answers.loss_mask))
    return UnpairedRows(alike, replace(alike, tokens=tokens, loss_mask=loss_mask))


def pack_unpaired(rows: UnpairedRows, width: int) -> tuple[PackedRankingRows, PackedRankingRows]:
    """Pack answers and mismatched pairs to ``width`` tokens; raise ValueError if one is longer.

    The two have the same members row by row, so that a batch of packed rows has the mismatched pairs of its answers.
    """
    members, parts = pack_parts(rows.lengths, rows.parts, width)
    packed = (PackedRankingRows(width, members, parts, rows.skipped, some) for some in (rows.answers, rows.mismatched))
    answers, mismatched = packed
    return answers, mismatched
