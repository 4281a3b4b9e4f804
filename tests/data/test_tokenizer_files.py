"""A tokenizer's own files go out as they came."""

import json

import pytest

from jrlhf.data import load_tokenizer, stop_token_ids, tokenizer_files
from jrlhf.models.hf.folder_files import write_files

EOS = "<|endoftext|>"


@pytest.fixture
def folder(make_tokenizer, tmp_path):
    """``(**tokens) -> folder`` with files in a writing of their own."""

    def save(**tokens):
        make_tokenizer([EOS, "<pad>", "<|user|>"], None, eos_token=EOS, **tokens).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "note": "ünchanged"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config, indent=7, ensure_ascii=False), "utf-8")
        (tmp_path / "tokenizer.model").write_bytes(b"\xff\x00\r\n")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
        (tmp_path / "notes.txt").write_text("no tokenizer's file")
        return tmp_path

    return save


def test_a_tokenizer_that_is_as_it_was_gives_its_files_byte_for_byte(folder):
    source = folder(pad_token="<pad>")
    files = tokenizer_files(load_tokenizer(str(source)))
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert files.keys() == names - {"notes.txt"}
    assert all(content == (source / name).read_bytes() for name, content in files.items())


@pytest.mark.parametrize("own", [{}, {"pad_token": EOS}], ids=["none", "the EOS"])
def test_another_pad_token_changes_one_field(folder, own, tmp_path):
    source = folder(**own)
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS} | own))
    files = tokenizer_files(load_tokenizer(str(source)))
    for name, content in files.items():
        original = (source / name).read_bytes()
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert json.loads(content) == json.loads(original) | {"pad_token": "<pad>"}
        else:
            assert content == original, name
    write_files(tmp_path / "out", files)
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.pad_token == "<pad>"
    assert tokenizer_files(again) == files


def test_a_folder_without_a_config_gets_one_for_the_pad_token(folder, tmp_path):
    source = folder()
    tokenizer = load_tokenizer(str(source))
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    tokenizer = load_tokenizer(str(source)) if tokenizer.eos_token is None else tokenizer
    files = tokenizer_files(tokenizer)
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<pad>"


def test_a_tokenizer_that_was_changed_or_made_here_is_written_anew(folder, make_tokenizer, tmp_path):
    tokenizer = load_tokenizer(str(folder(pad_token="<pad>")))
    tokenizer.add_tokens(["<mine>"])
    write_files(tmp_path / "changed", tokenizer_files(tokenizer))
    assert "<mine>" in load_tokenizer(str(tmp_path / "changed")).get_vocab()
    made = make_tokenizer([EOS, "<pad>"], None, eos_token=EOS, pad_token="<pad>")
    assert "tokenizer.json" in tokenizer_files(made)
    assert stop_token_ids(made, ()) == (made.eos_token_id,)


@pytest.mark.parametrize(("eos", "stops"), [(0, (0,)), ([0, 2], (0, 2)), ([2], (0, 2))])
def test_all_of_a_generation_config_s_end_tokens_end_answers(folder, eos, stops):
    source = folder(pad_token="<pad>")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert stop_token_ids(load_tokenizer(str(source)), ()) == stops


def test_a_pad_token_is_chosen_that_ends_no_answer(make_tokenizer, tmp_path):
    make_tokenizer([EOS, "<pad>", "<unk>"], None, eos_token=EOS, unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert load_tokenizer(str(tmp_path)).pad_token == "<unk>"
