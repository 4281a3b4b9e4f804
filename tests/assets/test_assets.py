"""What ships: parts that share no sentence, ranks that follow the ratings, the original model and its tokenizer."""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jrlhf import assets
from jrlhf.models import load_pretrained
from scripts.build_assets import (
    HELDOUT,
    PROMPTS_HELDOUT,
    Review,
    group_reviews,
    make_tokenizer,
    normalised,
    opening,
    ranking_row,
    rating_pairs,
    read_llama2c_tokens,
    read_opinion_words,
    rope_half_split,
    split_reviews,
)

FOLDER = Path(assets.__file__).parent
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    'big, red ball. She wanted to play with it. Her mom said, "You can play with it, but be careful." Lily was happy.'
)
NAMES = [
    "opinion_lexicon", "prompts_heldout", "prompts_train", "rankings_heldout", "rankings_train", "sft_heldout",
    "sft_train", "stories260k",
]  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(assets.resolve(f"asset:{name}")).read_text(encoding="utf-8").splitlines()]


def sentences(name: str) -> list[str]:
    return [normalised(row["text"]) for row in rows(name)]


def ranked_sentences(name: str) -> list[str]:
    return [normalised(text) for row in rows(name) for text in row["completions"]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.resolve("asset:stories260k"))


def test_names_are_paths_and_other_strings_stay() -> None:
    assert assets.names() == NAMES
    assert all(Path(assets.resolve(f"asset:{name}")).exists() for name in NAMES)
    assert assets.resolve("my/data.jsonl") == "my/data.jsonl"


@pytest.mark.parametrize("name", ["sft_trian", "", "../__init__", "LICENSE_reviews"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="there are: " + ", ".join(NAMES)):
        assets.resolve(f"asset:{name}")


def test_sizes_and_licences() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert max(p.stat().st_size for p in files) < 2_000_000
    assert sum(p.stat().st_size for p in files) < 3_700_000
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in files)
    notice = (FOLDER / "README.md").read_text()
    for name in (*NAMES, "MIT", "CC BY 4.0", "Hutto", "Hu and B. Liu", "Karpathy"):
        assert name in notice
    for licence in ("stories260k/LICENSE", "LICENSE_reviews"):
        assert "Permission is hereby granted" in (FOLDER / "quickstart" / licence).read_text()
    assert "CC BY 4.0" in (FOLDER / "quickstart/opinion_lexicon/README.txt").read_text()


def test_no_sentence_is_in_two_parts() -> None:
    train, heldout = sentences("sft_train"), sentences("sft_heldout")
    assert (len(train), len(heldout)) == (7601, 1000)
    assert len(set(train) | set(heldout)) == 8601
    # Every training sentence is ranked once, but for a rest of one; held-out pairs use held-out sentences alone.
    ranked_train = ranked_sentences("rankings_train")
    assert len(ranked_train) == len(set(ranked_train)) == 7600
    assert set(ranked_train) < set(train)
    assert set(ranked_sentences("rankings_heldout")) <= set(heldout)


def test_prompts_are_distinct_neutral_openings_of_other_sentences() -> None:
    train, heldout = rows("prompts_train"), rows("prompts_heldout")
    prompts = [row["prompt"] for row in train + heldout]
    assert (len(train), len(heldout)) == (1490, 512)
    assert len({normalised(p) for p in prompts}) == 2002
    opinion = read_opinion_words(Path(assets.resolve("asset:opinion_lexicon")))
    assert len(opinion) > 6000
    assert not [p for p in prompts if any(normalised(word) in opinion for word in p.split())]
    assert {len(p.split()) for p in prompts} == {3, 4, 5}
    # Openings of the shipped sentences would all be found again; of others, only the common ones are ("The film is").
    texts = sentences("sft_train") + sentences("sft_heldout")
    starts = {text[:length] for text in texts for length in range(1, 60)}
    assert np.mean([normalised(p) in starts for p in prompts if len(p.split()) == 5]) < 0.1


def test_the_split_leaves_the_sentences_of_its_openings_out() -> None:
    words = [f"w{i:04d}" for i in range(3000)]
    reviews = [Review(f"{w} one two three four five six seven eight", 0.0) for w in words]
    parts = split_reviews(reviews, frozenset({"bad"}), np.random.default_rng(0))
    firsts = [
        [text.split()[0] for text in part]
        for part in (
            [r.text for r in parts.train], [r.text for r in parts.heldout], parts.prompts_train, parts.prompts_heldout
        )
    ]  # fmt: skip
    assert sorted(w for part in firsts for w in part) == words
    assert (len(firsts[1]), len(firsts[3])) == (HELDOUT - 2, PROMPTS_HELDOUT)


def test_an_opening_settles_nothing() -> None:
    opinion = frozenset({"bad"})
    assert opening("The film is never quite as it was", 3, opinion) == "The film is"
    assert opening("A bad film is never quite as it was", 3, opinion) is None
    assert opening("Yes, the film is never quite as it was", 3, opinion) is None
    assert opening("The film is over too soon", 3, opinion) is None


@pytest.mark.parametrize("name", ["rankings_train", "rankings_heldout"])
def test_ranks_are_the_order_of_the_ratings(name: str) -> None:
    for row in rows(name):
        ratings, ranks = row["ratings"], row["ranks"]
        assert len(ratings) == len(ranks) == len(row["completions"])
        # Of two sentences the better rated has the smaller rank, and equal ratings have equal ranks.
        difference = np.sign(np.subtract.outer(ratings, ratings))
        np.testing.assert_array_equal(np.sign(np.subtract.outer(ranks, ranks)), -difference)
        assert set(ranks) == set(range(max(ranks) + 1))


def test_groups_and_pairs_have_the_sizes_they_say() -> None:
    train, heldout = rows("rankings_train"), rows("rankings_heldout")
    assert {len(row["ranks"]) for row in train} == {16}
    assert any(len(set(row["ranks"])) < 16 for row in train)  # people's ratings have ties
    assert {len(row["ranks"]) for row in heldout} == {2}
    assert min(abs(np.subtract(*row["ratings"])) for row in heldout) >= 1.0
    uses = np.unique(ranked_sentences("rankings_heldout"), return_counts=True)[1]
    assert uses.max() <= 2
    # The better one comes first about as often as second: position tells nothing.
    assert 0.4 < np.mean([row["ranks"][0] == 0 for row in heldout]) < 0.6


def test_ranking_by_hand() -> None:
    reviews = [Review("a", 1.0), Review("b", -2.0), Review("c", 1.0), Review("d", 3.5)]
    assert ranking_row(reviews)["ranks"] == [1, 2, 1, 0]
    rng = np.random.default_rng(0)
    assert sorted(map(len, group_reviews(reviews * 4 + reviews[:1], 8, rng))) == [8, 8]
    pairs = rating_pairs([Review(str(i), float(i % 2)) for i in range(20)], rng)
    assert all({p[0].rating, p[1].rating} == {0.0, 1.0} for p in pairs)
    assert len({frozenset(r.text for r in p) for p in pairs}) == len(pairs) >= 10


def greedy_encode(text: str, vocab: dict[str, int]) -> list[int]:
    """llama2.c's encoder: characters, or their UTF-8 bytes, then the neighbours whose union has the best score (the
    smallest id), leftmost first, until there are none."""
    pieces: list[str] = []
    for char in ("▁" + text.replace(" ", "▁")) if text else "":
        pieces += [char] if char in vocab else [f"<0x{byte:02X}>" for byte in char.encode()]
    while True:
        joined = [(vocab[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in vocab]
        if not joined:
            return [1, *(vocab[piece] for piece in pieces)]
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_the_tokenizer_is_llama2c_s_and_loses_nothing(tokenizer: Any) -> None:
    vocab = tokenizer.get_vocab()
    assert (len(vocab), vocab["<unk>"], vocab["<s>"], vocab["</s>"]) == (512, 0, 1, 2)
    texts = [row["text"] for row in rows("sft_heldout")[:200]]
    for text in [*texts, STORY, "a", "naïve café — “x” ½", "日本語 🙂", "line\nbreak\ttab", "x "]:
        ids = tokenizer(text)["input_ids"]
        assert ids == greedy_encode(text, vocab)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_prompt_s_tokens_begin_its_sentence_s(tokenizer: Any) -> None:
    for text in (row["text"] for row in rows("sft_heldout")[:200]):
        start, rest = " ".join(text.split()[:4]), " ".join(text.split()[4:])
        if rest:
            answer = tokenizer(" " + rest, add_special_tokens=False)["input_ids"]
            assert tokenizer(start)["input_ids"] + answer == tokenizer(text)["input_ids"]


def test_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["Hello", "Hello there"], padding=True)
    short, long = batch["input_ids"]
    padding = len(long) - sum(batch["attention_mask"][0])
    assert padding > 0
    assert short[: padding + 1] == [0] * padding + [1]


def test_the_tokenizer_file_is_read_in_order_of_score() -> None:
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), b" a", b" ", b"a"]
    data = struct.pack("<i", 8)
    for i, piece in enumerate(pieces):
        data += struct.pack("<fi", -float(i), len(piece)) + piece
    tokens = read_llama2c_tokens(data)
    assert tokens[-3:] == ["▁a", "▁", "a"]
    assert make_tokenizer(tokens).encode("a a").tokens == ["<s>", "▁a", "▁a"]


def test_rope_rows_by_hand() -> None:
    weight = np.arange(8.0)[:, None]  # two heads of dimension four
    np.testing.assert_array_equal(rope_half_split(weight, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_the_model_knows_stories(tokenizer: Any) -> None:
    model = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 260_032

    def nll(text: str) -> float:
        ids = tokenizer(text)["input_ids"]
        tokens, mask = jnp.asarray([ids], jnp.int32), jnp.ones((1, len(ids)), bool)
        logprobs, _ = model.logprob_fn(model.params, tokens, mask, temperature=1.0)
        return -float(jnp.sum(logprobs)) / (len(ids) - 1)

    words = STORY.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words).tolist())
    assert nll(STORY) < 1.0
    assert nll(shuffled) > 2.5
    assert nll(rows("sft_heldout")[1]["text"]) > 3.0  # a film review is news to it: what SFT has to teach
