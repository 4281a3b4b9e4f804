"""Scores of sampled answers, in the policy's tokens or in the reward model's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jrlhf import assets
from jrlhf.config import Config, ConfigError, DataConfig, LoRAConfig
from jrlhf.data import DataError, Encoder, load_prompts
from jrlhf.models import RewardModel, load_pretrained, load_reward_model, reward_from_pretrained, save_reward_model
from jrlhf.rollout.actors import load_actors
from jrlhf.rollout.models import weight_reader
from jrlhf.rollout.reward_models import make_scorer, padded_width
from jrlhf.rollout.sampling import jit_generate, texts_of
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import run_ppo
from jrlhf.train.start import mesh_of
from tests.support.checkpoints import SIZES, write_checkpoint
from tests.support.runs import read_jsonl, small_config
from tests.support.short_model import SHORT_MODEL

TEMPLATE = (
    "{% if tools %}[tools]{{ tools[0].name }}<end>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}[assistant]"
)


def other_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a pad and an end of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<end>"]
    )
    bpe.train_from_iterator(["a film that is good, a film that is not"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model of another vocabulary and another family than the policy, read as jrlhf reads its own."""
    folder = tmp_path_factory.mktemp("reward")
    config = SIZES | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForSequenceClassification"],
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "tie_word_embeddings": True,
        "jrlhf": {"score_at": "stop_token"},
    }
    write_checkpoint(folder, config)
    other_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def config_with(reward: Path | str, folder: Path, **changes: Any) -> Config:
    """PPO on the shipped model against ``reward``."""
    config = small_config(folder, "run")
    ppo = replace(
        config.ppo,
        model=replace(config.ppo.model, path=SHORT_MODEL),
        reward=replace(config.ppo.reward, path=str(reward)),
        iterations=2,
        ptx_coef=0.0,
        **changes,
    )
    return replace(config, ppo=ppo)


def test_few_widths_are_compiled_for() -> None:
    widths = [padded_width(longest, 1000) for longest in range(1, 1001)]
    assert all(width >= longest for longest, width in zip(range(1, 1001), widths, strict=True))
    assert sorted(set(widths)) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]


def scorer_alone(model: RewardModel) -> Callable[[list[int]], jax.Array]:
    """Of one sequence. Padding, which changes nothing (tests/models), gives all of them one compiled program."""
    score = jax.jit(model.score)

    def alone(ids: list[int]) -> jax.Array:
        tokens = jnp.asarray([ids + [0] * (128 - len(ids))])
        return score(model.params, tokens, jnp.arange(128)[None] < len(ids))[0]

    return alone


def test_answers_are_scored_as_the_text_they_are(reward_folder: Path, tmp_path: Path) -> None:
    """The scores of a run's answers are those of prompt and answer as text, alone, in the reward model's tokens."""
    config = config_with(reward_folder, tmp_path, lora=LoRAConfig(rank=2, alpha=4.0))
    run_ppo(config)
    answers = read_jsonl(tmp_path / "run" / "ppo" / "evals" / "000002.jsonl")
    assert len(answers) == 16
    alone, encoder = scorer_alone(load_reward_model(reward_folder, dtype="float32")), Encoder(other_tokenizer(TEMPLATE))
    # The policy reads the end of a long prompt, the reward model all of it.
    given = [row["prompt"] for row in read_jsonl(Path(config.ppo.prompts.eval))]
    for prompt, row in zip(given, answers, strict=True):
        before, after = encoder.encode_sample(prompt, row["completion"], stopped=row["stopped"])
        assert (after[-1:] == [1]) == row["stopped"]
        np.testing.assert_allclose(row["score"], alone(before + after), atol=1e-4)
    assert np.std([row["score"] for row in answers]) > 1e-3
    lines = [line for line in read_metrics(tmp_path / "run" / "ppo" / "metrics.jsonl") if "kl" in line]
    assert abs(lines[0]["kl"]) == 0.0
    assert lines[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-4)  # the critic begins with 0 everywhere
    assert lines[0]["policy/first_minibatch_max_abs_log_ratio"] <= 5e-5


def test_a_chat_goes_through_the_reward_model_s_own_template(reward_folder: Path, tmp_path: Path) -> None:
    config = config_with(reward_folder, tmp_path)
    mesh = mesh_of(config)
    actors = load_actors(config.ppo, "ppo", weight_reader(config, mesh), value_from=config.ppo.value_from)
    assert actors.reward_tokenizer is not None
    policy_tokenizer = actors.tokenizer
    offered = "{% if tools %}{{ tools[0].name }}{% endif %}"
    policy_tokenizer.chat_template = offered + "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    source = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A film that is"}]
    lines = [{"prompt": messages}, {"prompt": messages, "tools": [{"name": "search"}]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) * 4, encoding="utf-8")
    prompts = load_prompts(DataConfig(max_length=64), str(source), policy_tokenizer)
    generate = jit_generate(
        actors.policy.decode_fns, config.ppo.sampling, policy_tokenizer, mesh, option="ppo.sampling"
    )
    rows = np.arange(8)
    tokens, mask = prompts.batch(rows)
    generation = generate(
        actors.policy.params, jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens)), jax.random.key(0)
    )
    found = np.asarray(make_scorer(actors, mesh, slices=1, option="ppo.reward")(generation, prompts, rows))
    answers = [answer for _, answer in texts_of(policy_tokenizer, generation)]
    theirs, alone = actors.reward_tokenizer, scorer_alone(actors.reward)
    for row in range(8):
        tools = "[tools]search<end>" if row % 2 else ""
        text = tools + "[system]Be kind.<end>[user]A film that is<end>[assistant]" + answers[row]
        ids = theirs(text, add_special_tokens=False)["input_ids"] + [1] * bool(generation.stopped[row])
        np.testing.assert_allclose(found[row], alone(ids), atol=1e-4)


def test_what_the_reward_model_cannot_read_is_named(reward_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((reward_folder / name).read_bytes())
    other_tokenizer(None).save_pretrained(bare)
    config = config_with(bare, tmp_path, value_from="reward")
    with pytest.raises(ConfigError, match=r"ppo\.value_from: the value network reads the policy's tokens"):
        load_actors(config.ppo, "ppo", weight_reader(config, mesh_of(config)), value_from=config.ppo.value_from)
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n") * 16, encoding="utf-8")
    prompts = replace(config.ppo.prompts, train=str(chats), eval=str(chats))
    tokenizer = Path(assets.resolve("asset:stories260k"))
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in tokenizer.iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    (policy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    ppo = replace(config.ppo, prompts=prompts, value_from="auto", model=replace(config.ppo.model, path=str(policy)))
    with pytest.raises(
        DataError, match=r"ppo\.reward: .* prompt: chat messages, but the tokenizer has no chat template"
    ):
        run_ppo(replace(config, ppo=ppo))


@pytest.fixture(scope="module")
def same_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the shipped model's own kind."""
    folder = tmp_path_factory.mktemp("same")
    model = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32")
    save_reward_model(reward_from_pretrained(model, jax.random.key(1)), folder)
    return folder


@pytest.mark.parametrize(("value_from", "from_policy"), [("auto", False), ("reward", False), ("policy", True)])
def test_with_the_same_tokens_the_value_network_starts_from_either(
    value_from: str, from_policy: bool, same_tokens: Path, tmp_path: Path
) -> None:
    config = config_with(same_tokens, tmp_path, value_from=value_from)
    actors = load_actors(config.ppo, "ppo", weight_reader(config, mesh_of(config)), value_from=config.ppo.value_from)
    assert actors.reward_tokenizer is None
    assert (actors.value is not actors.reward) == from_policy
    assert bool(np.any(actors.value.params["head"]["kernel"])) != from_policy


def test_with_others_it_starts_from_the_policy_s_own_arrays(reward_folder: Path, tmp_path: Path) -> None:
    config = config_with(reward_folder, tmp_path)
    actors = load_actors(config.ppo, "ppo", weight_reader(config, mesh_of(config)), value_from=config.ppo.value_from)
    assert not np.any(actors.value.params["head"]["kernel"])
    shared = [
        a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
        for leaves in zip(
            jax.tree.leaves(actors.value.params["decoder"]["layers"]),
            jax.tree.leaves(actors.policy.params["layers"]),
            strict=True,
        )
        for a, b in [[x.addressable_shards[0].data for x in leaves]]
    ]
    assert all(shared)
