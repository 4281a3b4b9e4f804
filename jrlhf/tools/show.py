"""Runs `jrlhf data show`: rows as the model sees them, then counts over the whole source."""

from functools import lru_cache

import numpy as np
from rich.console import Console
from rich.text import Text

from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.config.tools import ShowConfig
from jrlhf.data import DataError, load_tokenizer, stop_token_ids
from jrlhf.data.chat import MARKER, template_of
from jrlhf.data.errors import bad_row_error, names_with_rows
from jrlhf.data.inspect import KindName, RowInspector, first_row, guess_kind, inspect_rows
from jrlhf.data.mismatched import check_unpaired
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.sources import open_source
from jrlhf.data.tally import InspectedRow, InspectedSequence, Tally
from jrlhf.runs.folder import last_export
from jrlhf.system.terminal import show_all_characters

LEARNT, CONTEXT, SPECIAL, GAP = "bold green", "default", "magenta", "bright_black"
BAD, ODD = "red", "yellow"
MAX_CUT_TOKENS = 12
"""Maximum number of tokens to show of a part that was cut off."""
USES = {"sft": "SFT", "reward": "a reward model or DPO", "kto": "KTO", "prompts": "the prompts of PPO or GRPO"}
KINDS: dict[str, KindName] = {
    "sft": "sft",
    "reward": "reward",
    "kto": "kto",
    "prompts": "prompts",
    "dpo": "reward",
    "ppo": "prompts",
    "grpo": "prompts",
}
"""Kinds of rows by their own names, and by those of the stages that read them."""


def run_show(args: ShowConfig) -> None:
    """Show rows and counts. Then raise DataError if training on these rows would end with it."""
    show_all_characters()
    tokenizer = load_tokenizer(last_export(assets.resolve(args.model), "language", "reward"))
    source = open_source(args.data)
    first, rows = first_row(source.rows)
    kind = guess_kind(first) if args.kind == "auto" else KINDS[args.kind]
    inspector = RowInspector(DataConfig(max_length=args.max_length), tokenizer, kind, args.train_on)
    tally = Tally(tokenizer, kind)
    # Without a terminal, lines keep their full length.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    spelling = Spelling(tokenizer)
    learnt = f", learnt: {args.train_on}" if kind == "sft" else ""
    console.print(f"{source.name} for {USES[kind]}{learnt}; max_length {args.max_length}")
    console.print(f"tokenizer: {about(tokenizer)}")
    if args.rows:
        console.print(legend(kind))

    def show(seen: InspectedRow) -> None:
        if tally.rows <= args.rows:
            console.print()
            for line in row_lines(seen, kind, spelling):
                console.print(line)

    inspect_rows(inspector, tally, rows, show)
    console.print()
    for line in summary_lines(tally):
        console.print(line)
    check_rows(tally, source.name, skip=args.on_bad_row == "skip")


def check_rows(tally: Tally, name: str, *, skip: bool) -> None:
    """Raise the DataError with which training on these rows would end; with ``skip`` bad rows alone do not end it."""
    others = sum(count.rows for count in tally.bad.values()) - 1
    problem = tally.error + (f"; bad rows besides: {others}" if others > 0 else "")
    if tally.bad and not skip:
        raise bad_row_error(problem)
    if tally.bad and not tally.rows:
        raise DataError(problem)
    if not tally.rows:
        reasons = "; all were left out: " + ", ".join(tally.excluded) if tally.excluded else ""
        raise DataError(f"{name}: no rows{reasons}")
    if tally.kind == "kto":
        try:
            check_unpaired(len(tally.lengths), desirable=tally.desirable, prompts=len(tally.prompts))
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error


class Spelling:
    """Shows single tokens as text, with visible line ends and without characters that move a cursor."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # The decoder keeps the first space of a token only after another token.
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.of = lru_cache(maxsize=None)(self._spell)

    def special(self, token: int) -> bool:
        return token in self._special

    def _spell(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if self.special(token):
            return piece
        head, text = (self._decode(ids) for ids in (self._anchor, [*self._anchor, token]))
        text = text[len(head) :] if text.startswith(head) else "\ufffd"
        # For a part of a character, show its name in the vocabulary.
        if not text or "\ufffd" in text:
            return piece if piece.startswith("<") else f"<{piece}>"
        return "".join(visible(letter) for letter in text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(letter: str) -> str:
    if letter == "\n":
        return "⏎\n"
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


def about(tokenizer: Tokenizer) -> str:
    """Describe the parts of the tokenizer that decide tokens and masks."""
    template = template_of(tokenizer)
    method = "generation markers" if MARKER.search(template) else "the difference of prefixes"
    own = tokenizer.init_kwargs.get("pad_token")
    own_pad = "" if own is None or str(own) == tokenizer.pad_token else f" (its own, {own}, is the EOS)"
    return "; ".join(
        [
            f"{len(tokenizer):,} tokens",
            "stop tokens " + " ".join(tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer, ())))),
            f"pad {tokenizer.pad_token}{own_pad}",
            f"chat template, answers marked by {method}" if template else "no chat template",
        ]
    )


def legend(kind: str) -> Text:
    line = Text("· parts tokens, ⏎ is a line's end, ")
    match kind:
        case "sft":
            return line.append("⟦what is learnt⟧", LEARNT)
        case "reward":
            return line.append("⟦the answer⟧", LEARNT).append("; a reward model's score is read at the last token")
        case "kto":
            return line.append("⟦the answer⟧", LEARNT)
        case _:
            return line.append("an answer is sampled after the last token")


def row_lines(seen: InspectedRow, kind: str, spelling: Spelling) -> list[Text]:
    lines = [Text(seen.place, "bold")]
    for number, sequence in enumerate(seen.sequences):
        length, lost = len(sequence.tokens), len(sequence.uncut) - len(sequence.tokens)
        labels = [judgement(rank, kind) for rank in seen.ranks[number : number + 1]]
        labels.append(f"{length} tokens")
        labels += [f"{int(sequence.mask.sum())} learnt"] if kind == "sft" else []
        lines.append(Text(", ".join(labels), "bold"))
        if lost:
            lines[-1].append(f", {lost} cut off: {cut_off(sequence, spelling)}", BAD)
        lines.append(token_line(sequence, spelling))
    return lines


def judgement(rank: int, kind: str) -> str:
    """Describe what people say of an answer: its rank or, for KTO, whether it is desirable."""
    if kind == "kto":
        return "undesirable" if rank else "desirable"
    return f"rank {rank}" + " (best)" * (rank == 0)


def token_line(sequence: InspectedSequence, spelling: Spelling) -> Text:
    """Show the tokens of a sequence, with brackets around marked ones, so that colour is not needed."""
    line, inside = Text(), False
    for token, mask in zip(sequence.tokens.tolist(), sequence.mask.tolist(), strict=True):
        if inside and not mask:
            line.append("⟧", LEARNT)
        elif mask and not inside:
            line.append("⟦", LEARNT)
        elif line and not line.plain.endswith("\n"):
            line.append("·", GAP)
        inside = mask
        line.append(spelling.of(token), LEARNT if mask else SPECIAL if spelling.special(token) else CONTEXT)
    return line.append("⟧", LEARNT) if inside else line


def cut_off(sequence: InspectedSequence, spelling: Spelling) -> str:
    """Return the place of the cut, and the beginning of the lost tokens."""
    ids, whole = sequence.tokens, sequence.uncut
    unequal = np.flatnonzero(ids != whole[: len(ids)])
    start = int(unequal[0]) if len(unequal) else len(ids)
    lost = whole[start : start + len(whole) - len(ids)].tolist()
    text = "".join(spelling.of(token) for token in lost[:MAX_CUT_TOKENS]).replace("\n", "")
    where = "the end" if start == len(ids) else "the prompt's start"
    if where != "the end" and not np.array_equal(ids[start:], whole[len(whole) - len(ids) + start :]):
        where = "the prompt's start and the end"
    return f"{where}, {text}{'…' if len(lost) > MAX_CUT_TOKENS else ''}"


def summary_lines(tally: Tally) -> list[Text]:
    lines = [Text(f"rows {tally.rows:,}, tokens {sum(tally.lengths):,}{_learnt(tally)}", "bold")]
    if tally.rows:
        low, middle, high, longest = np.percentile(tally.lengths, [0, 50, 95, 100], method="lower")
        each = "an answer with its prompt" if tally.kind in ("reward", "kto") else "a row"
        spread = f"{low:,} to {longest:,}, half up to {middle:,}, 95 % up to {high:,}"
        lines.append(Text(f"tokens {each}: {spread}; {tally.cut:,} cut off"))
    if tally.rows and tally.kind == "kto":
        others = len(tally.lengths) - tally.desirable
        lines.append(Text(f"desirable answers {tally.desirable:,}, undesirable ones {others:,}"))
    if tally.pairs:
        share = tally.longer_wins / tally.pairs
        lines.append(Text(f"pairs {tally.pairs:,}; the longer answer is the better one in {share:.1%} (no bias: 50 %)"))
    for name, count in (tally.oddities | tally.notes).items():
        first = f" (first: {count.first})" if count.rows else ""
        lines.append(Text(f"{count.rows:>9,}  {name}{first}", ODD if count.rows else GAP))
    for reason, count in tally.excluded.items():
        lines.append(Text(f"{count.rows:>9,}  left out: {reason} (first: {count.first})", ODD))
    if tally.unread:
        lines.append(Text(f"columns that nothing reads: {names_with_rows(tally.unread)}", ODD))
    for reason, count in sorted(tally.bad.items(), key=lambda item: -item[1].rows):
        lines.append(Text(f"{count.rows:>9,}  cannot be trained on: {reason} (first: {count.first})", BAD))
    return lines


def _learnt(tally: Tally) -> str:
    shown = tally.kind == "sft" and tally.rows
    return f", learnt {tally.learnt:,} ({tally.learnt / sum(tally.lengths):.0%})" if shown else ""
