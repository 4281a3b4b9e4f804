"""The comparison of algorithms and the task of benchmarks/people.py, without a run."""

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import pytest

from jrlhf.config import load_config
from tests.support import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


FACTS = {"name": "Ada Berg", "age": 34, "city": "Oslo"}
RIGHT = '{"name": "Ada Berg", "age": 34, "city": "Oslo"}'


@pytest.mark.parametrize(
    ("completion", "met"),
    [
        (RIGHT, [1, 1, 1, 1, 1, 1]),
        (f"\n{RIGHT} ", [1, 1, 1, 1, 1, 1]),
        (f"```json\n{RIGHT}\n```", [0, 0, 1, 1, 1, 1]),
        (f"{RIGHT} I hope this helps.", [1, 0, 1, 1, 1, 1]),
        (RIGHT.replace("34", '"34"'), [1, 1, 1, 0, 1, 1]),
        (RIGHT.replace("34", "34.0"), [1, 1, 1, 0, 1, 1]),
        (RIGHT.replace("34", "true"), [1, 1, 1, 0, 1, 1]),
        (RIGHT.replace("Oslo", "Rome"), [1, 1, 1, 1, 0, 1]),
        (RIGHT.replace("}", ', "country": "Norway"}'), [1, 1, 1, 1, 1, 0]),
        ('{"name": "Ada Berg"}', [1, 1, 1, 0, 0, 1]),
        (RIGHT[:-1], [1, 0, 0, 0, 0, 0]),
        ('[{"name": "Ada Berg"}]', [0, 1, 1, 0, 0, 1]),
        ('"Ada Berg"', [0, 1, 0, 0, 0, 0]),
        ("{}", [1, 1, 0, 0, 0, 0]),
        ("", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_an_answer_gets_a_mark_for_each_demand_that_it_meets(completion: str, met: list[int]) -> None:
    people = module("people")
    assert people.marks(completion, FACTS) == [bool(mark) for mark in met]
    columns = {name: [value] for name, value in FACTS.items()}
    assert people.reward(["?"], [completion], **columns) == [sum(met) / 6]


def test_no_word_of_a_held_out_prompt_is_in_one_to_train_on() -> None:
    people = module("people")
    train, heldout = (people.rows(300, heldout=held, seed=held) for held in (False, True))
    words = [{w for row in rows for w in (*row["name"].split(), row["city"])} for rows in (train, heldout)]
    assert not words[0] & words[1]
    for rows in (train, heldout):
        assert len({json.dumps(row) for row in rows}) == 300
        for row in rows:
            question = row["prompt"][-1]["content"]
            assert all(str(row[key]) in question for key in people.KEYS)
    assert train == people.rows(300, heldout=False, seed=0)


def test_the_recipe_for_json_is_a_config(tmp_path: Path) -> None:
    smollm2_json = module("smollm2_json")
    text = smollm2_json.RECIPE.format(out=tmp_path, iterations=3, lr=1e-4, dtype="bfloat16")
    (tmp_path / "recipe.yaml").write_text(text)
    grpo = load_config(tmp_path / "recipe.yaml").grpo
    assert (grpo.iterations, grpo.optim.lr, grpo.rewards.function.path) == (3, 1e-4, "people:reward")
    figures = smollm2_json.rates([RIGHT, "{}", RIGHT], [FACTS] * 3)
    assert figures == {"rate": pytest.approx(2 / 3), "marks": pytest.approx((1 + 2 / 6 + 1) / 3)}


def test_each_method_is_the_quick_start_with_its_own_settings(tmp_path: Path) -> None:
    methods = module("algorithm_methods")
    configs = {name: methods.method_config(tmp_path, name, 3, name, lr=2.0) for name in methods.METHODS}
    assert {config.seed for config in configs.values()} == {3}
    assert configs["PPO"].ppo.optim.lr == configs["GRPO"].grpo.optim.lr == pytest.approx(3e-4)
    assert configs["PPO, shared critic"].ppo.value_from == "shared"
    assert (configs["RLOO"].grpo.baseline, configs["RLOO"].grpo.kl.place) == ("leave_one_out", "reward")
    assert (configs["Dr. GRPO"].grpo.aggregation, configs["Dr. GRPO"].grpo.has_reference) == ("constant", False)
    assert (configs["DPO"].dpo.loss, configs["SimPO"].dpo.loss) == ("sigmoid", "simpo")


def test_a_run_ends_where_its_time_is_spent() -> None:
    run, clock = module("algorithm_run"), SimpleNamespace(now=0.0)
    watch = run.Watch(12.0, lambda: lambda state, step: {"gold": 10.0 * step}, reading=1.0, clock=lambda: clock.now)
    state = jnp.zeros(())
    watch(run.Event("begin", 0, state, {}))
    # The first step compiles two programs, and those of the first evaluation, after step 3, count as step 4's.
    times = [(9.0, 2), (1.0, 2), (1.0, 2), (7.0, 5), (3.0, 5), (3.0, 5), (1.0, 5)]

    def train() -> None:
        for step, (seconds, programs) in enumerate(times, 1):
            clock.now += seconds
            watch(run.Event("step", step, state, {"length/tokens": jnp.float32(40.0)}))
            clock.now += 100.0  # the log and the evaluation
            watch(run.Event("line", step, state, {"compile/programs": programs}))

    with pytest.raises(run.Spent):
        train()
    got = watch.summary()
    # With a step for the reading: 4 steps of 1 s are a third, 6 of 5/3 s are two thirds, and 7 of 2 s are all.
    assert [point["step"] for point in got["points"]] == [3, 5, 6]
    assert got["cpu_seconds"] == pytest.approx(14.0)
    assert (got["steps"], got["measured_steps"], got["tokens_per_cpu_second"]) == (6, 4, 20.0)


def test_a_result_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    algorithms = module("algorithms")
    line = {"work": {"method": "PPO", "seed": 0}, "points": []}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert algorithms.Results(tmp_path).get(method="PPO", seed=0) == line


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    page = module("algorithm_page")
    final = {"reward": 2.0, "kl": 4.0, "gold": 1.0, "distinct2": 0.8, "entropy": 2.0, "length": 50.0}
    runs = [
        {
            "work": {"method": "GRPO", "seed": seed},
            "points": [final | {"gold": 9.0}, final | {"gold": gold}],
            "cpu_seconds": 30.0,
            "steps": 10,
            "tokens_per_cpu_second": 1234.4,
            "peak_mb": 300,
        }
        for seed, gold in enumerate((1.0, 3.0))
    ]
    best = {str(n): {"reward": 1.0, "kl": 0.6, "gold": 0.5, "distinct2": 0.9, "length": 50.0} for n in (4, 16)}
    runs.append({"work": {"method": "best of n", "seed": 0}, "sft": final | {"kl": 0.3}, "best": best})
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in page.table(runs).splitlines()[2:]}
    assert rows["GRPO"][:4] == ["2", "2.00 ± 1.41", "2.00 ± 0.00", "4.0 ± 0.0"]
    assert rows["GRPO"][6:] == ["50.0 ± 0.0", "30", "10", "1,234", "300 |"]
    assert rows["SFT"][:4] == ["1", "1.00", "2.00", "0.0"]
    assert rows["best of 16"][1] == "0.50"
    assert [*rows] == ["SFT", "best of 4", "best of 16", "GRPO"]
