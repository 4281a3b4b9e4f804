"""A pad token that is no EOS, and the tokens that end an answer."""

import json
import logging
import sys

import pytest

from jrlhf import assets
from jrlhf.data import DataError, load_tokenizer, stop_token_ids
from jrlhf.data.tokenizer import end_of_turn

EOS = "<|endoftext|>"


@pytest.fixture
def saved(make_tokenizer, tmp_path):
    def save(specials, template=None, **tokens):
        make_tokenizer(specials, template, **tokens).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
PADS = [
    ([EOS, "<pad>"], {}, "<pad>"),
    ([EOS, "<pad>"], {"pad_token": EOS}, "<pad>"),
    ([EOS, "<unk>"], {"unk_token": "<unk>"}, "<unk>"),
    # Not the token that ends answers, though it comes first.
    ([EOS, "<|end|>", "<|user|>"], {"pad_token": EOS}, "<|user|>"),
    # No other special token: the byte 0, which no text has, rather than one that texts have.
    ([EOS], {"pad_token": EOS}, "Ā"),
]


@pytest.mark.parametrize(("specials", "tokens", "pad"), PADS)
def test_pad_is_not_eos_and_the_log_says_which_it_is(saved, caplog, specials, tokens, pad):
    folder = saved(specials, TEMPLATE, eos_token=EOS, **tokens)
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert caplog.messages == [f"{folder}: no pad token apart from EOS; padding with {pad!r}"]
    text = "Hello! hello world\n\n!?"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_pad_token_of_its_own_stays(saved, caplog):
    tokenizer = load_tokenizer(saved([EOS, "<mine>"], eos_token=EOS, pad_token="<mine>"))
    assert tokenizer.pad_token == "<mine>"
    assert caplog.messages == []


def test_what_cannot_be_used(saved, tmp_path):
    with pytest.raises(DataError, match=r"the tokenizer has no EOS token, so no answer could end; set eos_token$"):
        load_tokenizer(saved(["<pad>"], pad_token="<pad>"))
    with pytest.raises(DataError, match=r"nowhere: no tokenizer: "):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r": no tokenizer: "):
        load_tokenizer(str(tmp_path))


def test_stop_tokens_are_eos_end_of_turn_and_the_extra_ones(chat, metaspace):
    def known(*tokens):
        return tuple(chat.convert_tokens_to_ids(list(tokens)))

    assert stop_token_ids(chat, ()) == known(EOS, "<|im_end|>")
    assert stop_token_ids(chat, ("<|im_start|>", EOS)) == known(EOS, "<|im_end|>", "<|im_start|>")
    assert stop_token_ids(metaspace, ()) == (metaspace.eos_token_id,)
    with pytest.raises(DataError, match=r"^sampling\.stop: '<\|nothing\|>' is not a token of the tokenizer$"):
        stop_token_ids(chat, ("<|nothing|>",), option="sampling.stop")


def test_a_template_that_ends_turns_with_eos_has_one_stop_token(make_tokenizer):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} " + EOS + "{% endfor %}"
    tokenizer = make_tokenizer([EOS, "<pad>"], template, eos_token=EOS, pad_token="<pad>")
    assert stop_token_ids(tokenizer, ()) == (tokenizer.eos_token_id,)


def test_the_end_of_a_turn_is_a_special_token_or_none(make_tokenizer):
    plain = make_tokenizer([EOS, "<pad>"], "{% for m in messages %}{{ m.content }}\n{% endfor %}", eos_token=EOS)
    assert end_of_turn(plain) is None
    refuses = make_tokenizer([EOS], "{{ raise_exception('needs tools') }}", eos_token=EOS)
    with pytest.raises(DataError, match="chat template refuses a question and its answer: needs tools"):
        end_of_turn(refuses)


def test_transformers_foretells_no_errors_from_rows_that_are_cut(caplog):
    tokenizer = load_tokenizer(assets.resolve("asset:stories260k"))
    assert len(tokenizer("once upon a time " * 300)["input_ids"]) > 512
    logging.getLogger("transformers.tokenization_utils_base").warning("Another warning.")
    assert caplog.messages == ["Another warning."]


def test_the_shipped_tokenizer():
    tokenizer = load_tokenizer(assets.resolve("asset:stories260k"))
    assert tokenizer("Once")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": b"{}", "model.safetensors": b""},
            r"holds config\.json, model\.safetensors: no tok",
        ),
        ({}, r"holds nothing: no tokenizer\.json, nor vocab\.json and merges\.txt, nor tokenizer\.model; copy"),
        ({"config.json": b"{}", "vocab.json": b"{}"}, r"has vocab\.json without merges\.txt, and no tokenizer\.json$"),
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json cannot be read: KeyError"),
        ({"tokenizer.json": b"{"}, r"tokenizer\.json: not valid JSON: "),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, r"tokenizer_config\.json: not valid JSON: "),
    ],
)
def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: no tokenizer: ")
    assert "\n" not in str(error.value)


def test_a_sentencepiece_file_alone_names_what_reads_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    # As where it is not installed, whether it is here or not.
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    message = r"pip install sentencepiece protobuf; or convert it once .*: python -c \"from transformers import"
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_an_adapter_without_a_tokenizer_has_its_base_s(saved, tmp_path):
    base = saved([EOS, "<mine>"], eos_token=EOS, pad_token="<mine>")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in (base, ".."):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        assert load_tokenizer(str(adapter)).pad_token == "<mine>"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./gone"}))
    with pytest.raises(DataError, match=r"base_model_name_or_path in adapter_config\.json: \./gone: no such folder$"):
        load_tokenizer(str(adapter))
