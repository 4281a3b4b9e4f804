"""What the README and docs/ say holds: code runs, configs load, commands and flags exist, links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jrlhf.cli import commands
from jrlhf.cli.dispatch import TOOLS
from jrlhf.cli.flags import PLAN_ONLY, read_flags, sections, stage_flags, tool_config
from jrlhf.config import Config, ConfigError, PlanConfig, check, load_config
from jrlhf.config.files import apply_flags, flag_types, schema
from tests.support import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "configs/launch/README.md")),
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
]
"""The pages whose links are followed."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SECTIONS = ("sft", "reward", "dpo", "ppo", "grpo", "mesh", "distributed", "safety")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language; those of commands have none."""
    return [code for tag, code in FENCE.findall(text_of(page)) if tag == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text_of(page))


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return [" ".join(span.split()).replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(page: Path) -> Iterator[str]:
    """The parts of shell lines, and inline code, that call jrlhf with arguments."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    for line in [*lines, *spans(page)]:
        for part in re.split(r"&&|;| \| ", line):
            words = shlex.split(part, comments=True) if part.strip().startswith("jrlhf ") else []
            if len(words) > 1 and words[1] != "COMMAND":
                yield shlex.join(words)


def parse(line: str) -> None:
    """ConfigError where a command does not exist, or does not know a flag or its value."""
    _, *words = shlex.split(line)
    command = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
    if command not in commands():
        raise ConfigError(f"{command}: unknown command")
    arguments = [word.strip("[]") for word in words[len(command.split()) :]]
    if not arguments or arguments == ["--help"]:
        return
    if command in TOOLS:
        tool_config(command, TOOLS[command], arguments)
        return
    config, parts = Config(), sections(command)
    if command == "plan":
        config, parts = PlanConfig(), (*PLAN_ONLY, *parts)
    flags = read_flags(command, arguments, stage_flags(type(config), parts))
    flags.pop("config", None)
    check(apply_flags(config, flags))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_own_model_example_learns() -> None:
    """The example runs as printed, under strict promotion too, and PPO finds the rule's token."""
    [code] = blocks(ROOT / "docs/own-model.md", "python")
    space: dict[str, Any] = {}
    exec(compile(code, "own-model.md", "exec"), space)
    assert float(space["scores"].mean()) > 8.0  # of 16 tokens; a uniform sampler has 0.5


def test_the_readme_example_learns() -> None:
    """It fits on a screen, and its loss is that of a bigram model that has learnt its rows."""
    [code] = blocks(README, "python")
    assert len(code.splitlines()) <= 25
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert float(space["metrics"]["loss"]) < 0.05  # ln 32 = 3.47 at first


def test_no_python_is_left_unread() -> None:
    """The two tests above run all Python that there is; another block needs a test that says what it must do."""
    pages = [name(page) for page in PAGES if blocks(page, "python")]
    assert pages == ["README.md", "docs/own-model.md"]
    assert {tag for page in PAGES for tag, _ in FENCE.findall(text_of(page))} == {"", "python", "yaml"}


@of_each([page for page in PAGES if blocks(page, "yaml")])
def test_every_yaml_block_is_a_config(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path)


@of_each(PAGES)
def test_every_command_line_can_be_read(page: Path) -> None:
    for line in command_lines(page):
        parse(line)


@pytest.mark.parametrize(
    "line",
    ["jrlhf frobnicate", "jrlhf sft --ppo.kl.coef 1", "jrlhf generate --modle m", "jrlhf ppo --ppo.kl.coef much"],
)
def test_a_wrong_command_line_would_be_seen(line: str) -> None:
    with pytest.raises(ConfigError):
        parse(line)


@of_each(PAGES)
def test_every_flag_and_key_exists(page: Path) -> None:
    """Also where it stands alone: `--accept_changes` of some command, `ppo.kl.coef` of the YAML."""
    known = {flag for cls in (PlanConfig, *TOOLS.values()) for flag in flag_types(cls)} | {"config", "help"}
    keys = schema(Config)
    for span in spans(page):
        if span.startswith("--"):
            for flag in re.findall(r"(?:^| )--([\w.]+)", span):
                assert flag in known, span
        if match := re.match(rf"(?:{'|'.join(SECTIONS)})(?:\.\w+)+(?=$|:)", span):
            assert match.group() in keys, span


@of_each(LINKING)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@of_each(PAGES)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"test_\w+\.py", span):
            assert [*(ROOT / "tests").rglob(span)], span


def test_every_page_is_in_both_lists() -> None:
    for page in PAGES[1:]:
        if page.name != "README.md":
            assert f"](docs/{page.name})" in text_of(README), page.name
            assert f"]({page.name})" in text_of(ROOT / "docs/README.md"), page.name


def test_every_command_has_a_row() -> None:
    rows = "\n".join(line for line in text_of(ROOT / "docs/commands.md").splitlines() if line.startswith("|"))
    for command in commands():
        assert f"`jrlhf {command}" in rows, command


def test_every_folder_has_a_floor() -> None:
    page = text_of(ROOT / "docs/architecture.md")
    folders = [folder for folder in (ROOT / "jrlhf").iterdir() if [*folder.glob("*.py")]]
    assert [folder.name for folder in folders if f"`{folder.name}/`" not in page] == []


@of_each(PAGES)
def test_the_package_is_not_taken_from_an_index(page: Path) -> None:
    """There it could be anyone's: jrlhf comes from a checkout or from a wheel that was built from one."""
    for line in re.findall(r"pip install[^`&\n]*", text_of(page)):
        packages = [word.strip("\"'") for word in line.split()[2:]]
        assert not [word for word in packages if re.fullmatch(r"jrlhf(\[.*\])?", word)], line
