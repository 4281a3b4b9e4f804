"""Prompts that hold what other readers take for the end of a line, through every command that writes or reads files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jrlhf.cli import main
from jrlhf.config import Config, to_yaml
from jrlhf.config.watch import SafetyConfig
from jrlhf.rank import read_tasks
from jrlhf.rank.store import Decision, Store
from jrlhf.system.lines import read_json_lines
from tests.support.runs import small_config

PROMPTS = [f"Once{separator}upon" for separator in ("\u2028", "\x85", "\u2029", "\r", "\x0b", "\x1c")]


def written(path: Path, rows: list[dict]) -> str:
    """Raw, as other programs write them."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A few steps of each stage, on texts with separators; SFT and PPO have been run, PPO in two goes."""
    folder = tmp_path_factory.mktemp("separators")
    config = small_config(folder, "run")
    prompts = written(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    answers = written(folder / "sft.jsonl", [{"prompt": p, "completion": f" a{p}"} for p in PROMPTS * 4])
    rankings = [{"prompt": p, "chosen": " a dog" + p, "rejected": " a" + p} for p in PROMPTS * 4]
    safety = written(folder / "safety.jsonl", [{"prompt": p, "refusal": True} for p in PROMPTS])
    ranked = written(folder / "rankings.jsonl", rankings)
    log = replace(config.sft.log, eval_every=1, samples=6)
    config = replace(
        config,
        sft=replace(
            config.sft,
            data=replace(config.sft.data, train=answers, eval=answers),
            epochs=1.0,
            candidate_prompts=prompts,
            log=log,
        ),
        reward=replace(config.reward, data=replace(config.reward.data, train=ranked, eval=ranked), epochs=1.0, log=log),
        ppo=replace(
            config.ppo,
            prompts=replace(config.ppo.prompts, train=prompts, eval=prompts),
            iterations=1,
            ptx_coef=0.0,
            log=log,
        ),
        safety=SafetyConfig(prompts=safety, patterns=("zzz",)),
    )
    path = folder / "pipeline.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert main(["pipeline", "--config", str(path)]) == 0
    return config


def test_every_file_of_a_run_is_read_back(config: Config) -> None:
    """By ``splitlines`` too."""
    run = Path(config.run)
    files = [path for path in run.rglob("*.jsonl") if "hf" not in path.parts]
    names = {str(path.relative_to(run)) for path in files}
    expected = {f"{s}/metrics.jsonl" for s in ("sft", "reward", "ppo")} | {"sft/samples.jsonl", "sft/candidates.jsonl"}
    assert names >= expected | {"ppo/evals/000000.jsonl", "ppo/evals/000001.jsonl", "sft/safety/000000.jsonl"}
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == read_json_lines(path), path
    for name in ("sft/candidates.jsonl", "ppo/evals/000000.jsonl"):
        assert [row["prompt"] for row in read_json_lines(run / name)] == PROMPTS
    assert "\u2028" not in (run / "report.html").read_text("utf-8") or main(["report", str(run)]) == 0


def test_a_run_goes_on_from_what_it_wrote(config: Config, tmp_path: Path) -> None:
    """PPO reads its first answers again at every evaluation, also where an earlier version wrote them raw."""
    run = Path(config.run)
    for path in (run / "ppo" / "evals").glob("*.jsonl"):
        written(path, read_json_lines(path))
    written(run / "sft" / "samples.jsonl", read_json_lines(run / "sft" / "samples.jsonl"))
    for stage in ("sft", "ppo"):
        (run / stage / "summary.json").unlink()
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert main(["pipeline", "--config", str(path)]) == 0
    assert main(["report", str(run)]) == 0
    samples = read_json_lines(run / "sft" / "samples.jsonl")
    assert [row["prompt"] for row in samples if row["step"] == 0] == PROMPTS


def test_answers_tasks_rankings_and_scores(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, prompts = config.run, config.sft.candidate_prompts
    drawn, tasks = tmp_path / "drawn.jsonl", tmp_path / "tasks.jsonl"
    few = ["--sampling.max_new_tokens", "4"]
    assert main(["generate", run, prompts, "--out", str(drawn), *few]) == 0
    assert [row["prompt"] for row in read_json_lines(drawn)] == PROMPTS
    assert main(["sample", run, prompts, "--out", str(tasks), *few, "--samples", "3"]) == 0
    file = read_tasks(tasks)
    assert [task.prompt for task in file.tasks] == PROMPTS
    store = Store(tmp_path / "tasks.sqlite")
    store.add(*(Decision("ann", t.key, "rank", tuple(range(len(t.completions))), note="a\u2028b") for t in file.tasks))
    store.close()
    for form in ("ranking", "argilla", "label-studio"):
        exported = tmp_path / f"{form}.json"
        assert main(["rank", "--tasks", str(tasks), "--export", str(exported), "--format", form]) == 0
        state = ["--state", str(tmp_path / f"{form}.sqlite")]
        assert main(["rank", "--tasks", str(tasks), *state, "--import_from", str(exported), "--format", form]) == 0
        other = Store(tmp_path / f"{form}.sqlite")
        assert len(list(other.standing())) == len(PROMPTS)
        other.close()
    assert [row["prompt"] for row in read_json_lines(tmp_path / "ranking.json")] == PROMPTS
    capsys.readouterr()
    assert main(["score", run, str(tmp_path / "ranking.json")]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(row["prompt"] for row in scored)) == PROMPTS
    assert main(["data", "show", run, config.sft.data.train if isinstance(config.sft.data.train, str) else ""]) == 0
