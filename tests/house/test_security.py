"""What a stranger's file may not do: run code, read or write outside its folder, or take memory without bound."""

import ast
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jrlhf import assets
from jrlhf.cli import main
from jrlhf.config import Config, check
from jrlhf.models import load_pretrained
from jrlhf.runs.folder import open_stage
from tests.support import ROOT

FILES = sorted(path for part in ("jrlhf", "benchmarks", "scripts") for path in (ROOT / part).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    ("torch", "load"), ("os", "system"), ("os", "popen"), ("pandas", "read_pickle"), ("pd", "read_pickle"),
    ("yaml", "load_all"), ("yaml", "full_load"), ("yaml", "full_load_all"), ("yaml", "unsafe_load"),
    ("yaml", "unsafe_load_all"),
}  # fmt: skip
ONLY_FALSE = {"trust_remote_code", "allow_pickle", "shell"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def dangers(source: str) -> Iterator[str]:
    """What in a program could run code that a file holds, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                pairs = {(module, alias.name) for alias in names} & CALLS
                found = [module] if module.split(".")[0] in MODULES else [".".join(pair) for pair in pairs]
            case ast.Call():
                found = dangerous_call(node)
            case _:
                found = []
        yield from (f"{node.lineno}: {name}" for name in found)


def dangerous_call(call: ast.Call) -> list[str]:
    found = []
    match call.func:
        case ast.Name(id=name) if name in BUILTINS:
            found.append(name)
        case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in CALLS:
            found.append(f"{module}.{name}")
        case ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "compose" | "parse" | "scan"):
            loaders = [ast.unparse(word.value) for word in call.keywords if word.arg == "Loader"]
            loaders += [ast.unparse(value) for value in call.args[1:2]]
            if not SAFE_LOADERS.issuperset(loaders) or not loaders:
                found.append("yaml without a safe loader")
    asked = {str(word.arg): ast.unparse(word.value) for word in call.keywords}
    return found + [name for name, value in asked.items() if name in ONLY_FALSE and value != "False"]


def test_nothing_that_is_read_can_be_run() -> None:
    assert len(FILES) > 100
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text(encoding="utf-8"))) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_reader_sees_what_it_should() -> None:
    bad = """
import pickle
from joblib import load
import dill.source as source
from torch import load
torch.load(path)
np.load(path, allow_pickle=True)
yaml.load(text)
yaml.load(text, yaml.Loader)
yaml.load(text, Loader=loader)
yaml.unsafe_load(text)
eval("1")
exec(compile("1", "", "eval"))
subprocess.run("ls", shell=True)
AutoModel.from_pretrained(path, trust_remote_code=config.trust)
"""
    lines = {int(found.split(":")[0]) for found in dangers(bad)}
    assert lines == set(range(2, 16))
    good = "model.eval(); jit(f).lower(x).compile(); np.load(p); yaml.load(t, Loader=yaml.SafeLoader); f(shell=False)"
    assert list(dangers(good)) == []


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


Snapshot = dict[str, bytes]
Refused = Callable[..., str]


def snapshot(folder: Path) -> Snapshot:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What an attack would make."""
    return tmp_path / "canary"


@pytest.fixture
def refused(
    tmp_path: Path, canary: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """``(*argv) -> the line``: the command ends with exit code 2 and one line, and changes no file."""
    # What it warns of besides is its own.
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", True)
    for name in ("configuration_utils", "models.auto.tokenization_auto"):
        monkeypatch.setattr(logging.getLogger(f"transformers.{name}"), "disabled", True)

    def run(*argv: str) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        assert main(argv) == 2
        written, said = capfd.readouterr()
        assert written == ""
        [line] = said.splitlines()
        assert line.startswith("jrlhf: ")
        assert not canary.exists()
        assert snapshot(tmp_path) == before
        return line.removeprefix("jrlhf: ")

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be spoiled."""
    return Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]})
    )
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once"}\n')
    return path


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_canary_sings(canary: Path) -> None:
    pickle.loads(pickle.dumps(Touch(canary)))
    assert canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.safetensors"])
def test_pickled_weights_are_never_opened(
    name: str, model: Path, prompts: Path, canary: Path, refused: Refused
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Touch(canary)))
    assert name in refused("generate", str(model), str(prompts))
    # Nor when the file itself is named.
    assert name in refused("generate", str(model / name), str(prompts))


def test_code_beside_a_model_is_never_run(
    model: Path, data: Path, prompts: Path, canary: Path, refused: Refused
) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    remote = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    edit_json(model / "config.json", auto_map=remote)
    # Ours reads the weights by its own code, whatever the config names besides.
    before = snapshot(model)
    assert main(["generate", str(model), str(prompts), "--out", str(data), "--sampling.max_new_tokens", "2"]) == 0
    assert snapshot(model) == before
    assert not canary.exists()
    edit_json(model / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="model_type: 'evil'"):
        load_pretrained(model, dtype="float32")
    edit_json(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    assert "no tokenizer: " in refused("generate", str(model), str(prompts))
    assert "no tokenizer: " in refused("data", "show", str(model), str(data))


def test_a_yaml_tag_makes_no_object(tmp_path: Path, canary: Path, refused: Refused) -> None:
    path = tmp_path / "run.yaml"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"):
        path.write_text(f"run: !!python/{tag} ['{canary}']\n")
        assert refused("sft", "--config", str(path)).startswith(
            f"{path}:1: run: expected a string, got the tag !!python/"
        )


ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "builtins": "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('CANARY') }}",
    "attr": "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "changes": "{{ messages.append(1) }}",
}
WITHOUT_BOUND = {
    "loop": "{% for i in range(1000000000000) %}x{% endfor %}",
    "string": "{{ 'a' * 1000000000000000000 }}",
}
"""Loops in loops are not stopped: a template is a program that may take its time, but has nothing to take hold of."""


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("name", ESCAPES | WITHOUT_BOUND)
def test_a_template_stays_in_its_sandbox(
    name: str, place: str, model: Path, data: Path, canary: Path, refused: Refused
) -> None:
    template = (ESCAPES | WITHOUT_BOUND)[name].replace("CANARY", str(canary))
    if place == "tokenizer_config.json":
        edit_json(model / place, chat_template=template)
    else:
        (model / place).write_text(template)
    refuses = "the tokenizer's chat template refuses a question and its answer: "
    line = refused("data", "show", str(model), str(data))
    assert line.startswith(refuses)
    assert len(line) > len(refuses)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_template_that_calls_itself_is_refused(place: str, model: Path, data: Path) -> None:
    """In a process of its own: without stack, other libraries' hooks fail too, and pytest would count that."""
    template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    if place == "tokenizer_config.json":
        edit_json(model / place, chat_template=template)
    else:
        (model / place).write_text(template)
    command = [sys.executable, "-m", "jrlhf", "data", "show", str(model), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("jrlhf: ")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
    assert lines[0].startswith("jrlhf: the tokenizer's chat template refuses a question and its answer: ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_nested_too_deeply_is_named(file: str, model: Path, prompts: Path, refused: Refused) -> None:
    (model / file).write_text("[" * 200_000)
    assert str(model) in refused("generate", str(model), str(prompts))


NAMES = ["../run", "a/../../run", "..", "%2e%2e/run", "a/%2E%2e/run", "%2e%2e%2frun", ".%2e/run", "file:///etc/run"]


@pytest.mark.parametrize("name", [*NAMES, "a\0b"], ids=repr)
def test_a_run_is_where_its_name_says(
    name: str, tmp_path: Path, data: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    (inside / "run.yaml").write_text(f"run: {json.dumps(name)}\n")
    train = ("--sft.data.train", str(data), "--sft.model.path", "asset:stories260k")
    assert refused("sft", "--run", name, *train).startswith("run: must be ")
    assert refused("sft", "--config", "run.yaml", *train).startswith("run: must be ")
    assert refused("quickstart", "--out", name).startswith("out: must be ")


def test_a_percent_sign_is_a_percent_sign(tmp_path: Path) -> None:
    """Nothing else in a name is decoded."""
    for name in ("100%", "a%20b", "..a", "a..b", "%2e", "..."):
        config = Config(run=str(tmp_path / name))
        check(config)
        with open_stage(config, "sft") as folder:
            assert folder == tmp_path / name / "sft"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("100%", "a%20b", "..a", "a..b", "%2e", "..."))


LINKS = [
    "sft",
    "sft/hf",
    "sft/checkpoints",
    "sft/metrics.jsonl",
    "sft/.lock",
    "sft/checkpoints/3",
    "report.html",
]


@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
@pytest.mark.parametrize("place", LINKS)
def test_a_link_out_of_the_run_is_refused(
    place: str, target: str, tmp_path: Path, data: Path, refused: Refused
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    (outside / "folder").mkdir()
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside / target)
    command = "sft" if place.startswith("sft") else "pipeline"
    train = ("--sft.data.train", str(data), "--sft.model.path", "asset:stories260k")
    line = refused(command, "--run", str(tmp_path / "run"), *train)
    assert line == f"{link}: is a link out of the run, to {outside / target}; remove it, or choose another --run"


def test_the_run_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "sft").mkdir()
    (tmp_path / "disk" / "sft" / "hf").symlink_to(tmp_path / "disk" / "other")
    with open_stage(Config(run=str(tmp_path / "run")), "sft") as folder:
        assert (folder / "config.yaml").exists()
