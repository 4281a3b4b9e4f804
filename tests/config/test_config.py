"""YAML in and out, each mistake named by file, line and path; and the rules between fields."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.config import (
    Config,
    ConfigError,
    DataConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    SamplingConfig,
    SFTConfig,
    check,
    load_config,
    pipeline_stages,
    to_yaml,
)
from jrlhf.config.files import apply_flags, config_path, diff_configs, flag_types
from jrlhf.config.tools import GenerateConfig, QuickstartConfig, ScoreConfig, VerifyConfig
from tests.support import ROOT

CONFIGS = ROOT / "configs"


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    """The messages, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_values_are_put_over_the_stage_s_own_defaults(tmp_path):
    config = load(
        tmp_path, "run: a\nppo:\n  optim: {lr: 3.0e-6}\n  sampling: {stop: [x, '1']}\n  whiten_rewards: yes\n"
    )
    assert config.run == "a"
    assert config.ppo.optim == OptimConfig(lr=3e-6, eps=1e-5, b2=0.999, schedule="constant")
    assert config.ppo.sampling.stop == ("x", "1")
    assert config.ppo.whiten_rewards is True
    assert config.sft == SFTConfig()


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".1e-4", "+1e-5"])
def test_every_way_to_write_a_float_is_one(tmp_path, text):
    assert load(tmp_path, f"sft: {{optim: {{lr: {text}}}}}").sft.optim.lr == 1e-5


def test_an_integer_is_a_float_too(tmp_path):
    epochs = load(tmp_path, "sft: {epochs: 3}").sft.epochs
    assert epochs == 3.0
    assert isinstance(epochs, float)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "mesh:\nsft:\n  optim:\n"])
def test_an_empty_file_or_section_is_all_defaults(tmp_path, text):
    assert load(tmp_path, text) == Config()


def test_a_byte_order_mark_and_crlf_do_no_harm(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: a\r\nseed: 7\r\n")
    assert load_config(path) == replace(Config(), run="a", seed=7)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sft:\n  optim:\n    learning_rate: 1",
         "run.yaml:3: sft.optim.learning_rate: unknown key; did you mean sft.optim.lr?"),
        ("sft: {num_train_epochs: 1}", "run.yaml:1: sft.num_train_epochs: unknown key; did you mean sft.epochs?"),
        ("ppo: {lr: 1}", "run.yaml:1: ppo.lr: unknown key; did you mean ppo.optim.lr?"),
        ("rewrad: {}", "run.yaml:1: rewrad: unknown key; did you mean reward?"),
        ("mesh: {zzz: 1}", "run.yaml:1: mesh.zzz: unknown key; possible names: data, fsdp, tensor"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_its_path_and_the_nearest_right_one(tmp_path, text, problem):
    assert problems(tmp_path, text) == [problem]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1.5", "seed: expected a whole number, got '1.5' (a number)"),
        ("seed: true", "seed: expected a whole number, got 'true' (a boolean)"),
        ("seed: '1'", "seed: expected a whole number, got '1' (a string)"),
        ("seed: 1:30", "seed: expected a whole number, got '1:30' (a whole number)"),
        ("seed:", "seed: expected a whole number, got nothing"),
        ("seed: [1]", "seed: expected a whole number, got a list"),
        (f"seed: {'9' * 5000}", f"seed: expected a whole number, got '{'9' * 200}'... (a whole number)"),
        ("run: 2026", "run: expected a string, got '2026' (a whole number); put it in quotes"),
        ("run: 2026-01-01", "run: expected a string, got '2026-01-01' (a date); put it in quotes"),
        ("run: {a: 1}", "run: expected a string, got a section"),
        ("sft: {epochs: fast}", "sft.epochs: expected a finite number, got 'fast' (a string)"),
        ("sft: {epochs: '1e-5'}", "sft.epochs: expected a finite number, got '1e-5' (a string)"),
        ("sft: {epochs: .nan}", "sft.epochs: expected a finite number, got '.nan' (a number)"),
        ("sft: {epochs: inf}", "sft.epochs: expected a finite number, got 'inf' (a string)"),
        ("sft: {epochs: true}", "sft.epochs: expected a finite number, got 'true' (a boolean)"),
        ("ppo: {whiten_rewards: 1}", "ppo.whiten_rewards: expected true or false, got '1' (a whole number)"),
        ("sft: {model: {dtype: fp16}}", "sft.model.dtype: expected float32 or bfloat16, got 'fp16' (a string)"),
        ("ppo: {kl: {estimator: [k1]}}", "ppo.kl.estimator: expected k1, k2 or k3, got a list"),
        ("sft: {sampling: {stop: x}}", "sft.sampling.stop: expected a list, got 'x' (a string)"),
        ("sft: {sampling: {stop: [1]}}",
         "sft.sampling.stop: expected a string, got '1' (a whole number); put it in quotes"),
        ("mesh: 8", "mesh: expected a section of keys, got '8' (a whole number)"),
        ("- run", "expected a section of keys, got a list"),
    ],
)  # fmt: skip
def test_a_wrong_type_names_path_value_and_what_was_expected(tmp_path, text, problem):
    assert problems(tmp_path, text) == [f"run.yaml:1: {problem}"]


def test_yaml_s_octal_and_underscores_are_read_as_people_mean_them(tmp_path):
    assert load(tmp_path, "seed: 010").seed == 10
    assert load(tmp_path, "ppo: {kl: {horizon: 10_000}}").ppo.kl.horizon == 10000


def test_every_mistake_is_told_at_once(tmp_path):
    text = "seed: x\nsft:\n  epoch: 1\n  optim:\n    lr: y\n"
    assert [p.split(": ")[:2] for p in problems(tmp_path, text)] == [
        ["run.yaml:1", "seed"],
        ["run.yaml:3", "sft.epoch"],
        ["run.yaml:5", "sft.optim.lr"],
    ]


def test_a_key_set_twice_names_both_lines(tmp_path):
    assert problems(tmp_path, "seed: 1\nrun: a\nseed: 2\n") == ["run.yaml:3: seed: set twice, first on line 1"]


def test_sources_are_one_or_several_with_weights(tmp_path):
    assert load(tmp_path, "sft: {data: {train: a.jsonl}}").sft.data.train == "a.jsonl"
    config = load(tmp_path, "sft:\n  data:\n    train:\n      data/a.jsonl: 3\n      org/name:train: 1e-1\n")
    assert config.sft.data.train == {"data/a.jsonl": 3.0, "org/name:train": 0.1}
    assert list(config.sft.data.train) == ["data/a.jsonl", "org/name:train"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    flagged = apply_flags(Config(), {"sft.data.train": ["{data/a.jsonl: 3, org/name:train: 0.1}"]})
    assert flagged.sft.data.train == config.sft.data.train
    for name in ("2026", "a.jsonl", "odd [name]* {x}.jsonl"):
        assert apply_flags(Config(), {"sft.data.train": [name]}).sft.data.train == name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a, b]", "expected a string, got a list"),
        ("2026", "expected a string, got '2026' (a whole number); put it in quotes"),
        ("{a.jsonl: many}", "expected a finite number as the weight of 'a.jsonl', got 'many' (a string)"),
        ("{a.jsonl: '3'}", "expected a finite number as the weight of 'a.jsonl', got '3' (a string)"),
        ("{a.jsonl: .inf}", "expected a finite number as the weight of 'a.jsonl', got '.inf' (a number)"),
        ("{a.jsonl: [1]}", "expected a finite number as the weight of 'a.jsonl', got a list"),
        ("{a.jsonl:3}", "expected a finite number as the weight of 'a.jsonl:3', got nothing"),
        ("{a.jsonl: 1, a.jsonl: 2}", "'a.jsonl' appears twice"),
        ("{7: 1}", "expected a string, got '7' (a whole number); put it in quotes"),
        ("!!python/dict {a: 1}",
         "expected a string, or strings with weights, got the tag !!python/dict, which is not allowed"),
    ],
)  # fmt: skip
def test_a_wrong_source_or_weight_is_named(tmp_path, text, problem):
    assert problems(tmp_path, f"sft: {{data: {{train: {text}}}}}") == [f"run.yaml:1: sft.data.train: {problem}"]
    if text.startswith("{"):
        with pytest.raises(ConfigError) as caught:
            apply_flags(Config(), {"sft.data.train": [text]})
        assert str(caught.value) == f"--sft.data.train: {problem}"


def test_a_flag_that_is_no_mapping_after_all_is_named():
    with pytest.raises(ConfigError) as caught:
        apply_flags(Config(), {"sft.data.train": ["{a.jsonl: 1"]})
    must = "expected sources with weights, such as {a.jsonl: 3, b.jsonl: 1}, got '{a.jsonl: 1'"
    assert str(caught.value) == f"--sft.data.train: {must}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("run: [a\nseed: 1\n", "run.yaml:2:5: bad YAML: "),
        ("run: a\n\tseed: 1\n", "run.yaml:2:1: bad YAML: "),
        ("run: *nobody\n", "run.yaml:1:6: bad YAML: found undefined alias"),
        ("run: a\n---\nrun: b\n", "run.yaml:2:1: bad YAML: "),
        ("seed: 1\nrun: a\0b\n", "run.yaml:2: bad YAML: "),
        ("[" * 5000, "run.yaml: bad YAML: nested too deeply"),
    ],
)
def test_bad_yaml_names_the_place(tmp_path, text, place):
    assert problems(tmp_path, text)[0].startswith(place)


def test_a_python_tag_is_refused_and_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    for text in (f"run: !!python/object/apply:os.mkdir ['{canary}']", "run: !!python/name:os.getcwd ''"):
        [problem] = problems(tmp_path, text)
        assert problem.startswith("run.yaml:1: run: expected a string, got the tag !!python/")
    assert not canary.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 \(byte 8\)"):
        load_config(tmp_path / "latin.yaml")


def test_flags_win_over_the_file_and_may_repair_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nppo: {episodes: 10, minibatches: 4}\n")
    with pytest.raises(ConfigError, match=r"ppo\.minibatches"):
        load_config(path)
    config = load_config(path, {"ppo.minibatches": ["5"], "run": ["2026"], "sft.sampling.stop": ["a", "1"]})
    assert (config.seed, config.ppo.episodes, config.ppo.minibatches) == (3, 10, 5)
    assert (config.run, config.sft.sampling.stop) == ("2026", ("a", "1"))


def test_flags_are_read_like_yaml():
    config = apply_flags(
        Config(), {"sft.optim.lr": ["1e-4"], "ppo.whiten_rewards": ["True"], "ppo.kl.estimator": ["k3"]}
    )
    assert (config.sft.optim.lr, config.ppo.whiten_rewards, config.ppo.kl.estimator) == (1e-4, True, "k3")
    with pytest.raises(ConfigError) as caught:
        apply_flags(Config(), {"seed": ["x"], "ppo.kl.estimator": ["k4"], "sft.epochs": [""]})
    assert str(caught.value).splitlines() == [
        "--seed: expected a whole number, got 'x' (a string)",
        "--ppo.kl.estimator: expected k1, k2 or k3, got 'k4' (a string)",
        "--sft.epochs: expected a finite number, got nothing",
    ]


plain = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@given(
    run=plain.filter(lambda text: text.strip() and not any(part in text for part in ("..", "%", "://"))),
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(0, 1e300),
    stop=st.lists(plain.filter(bool), max_size=3),
)
def test_to_yaml_reads_back_to_the_same_config(tmp_path_factory, run, seed, rate, stop):
    sft = SFTConfig(optim=OptimConfig(lr=rate), sampling=SamplingConfig(stop=tuple(stop)))
    config = replace(Config(), run=run, seed=seed, sft=sft)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_bytes(to_yaml(config).encode())
    assert load_config(path) == config


def test_what_yaml_takes_for_the_end_of_a_line_comes_back(tmp_path):
    sft = SFTConfig(sampling=SamplingConfig(stop=("a\x85", "\u2028 b", "c\u2029c", "d\n")))
    assert load(tmp_path, to_yaml(replace(Config(), sft=sft))).sft == sft


def test_to_yaml_writes_every_field_and_no_tag():
    text = to_yaml(Config())
    assert "!!" not in text
    assert text.startswith("run: runs/default\nseed: 0\nmesh:\n  data: -1\n")
    assert sum(not line.endswith(":") for line in text.splitlines()) == len(flag_types(Config))


def test_diff_configs_names_what_differs():
    old = Config()
    new = replace(old, seed=1, ppo=replace(old.ppo, kl=KLConfig(target=0.0), sampling=SamplingConfig(stop=("x",))))
    assert diff_configs(old, old) == []
    assert diff_configs(old, new) == [
        "seed: 0 -> 1",
        "ppo.sampling.stop: () -> ('x',)",
        "ppo.kl.target: 6.0 -> 0.0",
    ]
    mixed = replace(old, sft=replace(old.sft, data=replace(old.sft.data, train={"a.jsonl": 3.0, "b.jsonl": 1.0})))
    assert diff_configs(old, mixed) == ["sft.data.train: '' -> {'a.jsonl': 3.0, 'b.jsonl': 1.0}"]
    assert diff_configs(mixed, old) == ["sft.data.train: {'a.jsonl': 3.0, 'b.jsonl': 1.0} -> ''"]


def test_the_defaults_pass():
    for config in (Config(), GenerateConfig("m", "p"), ScoreConfig("m", "d"), VerifyConfig("m")):
        check(config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run", " "), ("run", "../a"), ("run", "a/%2E./b"), ("run", "gs://a/b"),
        ("seed", "-1"), ("mesh.data", "0"), ("mesh.fsdp", "0"), ("mesh.tensor", "-1"),
        ("sft.optim.lr", "-1e-5"), ("sft.optim.warmup", "1.5"), ("sft.optim.b1", "1"), ("reward.optim.b2", "-0.1"),
        ("ppo.optim.eps", "0"), ("sft.optim.weight_decay", "-1"), ("sft.optim.max_grad_norm", "-1"),
        ("sft.data.train", "{}"), ("sft.data.train", "{a: 0}"), ("reward.data.train", "{a: 1, b: -1}"),
        ("sft.data.max_length", "0"), ("reward.data.buckets", "0"), ("ppo.ptx.buckets", "0"),
        ("sft.checkpoint.every", "0"), ("sft.checkpoint.keep", "0"), ("ppo.checkpoint.keep_best", "-1"),
        ("sft.log.every", "0"), ("reward.log.eval_every", "0"), ("ppo.log.eval_rows", "-1"), ("sft.log.samples", "-1"),
        ("sft.sampling.max_new_tokens", "0"), ("sft.sampling.temperature", "-1"), ("sft.sampling.top_k", "-1"),
        ("sft.sampling.top_p", "0"), ("sft.sampling.stop", ""), ("ppo.sampling.slots", "-1"), ("sft.epochs", "0"),
        ("sft.batch_size", "0"),
        ("sft.microbatch", "-1"), ("sft.pack_length", "100"), ("reward.pack_length", "-1"),
        ("sft.lora.rank", "-1"), ("reward.lora.alpha", "0"), ("ppo.lora.targets", "("),
        ("sft.candidates", "0"), ("reward.epochs", "-1"),
        ("reward.microbatch", "-1"), ("reward.center_coef", "-1"), ("ppo.sampling.temperature", "0"),
        ("ppo.sampling.top_k", "50"), ("ppo.sampling.top_p", "0.9"), ("ppo.kl.coef", "-1"), ("ppo.kl.target", "-1"),
        ("sft.max_skipped", "0"), ("reward.max_skipped", "0"), ("ppo.max_skipped", "0"),
        ("ppo.guards.kl.patience", "0"), ("ppo.guards.length.bound", "1"), ("ppo.guards.rollbacks", "-1"),
        ("ppo.guards.rollback_lr", "0"), ("ppo.guards.rollback_beta", "0.5"),
        ("ppo.kl.horizon", "0"), ("ppo.iterations", "0"), ("ppo.episodes", "0"), ("ppo.epochs", "0"),
        ("ppo.minibatches", "0"), ("ppo.minibatches", "3"), ("ppo.microbatch", "-1"),
        ("ppo.rollout_parts", "0"), ("ppo.rollout_parts", "3"),
        ("ppo.value_lr", "-1"), ("ppo.gamma", "1.1"), ("ppo.lam", "-0.1"), ("ppo.clip", "0"), ("ppo.dual_clip", "0.5"),
        ("ppo.dual_clip", "1"), ("ppo.value_clip", "0"), ("ppo.value_coef", "-1"), ("ppo.entropy_coef", "-1"),
        ("ppo.missing_eos_penalty", "-1"), ("ppo.target_approx_kl", "-1"), ("ppo.critic_warmup", "-1"),
        ("ppo.ema_decay", "1"), ("ppo.ptx_coef", "-1"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name, text):
    with pytest.raises(ConfigError) as caught:
        check(apply_flags(Config(), {name: [text]}))
    assert f"{name}: must be " in str(caught.value)


def test_a_judge_that_nobody_would_ask_is_an_error(tmp_path):
    judge = "ppo: {canary: {judge: {path: judge}}}"
    message = "ppo.canary.judge.path: must be empty, because ppo.canary.action is off and would not use it"
    assert [line for line in problems(tmp_path, judge) if "judge" in line] == [f"{message}, got 'judge'"]


def test_rules_between_fields_name_both():
    ppo = PPOConfig(episodes=64, minibatches=3, ptx_coef=1.0)
    with pytest.raises(ConfigError) as caught:
        check(replace(Config(), ppo=ppo))
    assert str(caught.value).splitlines() == [
        "ppo.minibatches: must be a divisor of ppo.episodes (64), got 3",
        "ppo.ptx.train: must be set, because ppo.ptx_coef is 1.0, got ''",
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("sft", "ppi"), "stages: must be some of sft, reward, .*, got \\('sft', 'ppi'\\)"),
        (("sft", "sft"), "stages: must be different stages, got \\('sft', 'sft'\\)"),
        (("sft", "reward"), "reward.data.train: must be set, because stages names reward, got ''"),
    ],
)
def test_the_stages_of_a_pipeline_are_checked(stages, message):
    sft = SFTConfig(data=DataConfig(train="rows.jsonl"))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check(replace(Config(), sft=sft, stages=stages))


def test_a_pipeline_runs_the_stages_that_have_data_or_are_named():
    data = DataConfig(train="rows.jsonl")
    config = replace(Config(), sft=SFTConfig(data=data), ppo=PPOConfig(prompts=data))
    assert pipeline_stages(config) == ("sft", "ppo")
    assert pipeline_stages(replace(config, stages=("ppo", "sft"))) == ("ppo", "sft")
    assert pipeline_stages(replace(config, stages=("ppo",))) == ("ppo",)


def test_the_tools_values_are_checked_too():
    with pytest.raises(ConfigError, match="samples: must be 1 or more, got 0"):
        check(GenerateConfig("m", "p", samples=0))
    with pytest.raises(ConfigError, match="batch_size: must be 1 or more, got 0"):
        check(ScoreConfig("m", "d", batch_size=0))
    with pytest.raises(ConfigError, match=r"sampling\.slots: must be 0, because batch_size is"):
        check(GenerateConfig("m", "p", sampling=SamplingConfig(slots=4)))
    with pytest.raises(ConfigError, match="temperature: must be above 0, got 0"):
        check(VerifyConfig("m", temperature=0.0))


def test_a_quick_start_s_folder_is_checked_as_a_run_s():
    check(QuickstartConfig("/elsewhere/run"))
    with pytest.raises(
        ConfigError, match=r"^out: must be without '\.\.'; write an absolute path for a folder elsewhere, got"
    ):
        check(QuickstartConfig("../run"))


def test_config_path_finds_recipes_and_names_a_missing_one():
    assert config_path("quickstart/full.yaml") == CONFIGS / "quickstart" / "full.yaml"
    with pytest.raises(ConfigError, match=r"nope\.yaml: there is no such recipe"):
        config_path("nope.yaml")


RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "launch")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_recipe_is_strictly_valid_and_names_its_data(path):
    config = load_config(path)
    assert config.sft.model.path
    # After SFT a recipe goes by a reward model and PPO, by DPO, or by GRPO, which can do without a reward model.
    data = {"sft": config.sft.data, "reward": config.reward.data, "dpo": config.dpo.data}
    data |= {"ppo": config.ppo.prompts, "grpo": config.grpo.prompts}
    stages = pipeline_stages(config)
    assert all(data[stage].train and data[stage].eval for stage in stages)
    assert stages in (("sft", "reward", "ppo"), ("sft", "dpo"), ("sft", "grpo"), ("sft", "reward", "grpo"))
    assert config.run != Config().run


def loaded(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def refused(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text)
    return str(error.value).replace(str(tmp_path / "config.yaml"), "FILE").split("\n")


def test_merge_keys_take_in_what_a_section_does_not_say_itself(tmp_path):
    config = loaded(
        tmp_path,
        ".common: &o {lr: 1e-4, warmup: 0.1}\n"
        "x-more: &more {<<: *o, lr: 2e-4, b1: 0.5}\n"
        "run: run1\n"
        "sft: {optim: {<<: *o, b2: 0.99}}\n"
        "reward:\n  optim:\n    b1: 0.7\n    <<: [*more, *o]\n  data: &rows {train: a.jsonl, max_length: 32}\n"
        "ppo: {optim: {<<: [*o, *more], lr: 3e-4}, prompts: *rows, ptx: {<<: *rows, max_length: 8}}\n",
    )
    sft, reward, ppo = config.sft.optim, config.reward.optim, config.ppo.optim
    assert (sft.lr, sft.warmup, sft.b2, sft.b1) == (1e-4, 0.1, 0.99, 0.9)
    assert (reward.lr, reward.warmup, reward.b1) == (2e-4, 0.1, 0.7)
    assert (ppo.lr, ppo.warmup, ppo.b1) == (3e-4, 0.1, 0.5)
    assert config.ppo.prompts == config.reward.data
    assert (config.ppo.ptx.train, config.ppo.ptx.max_length) == ("a.jsonl", 8)


def test_merge_keys_at_the_top_and_in_weights(tmp_path):
    config = loaded(
        tmp_path,
        ".base: &base {seed: 3, run: a, sft: {epochs: 2.0, batch_size: 4}}\n.w: &w {a.jsonl: 1, b.jsonl: 2}\n"
        "<<: *base\nrun: b\nsft: {batch_size: 8, data: {train: {<<: *w, b.jsonl: 5, c.jsonl: 1}}}\n",
    )
    # A section is taken in as a whole, or not at all.
    assert (config.seed, config.run, config.sft.batch_size, config.sft.epochs) == (3, "b", 8, 1.0)
    assert config.sft.data.train == {"b.jsonl": 5, "c.jsonl": 1, "a.jsonl": 1}
    assert load_config(tmp_path / "config.yaml", {"run": ["c"]}).run == "c"


def test_mistakes_in_merged_keys_name_the_line_where_they_stand(tmp_path):
    text = ".o: &o {lrr: 1}\n.p: &p {lr: fast}\nsft:\n  optim: {<<: *o}\nreward: {optim: {<<: [*p]}}\n"
    first, second = refused(tmp_path, text)
    assert first.startswith("FILE:1: sft.optim.lrr: unknown key; did you mean")
    assert second == "FILE:2: reward.optim.lr: expected a finite number, got 'fast' (a string)"
    [said] = refused(tmp_path, "sft:\n  optim:\n    <<: [1]\n")
    assert said == "FILE:3: sft.optim: <<: expected a section of keys, or a list of them, to merge"
    [said] = refused(tmp_path, ".o: &o {lr: 1}\nsft:\n  optim:\n    <<: *o\n    <<: *o\n")
    assert said == "FILE:5: sft.optim: <<: set twice, first on line 4; list the mappings"
    assert refused(tmp_path, ".o: &o {lr: 1}\nsft: {optim: {<<: *o, lr: 2, lr: 3}}\n") == [
        "FILE:2: sft.optim.lr: set twice, first on line 2"
    ]
    [said] = refused(tmp_path, ".o: &o {lr: 1, lr: 2}\nsft: {optim: {<<: [*o]}}\n")
    assert said == "FILE:1: sft.optim.lr: set twice, first on line 1"
    assert refused(tmp_path, "sft: {optim: {'<<': {lr: 1}}}\n")[0].startswith("FILE:1: sft.optim.<<: unknown key")
    assert refused(tmp_path, "sft: {.x: 1}\n")[0].startswith("FILE:1: sft..x: unknown key")
    [said] = refused(tmp_path, "sft: {data: {train: {<<: a}}}\n")
    assert said.startswith("FILE:1: sft.data.train: <<: expected a section")


def test_aliases_of_aliases_end_soon(tmp_path):
    """Ten to the power of fifty mappings, and one that holds itself."""
    lines = [".a0: &a0 {lr: 1e-3}"]
    lines += [f".a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 51)]
    assert loaded(tmp_path, "\n".join([*lines, "sft: {optim: {<<: *a50}}"])).sft.optim.lr == 1e-3
    assert refused(tmp_path, "sft: {optim: &o {<<: *o}}\n") == ["FILE:1: sft.optim: <<: merges itself"]
    assert refused(tmp_path, ".a: &a {<<: &b {<<: *a}}\nsft: {optim: *b}\n") == ["FILE:1: sft.optim: <<: merges itself"]
    assert refused(tmp_path, "sft: &s {sft: *s}\n")[0].startswith("FILE:1: sft.sft: unknown key")
    bomb = [".a0: &b0 [x, x]", *(f".a{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, 30))]
    assert len(refused(tmp_path, "\n".join([*bomb, "sft: {gates: *b29}"]))) == 1
