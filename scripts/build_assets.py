"""Builds the shipped assets from their sources: ``python -m scripts.build_assets --help``. Deterministic.

``asset:stories260k`` is A. Karpathy's stories260K, read from the llama2.c files and written as a Hugging Face folder.
The split of the review sentences shares no sentence between its parts: SFT and rankings train on the same texts, and
held-out rows and prompts use others.
"""

import argparse
import html
import json
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jrlhf.system.lines import json_line, write_text

SEED = 20020501
HELDOUT, PROMPTS_TRAIN, PROMPTS_HELDOUT = 1000, 1490, 512
RANKING_SIZE = 16
LENGTH_SPREAD = 0.15
"""Standard deviation of the noise on the log length by which sentences are grouped."""
PAIRS_PER_SENTENCE = 2
PAIR_GAP = 1.0


def rope_half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k from llama2.c's pairs (2i, 2i + 1) to Hugging Face's pairs (i, i + d/2)."""
    rows, dim = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, dim).swapaxes(1, 2).reshape(rows, dim)


def read_llama2c(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the Hugging Face config and the tensors of a llama2.c checkpoint (version 0: seven int32, then
    float32)."""
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    if vocab < 0:
        raise ValueError("a separate output matrix is not supported")
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim
    flat, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return flat[at - size : at].reshape(shape)

    embedding = take(vocab, dim)
    per_layer = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    take(2, context, head_dim // 2)  # skip the RoPE tables, which follow from theta
    if at != flat.size:
        raise ValueError(f"{flat.size - at} floats remain unread")
    for name, stacked in per_layer.items():
        for i, weight in enumerate(stacked):
            if name.endswith("q_proj"):
                weight = rope_half_split(weight, heads)
            elif name.endswith("k_proj"):
                weight = rope_half_split(weight, kv_heads)
            tensors[f"model.layers.{i}.{name}.weight"] = np.ascontiguousarray(weight)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab,
    }
    return config, tensors


def read_llama2c_tokens(data: bytes) -> list[str]:
    """Return the tokens of a llama2.c tokenizer file, best merge first, with ``▁`` for a space as in sentencepiece."""
    at, tokens, scores = 4, [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    if scores != sorted(scores, reverse=True):
        raise ValueError("scores do not fall with the token id, so ids do not order the merges")
    return tokens


def make_tokenizer(tokens: Sequence[str]) -> Tokenizer:
    """Build the BPE of ``tokens`` (``<unk>``, ``<s>``, ``</s>``, 256 bytes, pieces, best first) with byte fallback.

    llama2.c joins the neighbours with the best union, so every split of a token into two tokens is a merge.
    ``prepend_scheme="first"`` adds sentencepiece's space only to text that starts the input without a space: text after
    a special token is a continuation.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = tokens[3 + 256 :]
    merges = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_model(source: Path, out: Path) -> None:
    """Write ``stories260K.bin`` and ``tok512.bin`` as a Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    config, tensors = read_llama2c((source / "stories260K.bin").read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    make_tokenizer(read_llama2c_tokens((source / "tok512.bin").read_bytes())).save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    tokenizer_config = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": config["max_position_embeddings"],
        "pad_token": "<unk>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    _write_json(out / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(source / "llama2.c_LICENSE.txt", out / "LICENSE")


class Review(NamedTuple):
    """A sentence of a film review, and the mean of its ratings by people, in [-4, 4]."""

    text: str
    rating: float


def clean(text: str) -> str:
    """Replace HTML entities, LaTeX quotes and the gaps of missing dashes by plain text."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " - ", text)
    return re.sub(r"\s+", " ", text).strip()


def normalised(text: str) -> str:
    """Reduce a text to lower-case letters and digits, which identify a sentence."""
    return "".join(c for c in text.lower() if c.isalnum())


def read_reviews(path: Path) -> list[Review]:
    """Read each sentence once, in the order of the file; the first of several duplicates stays."""
    reviews: dict[str, Review] = {}
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        _, rating, text = line.split("\t")
        reviews.setdefault(normalised(clean(text)), Review(clean(text), round(float(rating), 3)))
    return list(reviews.values())


def opening(text: str, words: int, opinion: frozenset[str]) -> str | None:
    """Return the first words of a sentence; None if they end a clause, hold an opinion, or leave under four words."""
    parts = text.split()
    start = parts[:words]
    has_opinion = any(normalised(w) in opinion for w in start)
    if has_opinion or len(parts) < words + 4 or re.search(r"[^\w' ]", " ".join(start)):
        return None
    return " ".join(start)


def read_opinion_words(folder: Path) -> frozenset[str]:
    """Return both word lists of the opinion lexicon."""
    lines = [line for p in sorted(folder.glob("*-words.txt")) for line in p.read_text(encoding="utf-8").split("\n")]
    return frozenset(normalised(line) for line in lines if line and not line.startswith(";"))


class Parts(NamedTuple):
    """Parts of the data, which share no sentence and no opening."""

    train: list[Review]
    heldout: list[Review]
    prompts_train: list[str]
    prompts_heldout: list[str]


def split_reviews(reviews: Sequence[Review], opinion: frozenset[str], rng: np.random.Generator) -> Parts:
    """Draw openings from suitable sentences, then split the other sentences at random."""
    openings: dict[str, str] = {}
    rest: list[Review] = []
    lengths = rng.integers(3, 6, len(reviews))
    for i, review in zip(lengths, (reviews[j] for j in rng.permutation(len(reviews))), strict=True):
        start = opening(review.text, int(i), opinion)
        key = start and normalised(start)
        if start and key and key not in openings and len(openings) < PROMPTS_TRAIN + PROMPTS_HELDOUT:
            openings[key] = start
        else:
            rest.append(review)
    prompts = list(openings.values())
    rest = [rest[i] for i in rng.permutation(len(rest))]
    return Parts(rest[HELDOUT:], rest[:HELDOUT], prompts[PROMPTS_HELDOUT:], prompts[:PROMPTS_HELDOUT])


def ranking_row(group: Sequence[Review]) -> dict[str, Any]:
    """Return a row of rankings: rank 0 is the best rating, and equal ratings share a rank."""
    order = sorted({r.rating for r in group}, reverse=True)
    return {
        "completions": [r.text for r in group],
        "ranks": [order.index(r.rating) for r in group],
        "ratings": [r.rating for r in group],
    }


def group_reviews(reviews: Sequence[Review], size: int, rng: np.random.Generator) -> list[list[Review]]:
    """Group all sentences by similar length into groups of ``size``, in random order.

    Similar lengths predict little of the rank and need little padding, but they differ, so that long and short
    sentences meet as well. A remainder of one sentence is dropped.
    """
    lengths = np.asarray([len(review.text) for review in reviews])
    noisy_lengths = lengths * np.exp(LENGTH_SPREAD * rng.standard_normal(len(reviews)))
    by_length = [reviews[i] for i in np.argsort(noisy_lengths, kind="stable")]
    groups = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    # Shuffle each group: its longest sentence must not always come last.
    mixed = [[group[i] for i in rng.permutation(len(group))] for group in groups if len(group) > 1]
    return [mixed[i] for i in rng.permutation(len(mixed))]


def rating_pairs(reviews: Sequence[Review], rng: np.random.Generator) -> list[list[Review]]:
    """Draw random pairs of sentences whose ratings differ by at least ``PAIR_GAP``, with each sentence in at most
    ``PAIRS_PER_SENTENCE`` pairs."""
    pairs: dict[frozenset[int], list[Review]] = {}
    for _ in range(PAIRS_PER_SENTENCE):
        waiting: list[int] = []
        for i in map(int, rng.permutation(len(reviews))):
            far = [j for j in waiting if abs(reviews[i].rating - reviews[j].rating) >= PAIR_GAP]
            new = [j for j in far if frozenset((i, j)) not in pairs]
            if new:
                waiting.remove(new[0])
                pairs[frozenset((i, new[0]))] = [reviews[new[0]], reviews[i]]
            else:
                waiting.append(i)
    return list(pairs.values())


def write_reviews(source: Path, out: Path) -> None:
    """Write the files of the split, and the opinion lexicon."""
    shutil.unpack_archive(source / "opinion_lexicon.zip", out)
    reviews = read_reviews(source / "vader_movieReviewSnippets_GroundTruth.txt")
    rng = np.random.default_rng(SEED)
    parts = split_reviews(reviews, read_opinion_words(out / "opinion_lexicon"), rng)
    _write_jsonl(out / "sft_train.jsonl", ({"text": r.text} for r in parts.train))
    _write_jsonl(out / "sft_heldout.jsonl", ({"text": r.text} for r in parts.heldout))
    _write_jsonl(out / "rankings_train.jsonl", map(ranking_row, group_reviews(parts.train, RANKING_SIZE, rng)))
    _write_jsonl(out / "rankings_heldout.jsonl", map(ranking_row, rating_pairs(parts.heldout, rng)))
    _write_jsonl(out / "prompts_train.jsonl", ({"prompt": p} for p in parts.prompts_train))
    _write_jsonl(out / "prompts_heldout.jsonl", ({"prompt": p} for p in parts.prompts_heldout))
    shutil.copyfile(source / "vader_LICENSE.txt", out / "LICENSE_reviews")


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(map(json_line, rows)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model-dir", type=Path, required=True, help="folder with stories260K.bin, tok512.bin and their licence"
    )
    parser.add_argument(
        "--reward-dir", type=Path, required=True, help="folder with the rated reviews, their licence and the lexicon"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_model(args.model_dir, args.out / "stories260k")
    write_reviews(args.reward_dir, args.out)


if __name__ == "__main__":
    main()
