"""Where a reward model's score is read, by the note of its folder."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import (
    add_adapters,
    load_pretrained,
    load_reward_model,
    reward_from_pretrained,
    save_adapter,
    save_reward_model,
)
from jrlhf.models.reading import STOP_TOKEN, Reading, reading_of
from jrlhf.models.reward import normalise_reward
from tests.support.checkpoints import SIZES, write_checkpoint

LLAMA = SIZES | {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
REWARD = LLAMA | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
TOKENS = [[5, 6, 2, 2], [0, 0, 5, 2], [2, 2, 2, 0]]
MASK = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("reading", "columns"),
    [
        (STOP_TOKEN, [3, 3, 2]),
        (Reading("whole_chat"), [3, 3, 2]),
        (Reading("whole_chat", 0), [3, 3, 2]),
        # EOS and pad are one; where a text has nothing else its first token is read.
        (Reading("whole_chat", 2), [1, 2, 0]),
        (Reading("whole_chat", -1), [3, 3, 2]),
    ],
)
def test_the_last_token_that_is_no_padding(reading: Reading, columns: list[int]) -> None:
    last = np.asarray(reading.last(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(MASK, bool)))
    assert [int(np.flatnonzero(row)[-1]) for row in last] == columns


def test_a_note_says_ours_and_no_note_another_s() -> None:
    assert reading_of({"jrlhf": {"score_at": "stop_token"}, "pad_token_id": 3}, "llama") == STOP_TOKEN
    # Written before there was such a note: that it was normalised says whose it is.
    assert reading_of({"jrlhf": {"gain": 2.0, "bias": 0.0, "head_bias": 0.5}}, "llama") == STOP_TOKEN
    assert reading_of({"pad_token_id": 3}, "llama") == Reading("whole_chat", 3)
    assert reading_of({"pad_token_id": None}, "gemma2") == Reading("whole_chat", None)
    assert reading_of({}, "llama") == Reading("whole_chat", None)
    assert reading_of({}, "gemma3_text") == Reading("whole_chat", 0)
    for note in ({"score_at": "somewhere"}, {"score_at": None}, "ours", None):
        with pytest.raises(ValueError, match=r"^jrlhf\.score_at: expected stop_token or whole_chat, found "):
            reading_of({"jrlhf": note}, "llama")


def test_every_export_says_how_it_is_read(tmp_path: Path) -> None:
    base = load_pretrained(write_checkpoint(tmp_path / "base", LLAMA), dtype="float32")
    ours = reward_from_pretrained(base, jax.random.key(0))
    save_reward_model(ours, tmp_path / "ours")
    note = json.loads((tmp_path / "ours" / "config.json").read_text())["jrlhf"]
    assert note == {"gain": 1.0, "bias": 0.0, "head_bias": 0.0, "score_at": "stop_token"}
    assert load_reward_model(tmp_path / "ours", dtype="float32").reading == STOP_TOKEN


def test_another_s_model_stays_another_s(tmp_path: Path) -> None:
    """Unchanged it gives its own config back, byte for byte; normalised it says that it is read as before."""
    theirs = load_reward_model(write_checkpoint(tmp_path / "theirs", REWARD), dtype="float32")
    assert theirs.reading == Reading("whole_chat", 0)
    save_reward_model(theirs, tmp_path / "same")
    same, original = ((tmp_path / name / "config.json").read_text() for name in ("same", "theirs"))
    assert json.loads(same) == json.loads(original) | {"label2id": {"LABEL_0": 0}}
    save_reward_model(normalise_reward(theirs, gain=2.0, bias=1.0), tmp_path / "normalised")
    assert load_reward_model(tmp_path / "normalised", dtype="float32").reading == Reading("whole_chat", 0)


def test_an_adapter_says_whose_it_is_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", LLAMA | {"pad_token_id": 7})
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(0))
    params = add_adapters(model.params, model.arch, jax.random.key(1), rank=2, alpha=4.0, targets=".")
    save_adapter(params, model.arch, tmp_path / "adapter", base=str(folder), alpha=4.0)
    assert load_reward_model(tmp_path / "adapter", dtype="float32").reading == STOP_TOKEN
    # As PEFT writes it, without a note.
    from safetensors.numpy import load_file, save_file

    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    assert load_reward_model(tmp_path / "adapter", dtype="float32").reading == Reading("whole_chat", 7)


def test_a_score_is_read_where_the_model_says(tmp_path: Path) -> None:
    model = load_reward_model(write_checkpoint(tmp_path / "rm", REWARD | {"pad_token_id": 2}), dtype="float32")
    tokens, mask = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(MASK, bool)
    whole = np.asarray(model.score_fn(model.params, tokens, mask))
    np.testing.assert_array_equal(model.score(model.params, tokens, mask), whole[[0, 1, 2], [1, 2, 0]])
    ours = replace(model, reading=STOP_TOKEN)
    np.testing.assert_array_equal(ours.score(model.params, tokens, mask), whole[[0, 1, 2], [3, 3, 2]])
