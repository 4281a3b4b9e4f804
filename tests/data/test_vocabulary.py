"""No text may use a token that the model has no embedding for."""

import json
import logging

import pytest

from jrlhf import assets
from jrlhf.config.tools import ShowConfig
from jrlhf.data import DataError, load_prompts, load_rankings, load_sft, load_texts, load_tokenizer, stop_token_ids
from jrlhf.data.vocabulary import embedding_rows, vocabulary_limit
from jrlhf.tools.show import run_show

SPARE = "<|spare|>"
NUMBERS = r"beyond the model's embeddings \(its vocab_size is {rows}, the tokenizer has {tokens} tokens\)"
REMEDY = r"resize the embeddings \(model\.resize_token_embeddings\(len\(tokenizer\)\)\) or use the tokenizer that"


@pytest.fixture
def model(chat, tmp_path):
    """``(missing=1, **config) -> folder``: a tokenizer and a config.json with so many embeddings too few."""

    def make(missing=1, specials=(SPARE,), name="model", **tokens):
        folder = tmp_path / name
        chat.save_pretrained(folder)
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens({"additional_special_tokens": list(specials)} | tokens)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer) - missing}))
        return str(folder), len(tokenizer)

    return make


def numbers(tokens, missing=1):
    return NUMBERS.format(rows=tokens - missing, tokens=tokens)


ROWS = {
    load_prompts: {"prompt": f"Hello {SPARE}"},
    load_rankings: {"prompt": "Hello", "chosen": f"there{SPARE}", "rejected": "not"},
    load_texts: {"prompt": "Hello", "completion": f"there{SPARE}"},
    load_sft: {"messages": [{"role": "user", "content": f"Hello{SPARE}"}, {"role": "assistant", "content": "hi"}]},
}


def loaded(load, config, source, tokenizer):
    return load(config, source, tokenizer, **({"train_on": "completion"} if load is load_sft else {}))


@pytest.mark.parametrize("load", ROWS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_row_that_uses_such_a_token_ends_the_run(load, on_bad_row, model, write, config):
    folder, tokens = model()
    good = json.loads(json.dumps(ROWS[load]).replace(SPARE, ""))
    source = write([good, ROWS[load]])
    spare = tokens - 1
    error = rf"rows\.jsonl:2: '<\|spare\|>' \(id {spare}\): {numbers(tokens)}; {REMEDY}"
    with pytest.raises(DataError, match=error):
        loaded(load, config(on_bad_row=on_bad_row), source, load_tokenizer(folder))
    assert len(loaded(load, config(), write([good]), load_tokenizer(folder))) == 1


def test_tokens_that_no_row_uses_are_said_once(model, caplog):
    folder, tokens = model(missing=7, specials=[f"<{i}>" for i in range(7)])
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        tokenizer = load_tokenizer(folder)
    (line,) = caplog.messages
    first = tokens - 7
    assert line.startswith(f"{folder}: '<0>' (id {first}), '<1>' (id {first + 1}), ")
    assert f", 2 others: beyond the model's embeddings (its vocab_size is {first}, " in line
    assert line.endswith("; no text may use them")
    assert vocabulary_limit(tokenizer) == first


@pytest.mark.parametrize(
    ("tokens", "role"),
    [
        ({"eos_token": SPARE}, "EOS"),
        ({"pad_token": SPARE}, "pad"),
        ({"bos_token": SPARE}, "BOS"),
    ],
)
def test_a_token_with_a_role_is_an_error_at_once(tokens, role, model):
    folder, count = model(specials=(), **tokens)
    with pytest.raises(DataError, match=rf"model: {role} '<\|spare\|>' \(id {count - 1}\): {numbers(count)}; {REMEDY}"):
        load_tokenizer(folder)


def test_the_end_of_a_turn_has_a_role_too(make_tokenizer, tmp_path):
    """A chat template's tokens added to a base model whose embeddings stayed as they were."""
    tokenizer = make_tokenizer(["<pad>", "<eos>"], None, eos_token="<eos>", pad_token="<pad>")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    error = rf"end of turn '<\|im_end\|>' \(id {rows + 1}\): {numbers(rows + 2, 2)}"
    with pytest.raises(DataError, match=error):
        load_tokenizer(str(tmp_path))


def test_a_pad_is_taken_from_the_tokens_that_have_an_embedding(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(["<eos>"], None, eos_token="<eos>")
    rows = len(tokenizer)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    assert load_tokenizer(str(tmp_path)).pad_token_id < rows


def test_a_stop_token_is_checked_where_it_is_named(model):
    folder, tokens = model()
    tokenizer = load_tokenizer(folder)
    with pytest.raises(DataError, match=rf"^sampling\.stop: stop token '<\|spare\|>' .*{numbers(tokens)}"):
        stop_token_ids(tokenizer, (SPARE,), option="sampling.stop")
    assert len(stop_token_ids(tokenizer, ())) == 2


def test_rows_of_a_larger_model_are_not_taken_from_the_cache(model, write, config, tmp_path):
    """The same tokenizer, the same file: only the embeddings are fewer."""
    cached, source = config(cache=str(tmp_path / "cache")), write([ROWS[load_prompts]])
    enough, _ = model(missing=0, name="enough")
    fewer, tokens = model(missing=1, name="fewer")
    assert len(load_prompts(cached, source, load_tokenizer(enough))) == 1
    with pytest.raises(DataError, match=numbers(tokens)):
        load_prompts(cached, source, load_tokenizer(fewer))
    # One of several sources is enough.
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{numbers(tokens)}"):
        load_prompts(cached, {write([{"prompt": "hi"}], "good.jsonl"): 1.0, source: 1.0}, load_tokenizer(fewer))


def test_data_show_names_the_row_and_the_numbers(model, write):
    folder, tokens = model()
    source = write([{"text": "Hello"}, {"text": SPARE}])
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=rf"rows\.jsonl:2: '<\|spare\|>' \(id {tokens - 1}\): {numbers(tokens)}"):
            run_show(ShowConfig(model=folder, data=source, on_bad_row=on_bad_row))


def test_the_limit_is_the_model_s(model, tmp_path):
    folder, tokens = model(missing=0)
    assert vocabulary_limit(load_tokenizer(folder)) is None
    assert embedding_rows(folder) == tokens
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert embedding_rows(adapter) is None  # a tokenizer alone
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folder}))
    assert embedding_rows(adapter) == tokens
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "moved")}))
    assert embedding_rows(adapter) is None
    assert embedding_rows(assets.resolve("asset:stories260k")) == 512
