"""The command line: what runs with which config, what is said on a mistake, and the exit codes."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest

from jrlhf import __version__
from jrlhf.cli import commands, entry, main
from jrlhf.cli.flags import PLAN_ONLY, sections
from jrlhf.config import Config, ConfigError, PlanConfig, SamplingConfig
from jrlhf.config.files import flag_types
from jrlhf.config.tools import (
    ExportConfig,
    GenerateConfig,
    QuickstartConfig,
    RankConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ShowConfig,
    VerifyConfig,
)
from jrlhf.runs.checkpoints import CheckpointError
from jrlhf.runs.lock import RunLocked
from jrlhf.train.guards import GuardStop

TOOLS = {
    "generate": GenerateConfig,
    "sample": SampleConfig,
    "rank": RankConfig,
    "score": ScoreConfig,
    "data show": ShowConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "quickstart": QuickstartConfig,
}
PLACES = dict.fromkeys(("sft", "reward", "dpo", "ppo", "grpo"), ("jrlhf.stages.run", "run_stage")) | {
    "pipeline": ("jrlhf.stages.pipeline", "run_pipeline"),
    "plan": ("jrlhf.plan", "run_plan"),
    "report": ("jrlhf.report", "run_report"),
    **{name: (f"jrlhf.tools.{name}", f"run_{name}") for name in ("export", "verify", "quickstart")},
    "generate": ("jrlhf.tools.inference", "run_generate"),
    "sample": ("jrlhf.tools.inference", "run_sample"),
    "rank": ("jrlhf.rank.run", "run_rank"),
    "score": ("jrlhf.tools.inference", "run_score"),
    "data show": ("jrlhf.tools.show", "run_show"),
    "export": ("jrlhf.tools.export", "run_export"),
    "verify": ("jrlhf.tools.verify", "run_verify"),
    "quickstart": ("jrlhf.tools.quickstart", "run_quickstart"),
}
DATA = {
    "sft": "sft.data.train",
    "reward": "reward.data.train",
    "dpo": "dpo.data.train",
    "ppo": "ppo.prompts.train",
    "grpo": "grpo.prompts.train",
}


@pytest.fixture
def stage(monkeypatch):
    """Puts a function in a command's place, and returns what that function is called with."""

    def put(command, effect=lambda: None):
        calls = []
        module, name = PLACES[command]

        def run(*args):
            calls.append(args)
            return effect()

        fake = types.ModuleType(module)
        vars(fake)[name] = run
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return put


def raising(error):
    def effect():
        raise error

    return effect


def errors(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_alone_it_prints_help_as_a_usage_error(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"\n  {name} " in err for name in commands())


def test_help_lists_every_command_with_one_line(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name:<12}{line}\n" in out for name, line in commands().items())
    assert "JRLHF_DEBUG" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jrlhf {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["pipelin"]) == 2
    assert errors(capsys) == ["jrlhf: pipelin: unknown command; did you mean pipeline?"]
    assert main(["data", "list"]) == 2
    assert errors(capsys) == ["jrlhf: data: unknown command; did you mean data show?"]


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command_shows_every_field(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main([command, "--help"]) == 0
    words = set(capsys.readouterr().out.replace("[--", "--").split())
    if command in TOOLS:
        shown = {name: f"--{name}" for name in flag_types(TOOLS[command])}
        shown |= {name: name.upper() for name in ("model", "prompts", "data", "run", "out") if f"--{name}" not in words}
        shown = {name: text for name, text in shown.items() if name in flag_types(TOOLS[command])}
    else:
        cls, parts = (
            (PlanConfig, (*PLAN_ONLY, *sections("pipeline"))) if command == "plan" else (Config, sections(command))
        )
        shown = {name: f"--{name}" for name in flag_types(cls) if name.split(".")[0] in parts}
        assert "--config" in words
        assert not [w for w in words if w.startswith("--") and "." in w and w.removeprefix("--") not in shown]
    assert not set(shown.values()) - words


def test_help_shows_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    main(["ppo", "--help"])
    out = capsys.readouterr().out
    assert "KL per sequence, in nats, that an adaptive β steers to" in out
    assert "(default: 10000)" in out
    assert "{k1,k2,k3}" in out


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_defaults_then_yaml_then_flags(command, stage, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: from-yaml\nseed: 5\n{command}:\n  optim: {{lr: 1e-4, b1: 0.8}}\n")
    calls = stage(command)
    flags = [f"--{command}.optim.lr", "3e-4", f"--{DATA[command]}=rows.jsonl", "--mesh.data", "-1"]
    assert main([command, "--config", str(path), *flags]) == 0
    [(_, config)] = calls
    part = {
        "sft": config.sft,
        "reward": config.reward,
        "dpo": config.dpo,
        "ppo": config.ppo,
        "grpo": config.grpo,
    }[command]
    assert (config.run, config.seed, config.mesh.data) == ("from-yaml", 5, -1)
    assert (part.optim.lr, part.optim.b1, part.epochs) == (3e-4, 0.8, {"ppo": 4}.get(command, 1.0))
    assert capsys.readouterr().out == f"{command} done: from-yaml/{command}/summary.json\n"


def test_pipeline_takes_the_flags_of_all_stages(stage, capsys):
    calls = stage("pipeline")
    assert main(["pipeline", "--run", "here", "--sft.epochs", "2", "--reward.epochs=3", "--ppo.epochs", "5"]) == 0
    [(config,)] = calls
    assert (config.run, config.sft.epochs, config.reward.epochs, config.ppo.epochs) == ("here", 2.0, 3.0, 5)


def test_a_plan_takes_a_recipe_its_flags_and_what_is_its_own(stage, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("run: from-yaml\nmesh: {fsdp: 4}\nsft: {batch_size: 8}\n")
    calls = stage("plan")
    flags = ["--topology", "v5p-128", "--mesh.fsdp", "64", "--completions=4", "--out", "plan.json"]
    assert main(["plan", "--config", str(path), *flags]) == 0
    [(config,)] = calls
    assert isinstance(config, PlanConfig)
    assert (config.topology, config.completions, config.out) == ("v5p-128", 4, "plan.json")
    assert (config.run, config.mesh.fsdp, config.sft.batch_size) == ("from-yaml", 64, 8)
    assert capsys.readouterr().out == ""
    assert main(["plan", "--completions", "1"]) == 2
    assert errors(capsys) == ["jrlhf: completions: must be 2 or more, got 1"]
    path.write_text("topology: v5p-128\n")
    assert main(["plan", "--config", str(path)]) == 2
    assert "topology" in errors(capsys)[0]


def test_tools_take_positionals_and_flags_in_any_order(stage):
    calls = stage("generate")
    argv = ["generate", "--sampling.stop", "a", "b", "--samples", "4", "m", "-", "--sampling.temperature=0"]
    assert main(argv) == 0
    assert calls == [(GenerateConfig("m", "-", samples=4, sampling=SamplingConfig(stop=("a", "b"), temperature=0.0)),)]
    calls = stage("sample")
    assert main(["sample", "m", "--prompts", "p.jsonl", "--samples", "3", "--out=t.jsonl"]) == 0
    assert calls == [(SampleConfig("m", "p.jsonl", samples=3, out="t.jsonl"),)]
    calls = stage("rank")
    assert main(["rank", "--report"]) == 0
    assert main(["rank", "--tasks", "t.jsonl", "--export", "r.jsonl", "--format=argilla"]) == 0
    assert calls == [(RankConfig(report=True),), (RankConfig("t.jsonl", export="r.jsonl", format="argilla"),)]
    calls = stage("score")
    assert main(["score", "--data", "d.csv", "m", "--batch-size", "8"]) == 0
    assert calls == [(ScoreConfig("m", "d.csv", batch_size=8),)]
    calls = stage("data show")
    assert main(["data", "show", "--data", "d.csv", "--model", "m", "--rows", "9", "--kind=reward"]) == 0
    assert calls == [(ShowConfig("m", "d.csv", rows=9, kind="reward"),)]
    calls = stage("export")
    assert main(["export", "runs/a", "out", "--stage", "reward"]) == 0
    assert calls == [(ExportConfig("runs/a", "out", stage="reward"),)]
    calls = stage("quickstart")
    assert main(["quickstart", "--out", "q", "--seed", "3", "--preset", "smoke"]) == 0
    assert calls == [(QuickstartConfig("q", 3, preset="smoke"),)]


def test_verify_s_verdict_is_the_exit_code(stage):
    stage("verify", lambda: True)
    assert main(["verify", "m"]) == 0
    stage("verify", lambda: False)
    assert main(["verify", "m"]) == 1


def test_a_switch_needs_no_value(stage):
    calls = stage("pipeline")
    main(["pipeline", "--ppo.whiten_rewards", "--sft.log.progress", "false", "--sft.model.remat=true", "--seed", "1"])
    [(config,)] = calls
    assert (config.ppo.whiten_rewards, config.sft.log.progress, config.sft.model.remat) == (True, False, True)
    main(["pipeline", "--sft.model.remat", "auto", "--ppo.model.remat", "--ppo.reward.remat", "false"])
    config = calls[1][0]
    assert (config.sft.model.remat, config.ppo.model.remat, config.ppo.reward.remat) == ("auto", True, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft", "--sft.optim.learning_rate", "1"],
         "--sft.optim.learning_rate: unknown flag; did you mean --sft.optim.lr?"),
        (["sft", "--lr=1"], "--lr: unknown flag; did you mean --sft.optim.lr?"),
        (["sft", "--confg", "a"], "--confg: unknown flag; did you mean --config?"),
        (["sft", "--zzz", "a"], "--zzz: unknown flag; jrlhf sft --help lists them"),
        (["sft", "-x"], "-x: unknown flag; jrlhf sft --help lists them"),
        (["sft", "--sft.optim", "1"], "--sft.optim: unknown flag"),
        (["sft", "--sft.model.zzz", "1"], "--sft.model.zzz: unknown flag; possible names: path, dtype, remat"),
        (["sft", "--seed"], "--seed: expected a value"),
        (["sft", "--seed", "--run", "a"], "--seed: expected a value"),
        (["sft", "--seed", "1.5"], "--seed: expected a whole number, got '1.5' (a number)"),
        (["sft", "--sft.train_on", "prompt"],
         "--sft.train_on: expected completion, assistant or all, got 'prompt' (a string)"),
        (["sft", "config.yaml"], "config.yaml: unexpected argument; write a value after its flag, as in --seed 1"),
        (["sft"], "sft.data.train: must be set, in the YAML (--config) or with --sft.data.train"),
        (["reward"], "reward.data.train: must be set, in the YAML (--config) or with --reward.data.train"),
        (["ppo", "--ppo.episodes", "10", "--ppo.minibatches", "3"],
         "ppo.minibatches: must be a divisor of ppo.episodes (10), got 3"),
        (["pipeline", "--config", "absent.yaml"], "absent.yaml: No such file or directory"),
        (["generate", "m"], "prompts: required; usage: jrlhf generate MODEL PROMPTS [--FLAG VALUE ...]"),
        (["generate", "m", "p", "q"], "q: unexpected"),
        (["generate", "m", "p", "--sampling.top_p", "2"], "sampling.top_p: must be above 0 and at most 1, got 2.0"),
        (["sample", "m", "p", "--samples", "10"], "samples: must be from 2 to 9, got 10"),
        (["rank", "--port", "70000"], "port: must be from 0 to 65535, got 70000"),
        (["rank", "--report", "--export", "a"], "report: must be set alone"),
        (["rank", "--format", "argilla"], "format: must be set with export or import_from"),
        (["verify", "m", "--temprature", "1"], "--temprature: unknown flag; did you mean --temperature?"),
        (["quickstart", "--preset", "ful"], "--preset: expected full or smoke, got 'ful' (a string)"),
    ],
)  # fmt: skip
def test_a_usage_error_is_one_line_and_exit_code_2(argv, message, stage, capsys):
    calls = stage(argv[0])
    assert main(argv) == 2
    [line] = errors(capsys)
    assert line.startswith(f"jrlhf: {message}")
    assert calls == []


def test_yaml_and_flag_errors_read_alike(stage, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("sft: {optim: {lr: fast}}")
    stage("sft")
    assert main(["sft", "--config", str(path)]) == 2
    assert main(["sft", "--sft.optim.lr", "fast"]) == 2
    in_yaml, in_flag = errors(capsys)
    assert in_yaml == f"jrlhf: {path}:1: sft.optim.lr: expected a finite number, got 'fast' (a string)"
    assert in_flag == "jrlhf: --sft.optim.lr: expected a finite number, got 'fast' (a string)"


@pytest.mark.parametrize(
    "error",
    [
        RunLocked("runs/a is in use by process 7"),
        ConfigError("runs/a is in use by process 7"),
        FileNotFoundError(2, "is in use by process 7", "runs/a"),
    ],
)
def test_what_the_user_can_put_right_is_exit_code_2(error, stage, capsys):
    stage("pipeline", raising(error))
    assert main(["pipeline"]) == 2
    [line] = errors(capsys)
    assert line.startswith("jrlhf: runs/a")


def test_a_value_error_that_jrlhf_raises_is_exit_code_2(stage, capsys):
    from jrlhf.parallel import make_mesh

    stage("pipeline", lambda: make_mesh(data=3, fsdp=5, tensor=7))
    assert main(["pipeline"]) == 2
    [line] = errors(capsys)
    assert "8" in line


@pytest.mark.parametrize(
    ("effect", "line"),
    [
        (raising(RuntimeError("out of memory\nlong story")), "jrlhf: pipeline failed: RuntimeError: out of memory"),
        (lambda: np.ones(3) + np.ones(4), "jrlhf: pipeline failed: ValueError: operands could not be broadcast"),
        (raising(FloatingPointError("step 3: loss not finite")), "jrlhf: pipeline failed: step 3"),
        (raising(CheckpointError("checkpoint runs/a/4 is damaged")), "jrlhf: pipeline failed: checkpoint runs/a/4"),
        (raising(GuardStop("step 3: kl guard")), "jrlhf: pipeline failed: step 3"),
        (raising(KeyError()), "jrlhf: pipeline failed: KeyError"),
    ],
)
def test_a_failure_is_exit_code_1_without_a_traceback(effect, line, stage, capsys):
    stage("pipeline", effect)
    assert main(["pipeline"]) == 1
    first, second = errors(capsys)
    assert first.startswith(line)
    assert second == "jrlhf: JRLHF_DEBUG=1 shows the traceback"


def test_debug_shows_the_traceback_and_keeps_the_exit_code(stage, capsys, monkeypatch):
    monkeypatch.setenv("JRLHF_DEBUG", "1")
    stage("pipeline", raising(ConfigError("a: b")))
    assert main(["pipeline"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("ConfigError: a: b\n")


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(stage, capsys):
    stage("pipeline", raising(KeyboardInterrupt("stopped at step 3 of 9")))
    assert main(["pipeline"]) == 130
    stage("generate", raising(KeyboardInterrupt()))
    assert main(["generate", "m", "p"]) == 130
    assert errors(capsys) == [
        "jrlhf: pipeline interrupted: stopped at step 3 of 9; the same command resumes it",
        "jrlhf: generate interrupted",
    ]


def python(*code: str, **options) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "JRLHF_DEBUG"}
    return subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, env=env, **options)


@pytest.mark.parametrize("argv", [["--help"], ["ppo", "--help"], ["sft", "--sft.optim.learning_rate", "1"]])
def test_jax_is_not_imported_to_read_arguments(argv):
    done = python(
        "import sys, jrlhf.cli",
        f"jrlhf.cli.main({argv})",
        "heavy = {'jax', 'numpy', 'flax', 'orbax', 'transformers', 'datasets'} & set(sys.modules)",
        "sys.exit(f'imported: {heavy}' if heavy else 0)",
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early_causes_no_noise():
    code = (
        "import sys, types, jrlhf.cli",
        "fake = types.ModuleType('jrlhf.tools.inference')",
        "fake.run_generate = lambda args: [print('x' * 1000) for _ in range(1000)]",
        "sys.modules['jrlhf.tools.inference'] = fake",
        "sys.exit(jrlhf.cli.main(['generate', 'm', 'p']))",
    )
    producer = subprocess.Popen(
        [sys.executable, "-c", "\n".join(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert producer.stdout is not None
    assert producer.stderr is not None
    with producer.stdout, producer.stderr:
        producer.stdout.readline()
        producer.stdout.close()
        assert producer.stderr.read() == ""
        assert producer.wait() == 1


def test_the_process_is_prepared_for_what_the_command_does(monkeypatch):
    """Only for commands that compute; huge pages for those that train."""
    done = []
    monkeypatch.setattr(entry, "keep_compiled_programs", lambda: done.append("programs"))
    monkeypatch.setattr(entry, "restart_with_huge_pages", lambda: done.append("pages"))
    monkeypatch.setattr(entry, "quiet_compiler", lambda: done.append("quiet"))
    for command in ([], ["--help"], ["data", "show"], ["export"]):
        entry.prepare_process(command)
    assert done == []
    entry.prepare_process(["generate", "--model", "x"])
    assert done == ["programs"]
    entry.prepare_process(["sft"])
    assert done == ["programs", "programs", "pages"]
    done.clear()
    entry.prepare_process(["plan"])
    assert done == ["quiet"]
