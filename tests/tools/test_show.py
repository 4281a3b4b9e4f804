"""What `jrlhf data show` prints, to the letter, and how it ends."""

import json
from typing import get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jrlhf.cli import main
from jrlhf.config.stages import stage_sections
from jrlhf.config.tools import ShowConfig
from jrlhf.data.inspect import KindName
from jrlhf.data.tally import InspectedSequence
from jrlhf.tools.show import KINDS, Spelling, about, token_line, visible
from tests.support.chat_templates import MARKED, QWEN2

MODEL = "asset:stories260k"
ABOUT = "tokenizer: 512 tokens; stop tokens </s>; pad <unk>; no chat template\n· parts tokens, ⏎ is a line's end, "


@pytest.fixture
def rows(tmp_path):
    def write(*lines) -> str:
        path = tmp_path / "rows.jsonl"
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def shown(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(["data", "show", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_sft_rows_and_their_counts_in_a_pipe(rows, capsys):
    data = rows(
        {"prompt": "Once upon", "completion": " a time\nthere"},
        {"prompt": "Once upon", "completion": "\u001b[2J 漢"},
        {"text": "Once </s> upon"},
    )
    code, out, err = shown(capsys, "--data", data, "--model", MODEL, "--rows", "2", "--max_length", "10")
    assert (code, err) == (0, "")
    assert (
        out
        == f"""\
{data} for SFT, learnt: completion; max_length 10
{ABOUT}⟦what is learnt⟧

{data}:1
10 tokens, 7 learnt
<s>· Once· upon⟦ a· time·⏎
t·he·re·</s>⟧

{data}:2
10 tokens, 7 learnt, 2 cut off: the end, <0xA2></s>
<s>· Once· upon⟦\\x1b·[·2·J· ·<0xE6>·<0xBC>⟧

rows 3, tokens 26, learnt 19 (73%)
tokens a row: 6 to 10, half up to 10, 95 % up to 10; 2 cut off
        1  cut to max_length (first: {data}:2)
        1  no stop token in what is learnt (first: {data}:2)
        0  the very tokens of an earlier row
        1  the prompt of an earlier row (first: {data}:2)
        0  unknown tokens
        0  the pad token in the text
        1  special tokens written in the text (first: {data}:3)
"""
    )


PAIRS = (
    {"prompt": "Once upon a time there was", "chosen": " a big dog", "rejected": " a cat and a very big dog"},
    {"prompt": "Once", "chosen": " a", "rejected": " a"},
    {"prompt": "Once", "chosen": " a time", "rejected": " a"},
    "{",
)


def test_pairs_are_shown_and_a_bad_row_is_a_usage_error_once_all_is_counted(rows, capsys):
    data = rows(*PAIRS)
    code, out, err = shown(capsys, MODEL, data, "--rows", "1", "--max_length", "12")
    assert code == 2
    problem = f"{data}:2: chosen: is the same as rejected; bad rows besides: 1"
    assert err == f"jrlhf: {problem}; with on_bad_row: skip training leaves such rows out\n"
    assert (
        out
        == f"""\
{data} for a reward model or DPO; max_length 12
{ABOUT}⟦the answer⟧; a reward model's score is read at the last token

{data}:1
rank 0 (best), 12 tokens
<s>· Once· upon· a· time· there· was⟦ a· big· do·g·</s>⟧
rank 1, 12 tokens, 5 cut off: the prompt's start,  Once upon a time there
<s>· was⟦ a· c·at· and· a· very· big· do·g·</s>⟧

rows 2, tokens 33
tokens an answer with its prompt: 4 to 12, half up to 5, 95 % up to 12; 5 cut off
pairs 2; the longer answer is the better one in 50.0% (no bias: 50 %)
        1  cut to max_length (first: {data}:1)
        0  an answer without its stop token
        0  the very tokens of an earlier row
        0  the prompt of an earlier row
        0  unknown tokens
        0  the pad token in the text
        0  special tokens written in the text
        1  cannot be trained on: chosen: is the same as rejected (first: {data}:2)
        1  cannot be trained on: not a JSON object per line (first: {data}:4)
"""
    )


def test_columns_that_nothing_reads_are_named_behind_the_counts(rows, capsys):
    text = {"prompt": "Once", "completion": " a"}
    data = rows({**text, "id": 1, "note": None}, {**text, "id": 2, "source": "web", "input": "x"}, text)
    code, out, err = shown(capsys, MODEL, data, "--rows", "0")
    assert (code, err) == (0, "")
    assert out.endswith(
        f"""\
        2  the very tokens of an earlier row (first: {data}:2)
        2  the prompt of an earlier row (first: {data}:2)
        0  unknown tokens
        0  the pad token in the text
        0  special tokens written in the text
columns that nothing reads: id (2 rows), source (1 row), input (1 row)
"""
    )
    _, out, _ = shown(capsys, MODEL, data, "--rows", "0", "--kind", "prompts")
    assert out.endswith("columns that nothing reads: completion (3 rows), id (2 rows), source (1 row), input (1 row)\n")


def test_answers_labelled_bad_are_left_out_and_no_error(rows, capsys):
    answer = {"prompt": "Say hi", "completion": " hi"}
    data = rows({**answer, "label": True}, {**answer, "completion": " no", "label": False})
    code, out, err = shown(capsys, MODEL, data)
    assert (code, err) == (0, "")
    assert "rows 1, tokens" in out
    assert f"        1  left out: label: false, so the answer is not learnt (first: {data}:2)\n" in out
    assert "nothing reads" not in out
    data = rows({**answer, "label": False})
    code, _, err = shown(capsys, MODEL, data)
    reason = "label: false, so the answer is not learnt"
    assert (code, err) == (2, f"jrlhf: {data}: no rows; all were left out: {reason}\n")


def test_tables_and_folders_are_shown_as_lines_are(rows, capsys, tmp_path):
    import datasets

    texts = [{"prompt": "Once", "completion": f" {word}"} for word in ("a", "dog")]
    table = datasets.Dataset.from_list(texts)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    lines = rows(*texts)
    capsys.readouterr()
    code, expected, _ = shown(capsys, MODEL, lines)
    assert code == 0
    saved = tmp_path / "saved"
    for data in (tmp_path / "rows.parquet", saved, f"{saved}:test", saved / "test" / "data-00000-of-00001.arrow"):
        code, out, err = shown(capsys, MODEL, str(data))
        assert (code, err) == (0, "")
        assert out == expected.replace(f"{lines}:", f"{data}: row ").replace(lines, str(data))
    code, _, err = shown(capsys, MODEL, f"{saved}:dev")
    assert (code, err) == (2, f"jrlhf: {saved}: no split dev; the splits are {saved}:train, {saved}:test\n")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_an_empty_table_and_one_that_is_none_are_named_in_a_line(suffix, capsys, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    empty = pa.table({"text": pa.array([], pa.string())})
    if suffix == "parquet":
        pq.write_table(empty, path)
    else:
        with pa.ipc.new_stream(path, empty.schema):
            pass
    code, _, err = shown(capsys, MODEL, str(path))
    assert (code, err) == (2, f"jrlhf: {path}: no rows\n")
    path.write_bytes(b"no table")
    code, _, err = shown(capsys, MODEL, str(path))
    assert code == 2
    assert err.startswith(f"jrlhf: {path}: cannot be read: ArrowInvalid: ")
    assert err.count("\n") == 1


def test_bad_rows_may_be_skipped_but_not_all_of_them(rows, capsys):
    code, out, err = shown(capsys, MODEL, rows(*PAIRS), "--rows", "0", "--on_bad_row", "skip")
    assert (code, err) == (0, "")
    assert "cannot be trained on: chosen: is the same as rejected" in out
    assert "⟦" not in out
    data = rows({"text": " "})
    code, out, err = shown(capsys, MODEL, data, "--on_bad_row", "skip")
    assert (code, err) == (2, f"jrlhf: {data}:1: text: is empty\n")
    code, out, err = shown(capsys, MODEL, rows(PAIRS[0]), "--rows=-1")
    assert (code, out, err) == (2, "", "jrlhf: rows: must be 0 or more, got -1\n")


def test_prompts_of_pairs_if_asked_for(rows, capsys):
    data = rows(PAIRS[0])
    code, out, _ = shown(capsys, MODEL, data, "--kind", "prompts", "--max_length", "4")
    assert code == 0
    assert (
        f"""
{data}:1
4 tokens, 3 cut off: the prompt's start,  Once upon a
<s>· time· there· was

rows 1, tokens 4
"""
        in out
    )


@pytest.mark.parametrize(("stage", "kind"), [("dpo", "reward"), ("ppo", "prompts"), ("grpo", "prompts")])
def test_the_name_of_a_stage_is_a_kind_of_rows(stage, kind, rows, capsys):
    data = rows({"prompt": "Once", "chosen": "upon a time", "rejected": "more"})
    assert shown(capsys, MODEL, data, "--kind", stage) == shown(capsys, MODEL, data, "--kind", kind)


def test_every_stage_and_every_kind_can_be_named():
    assert KINDS.keys() == {*stage_sections(), *get_args(KindName)}
    assert KINDS.keys() | {"auto"} == {*get_args(get_type_hints(ShowConfig)["kind"])}


def test_a_prompt_may_lose_all_and_its_answer_the_end(rows, capsys):
    data = rows({"prompt": "Once upon", "chosen": " a time there was a dog", "rejected": " a"})
    _, out, _ = shown(capsys, MODEL, data, "--max_length", "5")
    assert "rank 0 (best), 5 tokens, 6 cut off: the prompt's start and the end,  Once upon" in out


def test_a_terminal_gets_the_same_text_in_colour(rows, capsys, monkeypatch):
    data = rows({"prompt": "Once upon", "completion": " a time"})
    _, plain, _ = shown(capsys, MODEL, data)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, coloured, _ = shown(capsys, MODEL, data)
    assert "\x1b[1;32m a\x1b[0m" in coloured
    assert "\x1b[35m<s>\x1b[0m" in coloured
    assert "".join(Text.from_ansi(line).plain + "\n" for line in coloured.splitlines()) == plain


@pytest.fixture(scope="module")
def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<pad>"]})
    return tokenizer


def test_parts_of_a_character_go_by_the_vocabulary_s_name(byte_level):
    spelling = Spelling(byte_level)
    ids = np.asarray(byte_level("é \n<|im_end|>")["input_ids"])
    line = token_line(InspectedSequence(ids, ids == ids[2], ids), spelling)
    assert line.plain == "<Ã>·<©>⟦ ⟧⏎\n<|im_end|>"


def test_what_the_tokenizer_is_in_a_line(byte_level):
    byte_level.chat_template = QWEN2
    before, way = "260 tokens; stop tokens <eos> <|im_end|>; pad ", "chat template, answers marked by"
    assert about(byte_level) == f"{before}<eos>; {way} the difference of prefixes"
    byte_level.chat_template, byte_level.pad_token = MARKED, "<pad>"
    assert about(byte_level) == f"{before}<pad> (its own, <eos>, is the EOS); {way} generation markers"


LETTERS = {"a": "a", "漢": "漢", "\n": "⏎\n", "\t": "\\t", "\x1b": "\\x1b", "\u202e": "\\u202e"}


@pytest.mark.parametrize(("letter", "text"), LETTERS.items())
def test_nothing_in_a_text_can_move_a_cursor(letter, text):
    assert visible(letter) == text
