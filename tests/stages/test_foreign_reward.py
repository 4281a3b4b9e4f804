"""Reward models that jrlhf did not train score as transformers does by its recipe, at every door; ours as we say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import CanaryConfig, Config, DataConfig, ModelConfig, PPOConfig, SamplingConfig
from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.tools import ScoreConfig
from jrlhf.data import Encoder, load_prompts
from jrlhf.data.formats import Example
from jrlhf.models import load_pretrained, reward_from_pretrained, save_reward_model
from jrlhf.rollout.actors import load_actors
from jrlhf.rollout.evaluation import with_judge
from jrlhf.rollout.models import weight_reader
from jrlhf.rollout.reward_models import make_scorer
from jrlhf.rollout.sampling import jit_generate, texts_of
from jrlhf.rollout.scores import learned_scorer
from jrlhf.tools.inference import run_score
from jrlhf.train.start import mesh_of
from tests.support.checkpoints import SIZES, write_checkpoint
from tests.support.folders import CHATML, byte_tokenizer
from tests.support.runs import read_jsonl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENDED = CHATML.replace("<|im_end|>\n", "<eos>")
"""Turns end with the EOS, and nothing stands behind them."""
SCORED = 1e-5

CHATS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "A longer question?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": " Because it is so, and not otherwise.\n"},
    ],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ends<eos>"}],
]
TEXTS = [("Once", " upon a time"), ("", "all in one"), ("The end", "<eos>")]


class Foreign:
    """A sequence classifier of transformers' own making, and the scores it gives by the common recipe."""

    def __init__(self, folder: Path, *, pad: int | None, template: str | None, seed: int = 0) -> None:
        names = {None: None, 0: "<pad>", 1: "<eos>"}
        self.folder, self.tokenizer = str(folder), byte_tokenizer(template, pad_token=names[pad])
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.2,
            num_labels=1,
            pad_token_id=pad,
        )
        self.model = transformers.LlamaForSequenceClassification(config).eval()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def score(self, ids: list[list[int]], side: str = "right") -> np.ndarray:
        """Of sequences in one batch, or alone where they are one."""
        batch: Any = {"input_ids": torch.tensor(ids)} if len(ids) == 1 else None
        batch = batch or self.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            return self.model(**batch).logits[:, 0].numpy()

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        ids: Any = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return ids

    def text(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


PADS = {"distinct": 0, "eos": 1, "missing": None}


@pytest.fixture(scope="module", params=PADS)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    template = ENDED if request.param == "eos" else CHATML
    return Foreign(tmp_path_factory.mktemp("foreign"), pad=PADS[request.param], template=template)


def test_score_is_transformers_score_of_the_whole_chat(foreign: Foreign, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS]
    rows += [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
    rows += [{"prompt": chat[:-1], "completions": [chat[-1]["content"]]} for chat in CHATS]
    rows += [{"prompt": prompt, "completion": text} if prompt else {"text": text} for prompt, text in TEXTS]
    source, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_score(ScoreConfig(foreign.folder, str(source), str(out)))
    scores = [row["score"] for row in read_jsonl(out)]
    chats = [foreign.chat(chat) for chat in CHATS]
    ids = [*chats * 3, *(foreign.text(prompt + text) for prompt, text in TEXTS)]
    alone = [float(foreign.score([one])[0]) for one in ids]
    np.testing.assert_allclose(scores, alone, atol=SCORED)
    if foreign.model.config.pad_token_id is not None:
        for side in ("left", "right"):
            np.testing.assert_allclose(scores, foreign.score(ids, side), atol=SCORED)


def write_policy(folder: Path, tokenizer: Any) -> str:
    write_checkpoint(
        folder,
        SIZES
        | {"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 256},
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def ppo_config(policy: str, reward: str, *others: str, **changes: Any) -> Config:
    ppo = PPOConfig(
        model=ModelConfig(path=policy),
        reward=ModelConfig(path=reward),
        rewards=RewardsConfig(models=others),
        canary=CanaryConfig(action="warn", judge=ModelConfig(path=reward)),
        sampling=SamplingConfig(max_new_tokens=8),
        **changes,
    )
    return Config(ppo=ppo)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_ppo_its_ensemble_and_the_canary_read_it_alike(foreign: Foreign, chat: bool, tmp_path: Path) -> None:
    """Whatever its vocabulary is: here it is the policy's, and the value network starts from it."""
    second = Foreign(tmp_path / "second", pad=0, template=CHATML, seed=1)
    policy = write_policy(tmp_path / "policy", byte_tokenizer(CHATML))
    config = ppo_config(policy, foreign.folder, second.folder)
    mesh = mesh_of(config)
    actors = load_actors(config.ppo, "ppo", weight_reader(config, mesh), value_from=config.ppo.value_from)
    assert actors.value is actors.reward
    given: list[Any] = [one[:-1] for one in CHATS] if chat else ["Once", "A", "The end"]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in given), encoding="utf-8")
    prompts = load_prompts(DataConfig(max_length=200), str(source), actors.tokenizer)
    generate = jit_generate(
        actors.policy.decode_fns, config.ppo.sampling, actors.tokenizer, mesh, option="ppo.sampling"
    )
    rows = np.resize(np.arange(3), 8)
    tokens, mask = prompts.batch(rows)
    generation = generate(
        actors.policy.params, jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens)), jax.random.key(0)
    )
    answers = [answer for _, answer in texts_of(actors.tokenizer, generation)]

    def recipe(model: Foreign) -> list[float]:
        pairs = [(given[row], answer) for row, answer in zip(rows, answers, strict=True)]
        ids = [
            model.chat([*prompt, {"role": "assistant", "content": answer}]) if chat else model.text(prompt + answer)
            for prompt, answer in pairs
        ]
        return [float(model.score([one])[0]) for one in ids]

    scores = make_scorer(actors, mesh, slices=1, option="ppo.reward")(generation, prompts, rows)
    np.testing.assert_allclose(scores, recipe(foreign), atol=SCORED)
    judge = make_scorer(
        with_judge(config.ppo, "ppo", actors, weight_reader(config, mesh)), mesh, slices=1, option="ppo.reward"
    )(generation, prompts, rows)
    np.testing.assert_allclose(judge, recipe(foreign), atol=SCORED)
    together = learned_scorer(config.ppo.rewards, actors, mesh, slices=1, stage="ppo")(generation, prompts, rows)
    np.testing.assert_allclose(together, np.mean([recipe(foreign), recipe(second)], axis=0), atol=SCORED)


def test_ours_is_read_at_the_stop_token(tmp_path: Path) -> None:
    """transformers gives our score of the tokens up to the one that ends the answer; what follows changes nothing."""
    tokenizer = byte_tokenizer(CHATML)
    policy = load_pretrained(write_policy(tmp_path / "policy", tokenizer), dtype="float32")
    ours = reward_from_pretrained(policy, jax.random.key(0))
    save_reward_model(ours, tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    source, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": chat[:-1], "completion": chat[-1:]}) + "\n" for chat in CHATS[:2]),
        encoding="utf-8",
    )
    run_score(ScoreConfig(str(tmp_path / "ours"), str(source), str(out)))
    encoder = Encoder(tokenizer)
    for chat, row in zip(CHATS[:2], read_jsonl(out), strict=True):
        before, after = encoder.encode_example(Example(chat[:-1], chat[-1:]))
        whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert [*before, *after, *tokenizer("\n")["input_ids"]] == whole
        with torch.no_grad():
            score = theirs(input_ids=torch.tensor([before + after])).logits[0, 0].item()
        np.testing.assert_allclose(row["score"], score, atol=SCORED)


def test_sampled_tokens_are_read_only_where_each_has_an_embedding(tmp_path: Path) -> None:
    """One tokenizer, but the policy's embeddings are padded further than the reward model's: it may sample beyond."""
    tokenizer = byte_tokenizer(CHATML)
    policy = load_pretrained(write_policy(tmp_path / "policy", tokenizer), dtype="float32")
    save_reward_model(reward_from_pretrained(policy, jax.random.key(0)), tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    sizes = SIZES | {"model_type": "llama", "vocab_size": len(tokenizer) + 4, "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "wider", sizes)
    tokenizer.save_pretrained(tmp_path / "wider")
    config = ppo_config(str(tmp_path / "policy"), str(tmp_path / "ours"))
    mesh = mesh_of(config)
    assert (
        load_actors(config.ppo, "ppo", weight_reader(config, mesh), value_from=config.ppo.value_from).reward_tokenizer
        is None
    )
    wider = replace(config, ppo=replace(config.ppo, model=ModelConfig(path=str(tmp_path / "wider"))))
    actors = load_actors(wider.ppo, "ppo", weight_reader(wider, mesh), value_from=wider.ppo.value_from)
    assert actors.reward_tokenizer is not None
    assert actors.value.arch.vocab_size == len(tokenizer) + 4
    with pytest.raises(ValueError, match=r"ppo\.value_from: the value network reads the policy's tokens, but"):
        load_actors(wider.ppo, "ppo", weight_reader(wider, mesh), value_from="reward")
