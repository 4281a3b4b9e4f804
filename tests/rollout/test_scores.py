"""PPO on rules: alone, and beside a reward model."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import Config, ConfigError, DataConfig, ModelConfig, PlanConfig, PPOConfig, SamplingConfig, check
from jrlhf.config.rewards import (
    AnswerRuleConfig,
    BannedRuleConfig,
    EndpointRuleConfig,
    FunctionRuleConfig,
    JSONRuleConfig,
    LengthRuleConfig,
    MarkdownRuleConfig,
    RefusalRuleConfig,
    RepetitionRuleConfig,
    RequiredRuleConfig,
    RewardsConfig,
    RuleConfig,
    StopRuleConfig,
)
from jrlhf.data import DataError, load_tokenizer
from jrlhf.models import load_pretrained, reward_from_pretrained, save_reward_model
from jrlhf.plan.run import planned_target
from jrlhf.rollout import rules
from jrlhf.rollout import scores as rewards
from jrlhf.rollout.rules import Rule, columns_read, make_rules, start_rules
from jrlhf.rollout.sampling import texts_of
from jrlhf.rollout.scores import ensemble_score, weigh
from jrlhf.rules import EndpointError, Episode
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages import ppo
from jrlhf.stages.ppo import plan_ppo, run_ppo
from jrlhf.train.keys import stream_key
from jrlhf.train.signals import Interrupted
from jrlhf.types import Generation
from tests.support.runs import compare_runs, read_jsonl, small_config
from tests.support.short_model import SHORT_MODEL

LENGTH = LengthRuleConfig(weight=2.0, min=3, max=5)
RULES = RewardsConfig(model_weight=0.0, json=JSONRuleConfig(weight=1.0), length=LENGTH)


def rules_only(folder: Path, run: str, rewards: RewardsConfig, **changes: Any) -> Config:
    config = small_config(folder, run)
    policy = replace(config.ppo.model, path=SHORT_MODEL)
    return replace(config, ppo=replace(config.ppo, model=policy, rewards=rewards, ptx_coef=0.0, **changes))


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on rules alone: no reward stage, no reward model."""
    config = rules_only(tmp_path_factory.mktemp("rules"), "run", RULES)
    run_ppo(config)
    return config


def test_rules_alone_make_a_run(ruled: Config) -> None:
    folder = Path(ruled.run) / "ppo"
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "kl" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["reward/score_mean"] == pytest.approx(line["reward/rule/json"] + 2 * line["reward/rule/length"])
        assert "reward/model" not in line
    assert lines[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-4)  # the critic begins with 0 everywhere
    answers = read_jsonl(folder / "evals" / "000003.jsonl")
    for row in answers:
        length = row["length"]
        assert row["rule/length"] == pytest.approx(min(length / 3, 1.0, 5 / length))
        assert row["score"] == pytest.approx(row["rule/json"] + 2 * row["rule/length"])
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert after["eval/rule/length"] == pytest.approx(sum(row["rule/length"] for row in answers) / len(answers))
    first = read_jsonl(folder / "evals" / "000000.jsonl")
    for part, figure in (("score", "eval/win_rate"), ("rule/length", "eval/win_rate/rule/length")):
        pairs = [(row[part], before[part]) for row, before in zip(answers, first, strict=True)]
        wins = sum((now > then) + 0.5 * (now == then) for now, then in pairs)
        assert after[figure] == pytest.approx(wins / len(pairs)), figure


def test_broken_off_while_rules_score_it_ends_as_the_unbroken_run(
    ruled: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, asked = replace(ruled, run=str(tmp_path / "again")), 0

    def interrupting(*given: Any, **named: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:  # the held-out answers of the start, then the first and the second rollout
            signal.raise_signal(signal.SIGTERM)
        return start_rules(*given, **named)

    monkeypatch.setattr(rewards, "start_rules", interrupting)
    with pytest.raises(Interrupted, match="stopped at step 2 of 3"):
        run_ppo(again)
    monkeypatch.setattr(rewards, "start_rules", start_rules)
    run_ppo(again)
    compare_runs(Path(ruled.run) / "ppo", tmp_path / "again" / "ppo")


def test_a_rule_that_fails_or_hangs_is_named() -> None:
    episodes = [Episode({}, "a", 1, True)]

    def broken(episodes: Any) -> list[float]:
        raise KeyError("x")

    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.function: KeyError: 'x'"):
        start_rules([Rule("function", 1.0, broken)], episodes, timeout=60.0, stage="ppo")()
    never = Event()
    slow = Rule("function", 1.0, lambda episodes: [float(never.wait())])
    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.function: not done in 0\.01 s"):
        start_rules([slow], episodes, timeout=0.01, stage="ppo")()
    never.set()


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (RewardsConfig(model_weight=0.0), r"ppo\.rewards\.model_weight: must be above 0, because no rule"),
        (RewardsConfig(model_weight=-1.0), r"ppo\.rewards\.model_weight: must be 0"),
        (
            RewardsConfig(json=JSONRuleConfig(weight=-1.0)),
            r"ppo\.rewards\.json\.weight: must be 0 .*repetition, banned, or",
        ),
        (RewardsConfig(timeout=0.0), r"ppo\.rewards\.timeout: must be above 0"),
        (RewardsConfig(length=LengthRuleConfig(min=5, max=4)), r"ppo\.rewards\.length\.max: must be at least .*\(5\)"),
        (RewardsConfig(banned=BannedRuleConfig(patterns=("(",))), r"ppo\.rewards\.banned\.patterns: must be a regular"),
        (RewardsConfig(required=RequiredRuleConfig(weight=1.0)), r"ppo\.rewards\.required\.patterns: must be set"),
        (RewardsConfig(required=RequiredRuleConfig(match_timeout=0.0)), r"required\.match_timeout: must be above 0"),
        (RewardsConfig(repetition=RepetitionRuleConfig(n=0)), r"ppo\.rewards\.repetition\.n: must be 1"),
        (RewardsConfig(markdown=MarkdownRuleConfig(lists=-1)), r"ppo\.rewards\.markdown\.lists: must be 0"),
        (RewardsConfig(answer=AnswerRuleConfig(column="prompt")), r"ppo\.rewards\.answer\.column: must be a column"),
        (RewardsConfig(refusal=RefusalRuleConfig(benign_penalty=-1.0)), r"refusal\.benign_penalty: must be 0"),
        (
            RewardsConfig(function=FunctionRuleConfig(weight=1.0)),
            r"function\.path: must be module:function",
        ),
        (RewardsConfig(function=FunctionRuleConfig(path="a.b")), r"function\.path: must be module:function"),
        (RewardsConfig(endpoint=EndpointRuleConfig(weight=1.0)), r"ppo\.rewards\.endpoint\.url: must be an https"),
        (RewardsConfig(endpoint=EndpointRuleConfig(url="http://example.com/")), r"endpoint\.url: must be an https"),
        (RewardsConfig(endpoint=EndpointRuleConfig(url="https://me:pw@example.com/")), "without a user and password"),
        (RewardsConfig(endpoint=EndpointRuleConfig(batch_size=0)), r"endpoint\.batch_size: must be 1"),
        (RewardsConfig(models=("",)), r"ppo\.rewards\.models: must be paths"),
        (replace(RULES, models=("a",)), r"ppo\.rewards\.models: must be paths, with .*model_weight above 0"),
        (RewardsConfig(lower_bound_coef=-1.0), r"ppo\.rewards\.lower_bound_coef: must be 0"),
        (RewardsConfig(length=LengthRuleConfig(min=0)), r"ppo\.rewards\.length\.min: must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rewards: RewardsConfig, said: str) -> None:
    config = Config()
    with pytest.raises(ConfigError, match=said):
        check(replace(config, ppo=replace(config.ppo, rewards=rewards)))


def test_a_value_network_cannot_start_from_a_reward_model_that_is_not_there() -> None:
    config = Config()
    with pytest.raises(ConfigError, match=r"ppo\.value_from: must be auto or policy"):
        check(replace(config, ppo=replace(config.ppo, rewards=RULES, value_from="reward")))


def test_a_run_on_rules_can_be_planned() -> None:
    """There is no program for a reward model, nor are its weights held."""
    plan = PlanConfig(
        topology="cpu:8",
        ppo=PPOConfig(
            model=ModelConfig(path=SHORT_MODEL),
            prompts=DataConfig(max_length=16),
            sampling=SamplingConfig(max_new_tokens=8),
            episodes=16,
            rewards=RULES,
        ),
    )
    sized = plan_ppo(plan, planned_target(plan))
    names = [program.name for program in sized.build(1).programs]
    assert "scores" not in names
    assert {"rollout", "readings", "update"} <= set(names)


def scores_of(rewards: RewardsConfig, *episodes: Episode) -> dict[str, list[float]]:
    return start_rules(make_rules(rewards, stage="ppo"), episodes, timeout=60.0, stage="ppo")()


def test_every_rule_scores_by_its_settings() -> None:
    rewards = RewardsConfig(
        json=JSONRuleConfig(weight=1.0, fenced=True),
        markdown=MarkdownRuleConfig(weight=1.0, headings=1),
        length=LengthRuleConfig(weight=1.0, unit="words", min=4, max=5),
        stop=StopRuleConfig(weight=1.0),
        repetition=RepetitionRuleConfig(weight=1.0, n=1),
        banned=BannedRuleConfig(weight=1.0, patterns=("cat", "dog")),
        required=RequiredRuleConfig(weight=1.0, patterns=("cat",)),
        refusal=RefusalRuleConfig(weight=1.0, benign_penalty=0.5),
        answer=AnswerRuleConfig(weight=1.0),
    )
    row = {"prompt": "p", "answer": "#### 2", "refusal": True}
    good = Episode(row, "```json\n2\n```", 9, True)
    bad = Episode(row | {"refusal": False}, "# I cannot see: cat cat", 9, False)
    assert scores_of(rewards, good, bad) == {
        "json": [1.0, 0.0],
        "markdown": [0.5, 1.0],
        "length": [0.5, 1.0],
        "stop": [1.0, 0.0],
        "repetition": [0.0, -0.2],
        "banned": [0.0, -0.5],
        "required": [0.0, 1.0],
        "refusal": [0.0, -0.5],
        "answer": [1.0, 0.0],
    }


def test_every_rule_of_the_schema_is_made_and_each_can_be_used_alone() -> None:
    assert [rule.name for rule in make_rules(RewardsConfig(), stage="ppo")] == []
    for name, part in vars(RewardsConfig()).items():
        if isinstance(part, RuleConfig):
            made = make_rules(
                replace(RewardsConfig(), **{name: replace(part, weight=0.5, **NEEDED.get(name, {}))}), stage="ppo"
            )
            assert [(rule.name, rule.weight) for rule in made] == [(name, 0.5)]


NEEDED: dict[str, dict[str, Any]] = {"function": {"path": "json:dumps"}}


def test_an_answer_must_fit_the_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}')
    rewards = RewardsConfig(json=JSONRuleConfig(weight=1.0, schema=str(path)))
    texts = ['{"a": 1}', '{"a": "1"}', "{}", "3", "", '{"a": 1, "ü": null}']
    episodes = [Episode({}, text, 1, True) for text in texts]
    assert scores_of(rewards, *episodes)["json"] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    for text, said in [("{", "Expecting"), ('{"type": 3}', r"\$\.type: 3 is not"), (None, "No such file")]:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=rf"ppo\.rewards\.json\.schema: .*schema\.json: .*{said}"):
            make_rules(rewards, stage="ppo")


def test_a_schema_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text('{"$ref": "http://127.0.0.1:9/other.json"}')
    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.json: .*Unresolvable"):
        scores_of(RewardsConfig(json=JSONRuleConfig(weight=1.0, schema=str(path))), Episode({}, "1", 1, True))


def test_the_reference_comes_with_the_prompt_s_row(tmp_path: Path) -> None:
    """GSM8K's rows, right and wrong: the score of each held-out answer is that of its own reference."""
    rewards = RewardsConfig(model_weight=0.0, answer=AnswerRuleConfig(weight=1.0, column="solution", match="text"))
    config = rules_only(tmp_path, "run", rewards, iterations=1)
    source = tmp_path / "math.jsonl"
    rows = [{"prompt": f"What is {n} and {n}?", "solution": f"so ... #### {2 * n}"} for n in range(16)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = replace(config.ppo.prompts, train=str(source), eval=str(source))
    config = replace(config, ppo=replace(config.ppo, prompts=prompts))
    run_ppo(config)
    answers = read_jsonl(tmp_path / "run" / "ppo" / "evals" / "000000.jsonl")
    assert {row["rule/answer"] for row in answers} == {0.0}
    # The same draws, with what was answered as the reference of half the rows.
    for n, row in enumerate(answers):
        rows[n]["solution"] = f"#### {row['completion']}" if n % 2 and row["completion"].strip() else "#### other"
    right = [float(row["solution"] != "#### other") for row in rows]
    assert 0 < sum(right) <= 8
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ppo(replace(config, run=str(tmp_path / "again")))
    again = read_jsonl(tmp_path / "again" / "ppo" / "evals" / "000000.jsonl")
    assert [row["rule/answer"] for row in again] == right
    del rows[3]["solution"]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"math\.jsonl:4: solution: no such column, but a rule of ppo\.rewards reads"):
        run_ppo(replace(config, run=str(tmp_path / "third")))
    rows[3]["solution"] = None
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"math\.jsonl:4: solution: is empty \(null\), but a rule of ppo\.rewards reads"
    ):
        run_ppo(replace(config, run=str(tmp_path / "fourth")))


@pytest.mark.parametrize(
    ("rewards", "row", "said"),
    [
        (RewardsConfig(refusal=RefusalRuleConfig(weight=1.0)), {"refusal": "maybe"}, "column refusal .*got 'maybe'"),
        (RewardsConfig(answer=AnswerRuleConfig(weight=1.0)), {"answer": "abc"}, "column answer .*has no number"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named(rewards: RewardsConfig, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"ppo\.rewards\.\w+: {said}"):
        scores_of(rewards, Episode(row, "I cannot. 1", 1, True))


def test_the_networks_read_while_the_rules_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no reward model too: their work is handed out before a rule begins, and nobody waits for it."""
    order: list[str] = []
    make, start = ppo.jit_readings, rewards.start_rules

    def jit_readings(*args: Any, **kwargs: Any) -> Any:
        read = make(*args, **kwargs)
        return lambda *given: (order.append("read"), read(*given))[1]

    def starting(*args: Any, **kwargs: Any) -> Any:
        order.append("rules")
        return start(*args, **kwargs)

    monkeypatch.setattr(ppo, "jit_readings", jit_readings)
    monkeypatch.setattr(rewards, "start_rules", starting)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: (order.append("waited"), tree)[1])
    run_ppo(rules_only(tmp_path, "run", RULES, iterations=2))
    # Of every iteration; the rules score evaluations too.
    assert order.count("read") == 2
    assert all(order[at + 1] == "rules" for at, what in enumerate(order) if what == "read")
    assert "waited" in order


def test_the_rules_score_a_part_of_a_rollout_while_the_next_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts are handed out before a rule begins, the second part's rules wait for the networks' work to be so too;
    rows, draws and scores stay together."""
    told: list[str] = []
    parts: list[tuple[jax.Array, jax.Array, Generation]] = []
    rollouts: list[tuple[Generation, jax.Array]] = []
    make, start, targets = ppo.jit_generate, rewards.start_rules, ppo.jit_targets
    readings = ppo.jit_readings

    def jit_generate(*args: Any, **kwargs: Any) -> Any:
        draw = make(*args, **kwargs)

        def drawing(params: Any, tokens: Any, mask: Any, numbers: Any, key: Any) -> Generation:
            found = draw(params, tokens, mask, numbers, key)
            told.append(f"drawn {len(tokens)}")
            parts.append((key, numbers, found))
            return found

        return drawing

    def starting(rules: Any, episodes: Any, **kwargs: Any) -> Any:
        told.append(f"rules {len(episodes)}")
        return start(rules, episodes, **kwargs)

    def jit_readings(*args: Any, **kwargs: Any) -> Any:
        read = readings(*args, **kwargs)
        return lambda *given: (told.append("read"), read(*given))[1]

    def jit_targets(*args: Any, **kwargs: Any) -> Any:
        make_targets = targets(*args, **kwargs)
        return lambda *given: (rollouts.append((given[0].generation, given[0].scores)), make_targets(*given))[1]

    monkeypatch.setattr(ppo, "jit_generate", jit_generate)
    monkeypatch.setattr(rewards, "start_rules", starting)
    monkeypatch.setattr(ppo, "jit_readings", jit_readings)
    monkeypatch.setattr(ppo, "jit_targets", jit_targets)
    monkeypatch.setattr(
        rules, "load_function", lambda path: lambda completions, **_: [sum(map(ord, text)) for text in completions]
    )
    function = FunctionRuleConfig(weight=1.0, path="mine:letters")
    config = rules_only(
        tmp_path, "run", RewardsConfig(model_weight=0.0, function=function), iterations=2, rollout_parts=2
    )
    tokenizer = load_tokenizer(assets.resolve("asset:stories260k"))
    prompts = replace(config.ppo.prompts, eval="")
    run_ppo(replace(config, ppo=replace(config.ppo, prompts=prompts)))
    assert told == ["drawn 8", "drawn 8", "rules 8", "read", "rules 8"] * 2
    for number, (generation, scores) in enumerate(rollouts):
        sample_key, _ = jax.random.split(jax.random.fold_in(stream_key(config.seed, "ppo", "train"), number))
        (first_key, places, first), (second_key, further, second) = parts[2 * number : 2 * number + 2]
        assert first_key == second_key == sample_key
        assert np.concatenate([places, further]).tolist() == list(range(16)), "no prompt shares another's draws"
        for whole, *halves in zip(generation, first, second, strict=True):
            assert np.array_equal(whole, np.concatenate(halves))
        answers = [answer for _, answer in texts_of(tokenizer, generation)]
        assert len(set(answers)) > 8
        assert np.asarray(scores) == pytest.approx([sum(map(ord, answer)) for answer in answers])


def test_a_rule_scores_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the user's own is not called by two threads at once."""
    inside, most = [], []

    def slow(prompts: Any, completions: list[str]) -> list[float]:
        inside.append(1)
        most.append(len(inside))
        Event().wait(0.05)
        inside.pop()
        return [0.0] * len(completions)

    monkeypatch.setattr(rules, "load_function", lambda path: slow)
    made = make_rules(RewardsConfig(function=FunctionRuleConfig(weight=1.0, path="mine:slow")), stage="ppo")
    waits = [start_rules(made, [Episode({"prompt": "a"}, "b", 1, True)], timeout=60.0, stage="ppo") for _ in range(3)]
    assert [wait() for wait in waits] == [{"function": [0.0]}] * 3
    assert most == [1, 1, 1]


def test_answers_without_a_score_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails on every third request: no zero rewards, other answers learn, and the figures say so."""
    asked: list[int] = []

    def endpoint(url: str, episodes: Any, *, timeout: float, retries: int, deadline: float, limit: str) -> list[float]:
        asked.append(len(episodes))
        if len(asked) % 3 == 0:
            raise EndpointError("down")
        return [5.0] * len(episodes)

    monkeypatch.setattr(rules, "by_endpoint", endpoint)
    rule = EndpointRuleConfig(weight=1.0, url="https://localhost/", batch_size=4, on_failure="skip")
    config = rules_only(tmp_path, "run", RewardsConfig(model_weight=0.0, endpoint=rule))
    run_ppo(config)
    lines = [line for line in read_metrics(tmp_path / "run" / "ppo" / "metrics.jsonl") if "kl" in line]
    assert {line["reward/left_out"] for line in lines} <= {0.25, 0.5}
    assert all(line["reward/score_mean"] == line["reward/rule/endpoint"] == 5.0 for line in lines)
    answers = read_jsonl(tmp_path / "run" / "ppo" / "evals" / "000003.jsonl")
    assert {row["score"] for row in answers} == {5.0, None}
    assert all(row["score"] == row["rule/endpoint"] for row in answers)
    strict = RewardsConfig(endpoint=replace(rule, on_failure="error"))
    with pytest.raises(RuntimeError, match=r"ppo\.rewards\.endpoint: down"):
        scores_of(strict, *[Episode({}, "a", 1, True)] * 12)


def test_weighing_leaves_out_what_has_no_score() -> None:
    tokens = jnp.zeros((3, 2), jnp.int32)
    ones = jnp.ones((3, 2), bool)
    generation = Generation(tokens, ones, ones, jnp.zeros((3, 2), jnp.float32), jnp.ones(3, bool))
    nan = jnp.nan
    parts = {"model": jnp.asarray([1.0, 2.0, 3.0]), "rule/json": jnp.asarray([1.0, nan, 0.0])}
    scored = weigh(generation, parts, weights={"model": 2.0, "rule/json": 0.5})
    assert scored.scores.tolist() == [2.5, 0.0, 6.0]
    assert scored.generation.response_mask.all(axis=-1).tolist() == [True, False, True]
    nothing = weigh(generation, {"rule/json": jnp.full(3, nan)}, weights={"rule/json": 0.5})
    assert bool(jnp.isnan(nothing.scores).all())
    assert bool(nothing.generation.response_mask.all())


def test_a_function_s_mistake_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rewards_of_mine.py").write_text(
        "def right(prompts, completions, **columns): return [len(t) for t in columns['other']]\n"
        "def short(prompts, completions, **columns): return [1.0]\n"
        "def broken(prompts, completions, **columns): raise KeyError('x')\n"
    )
    episodes = [Episode({"prompt": "p", "other": "ab"}, "c", 1, True)] * 2

    def rewards(name: str) -> RewardsConfig:
        return RewardsConfig(function=FunctionRuleConfig(weight=1.0, path=f"rewards_of_mine:{name}"))

    assert columns_read(rewards("right"), stage="ppo").every
    assert scores_of(rewards("right"), *episodes) == {"function": [2.0, 2.0]}
    for name, said in [("short", "expected 2 numbers"), ("broken", "KeyError: 'x'")]:
        with pytest.raises(RuntimeError, match=rf"ppo\.rewards\.function: .*rewards_of_mine:{name}: .*{said}"):
            scores_of(rewards(name), *episodes)
    with pytest.raises(ConfigError, match=r"ppo\.rewards\.function\.path: rewards_of_mine:none: the module has no"):
        make_rules(rewards("none"), stage="ppo")


def test_disagreement_costs() -> None:
    scores = jnp.asarray([[1.0, 2.0], [3.0, 2.0]])
    assert ensemble_score(scores, coef=0.0).tolist() == [2.0, 2.0]
    assert ensemble_score(scores, coef=0.5).tolist() == [1.5, 2.0]


def test_reward_models_and_rules_add_up(tmp_path: Path) -> None:
    """Two models and a rule: each held-out score is what the three say, and the models are the ones asked for."""
    base = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32")
    for number in (1, 2):
        save_reward_model(reward_from_pretrained(base, jax.random.key(number)), tmp_path / f"reward{number}")
    paths = [str(tmp_path / "reward1"), str(tmp_path / "reward2")]

    def evaluated(run: str, first: str, rewards: RewardsConfig) -> list[dict]:
        config = rules_only(tmp_path, run, rewards, iterations=1)
        run_ppo(replace(config, ppo=replace(config.ppo, reward=ModelConfig(path=first))))
        return read_jsonl(tmp_path / run / "ppo" / "evals" / "000000.jsonl")

    # The first evaluation is of the same answers, whatever the reward.
    one, two = (evaluated(f"alone{i}", path, RewardsConfig()) for i, path in enumerate(paths))
    both = RewardsConfig(
        model_weight=2.0, models=(paths[1],), combine="lower_bound", lower_bound_coef=0.5, length=LENGTH
    )
    together = evaluated("both", paths[0], both)
    for a, b, row in zip(one, two, together, strict=True):
        assert a["completion"] == b["completion"] == row["completion"]
        scores = np.asarray([a["score"], b["score"]])
        assert scores.std() > 0
        assert row["model"] == pytest.approx(scores.mean() - 0.5 * scores.std(), abs=1e-5)
        assert row["score"] == pytest.approx(2 * row["model"] + 2 * row["rule/length"], abs=1e-5)
