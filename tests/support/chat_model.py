"""The tiny chat model: the shipped one with ChatML's two tokens, neither of them its EOS, and the usual files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jrlhf import assets

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHATML.replace("assistant", "tool")
TURNS = ("<|im_start|>", "<|im_end|>")
EOS, IM_END = 2, 513
SPIECE = bytes(range(256))
"""No sentencepiece model, but binary as one is: whoever opens it as text loses it."""
TOKENIZER_NAMES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
}


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
WIDE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Sizes of a model that vLLM has kernels for: heads of 8 are too small for it."""


def write_chat_model(
    folder: Path, *, bfloat16: bool = True, pad: str | None = "</s>", eos: Any = EOS, wide: bool = False
) -> Path:
    """``pad``: its own pad token, the EOS as often is, or none. ``eos``: of generation_config.json; None: no such file.
    ``wide``: untrained, in the sizes of ``WIDE``.

    Its files have spaces and an order of their own, which nobody else would write.
    """
    source = Path(assets.resolve("asset:stories260k"))
    (folder / "additional_chat_templates").mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(list(TURNS))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | (
        {} if pad is None else {"pad_token": pad}
    )
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | about, indent=5))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer.model").write_bytes(SPIECE)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates" / "tools.jinja").write_text(TOOLS)
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 514, "torch_dtype": "bfloat16" if bfloat16 else "float32"}
    config |= {"pad_token_id": tokenizer.token_to_id(pad) if pad else None}
    config |= WIDE if wide else {}
    (folder / "config.json").write_text(json.dumps(config))
    if eos is not None:
        generation = {"bos_token_id": 1, "eos_token_id": eos, "temperature": 0.6, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    tensors = _random_tensors() if wide else load_file(source / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    rows = np.random.default_rng(0).normal(0.0, embed.std(), (2, embed.shape[1])).astype(np.float32)
    tensors["model.embed_tokens.weight"] = np.concatenate([embed, rows])
    if bfloat16:
        tensors = {name: np.asarray(value.astype(jnp.bfloat16)) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _random_tensors() -> dict[str, np.ndarray]:
    """A Llama in the sizes of ``WIDE``, whose embeddings are tied, with the shipped model's 512 tokens."""
    width, inner, head = WIDE["hidden_size"], WIDE["intermediate_size"], WIDE["head_dim"]
    queries, keys = head * WIDE["num_attention_heads"], head * WIDE["num_key_value_heads"]
    draws = np.random.default_rng(1)
    maps = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width)}
    maps |= {"self_attn.o_proj": (width, queries), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    maps |= {"mlp.down_proj": (width, inner)}
    shapes = {"model.embed_tokens.weight": (512, width)}
    norms = ["model.norm.weight"]
    for layer in (f"model.layers.{i}." for i in range(WIDE["num_hidden_layers"])):
        shapes |= {f"{layer}{name}.weight": shape for name, shape in maps.items()}
        norms += [f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")]
    tensors = {name: draws.normal(0.0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {name: np.ones(width, np.float32) for name in norms}


STORIES = [
    ("Tell me about Tom.", "Tom had a red ball. He was happy."),
    ("Tell me about Lily.", "Lily saw a big dog."),
    ("Who likes cake?", "Mom likes cake."),
    ("What did Ben do?", "Ben ran to the park to play."),
]


def write_chats(folder: Path) -> dict[str, str]:
    """Files of conversations, rankings and prompts of the same few questions, by kind."""
    folder.mkdir(parents=True, exist_ok=True)

    def turns(question: str, *answers: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}] + [{"role": "assistant", "content": a} for a in answers]

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"messages": turns(*story)} for story in STORIES] * 4,
        "rankings": [
            {"prompt": turns(q), "chosen": turns(q, a)[1:], "rejected": turns(q, a[::-1])[1:]} for q, a in STORIES
        ]
        * 4,
        "prompts": [{"prompt": turns(q)} for q, _ in STORIES] * 2,
    }
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {kind: str(folder / f"{kind}.jsonl") for kind in rows}


def copy_run(run: Path, to: Path) -> Path:
    """The run's exports and what says how they were made, without its checkpoints, in another place."""
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "tensorboard")))
