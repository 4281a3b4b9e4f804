"""The pinned versions are within the ranges that the package asks for, whole, and free of addresses."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

PYTHONS = {"py311.txt": "3.11", "py312.txt": "3.12"}
UNPINNED = {"torch", "peft", "jrlhf"}
"""Of the tests alone, and with builds for every accelerator; and jrlhf's own extras."""


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def direct(python: str) -> list[Requirement]:
    """What pyproject.toml asks for, the tests' tools included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, project["dependencies"] + extras["rank"] + extras["rules"] + extras["test"])
    environment = {"python_version": python}
    return [need for need in asked if need.marker is None or need.marker.evaluate(environment)]


def test_every_supported_python_has_its_file() -> None:
    assert sorted(path.name for path in (ROOT / "constraints").iterdir()) == sorted(PYTHONS)


@pytest.mark.parametrize("name", PYTHONS)
def test_a_line_is_a_name_and_a_version(name: str) -> None:
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert f"pip install -c constraints/{name} -e ." in "\n".join(comments)
    assert not any("://" in line or "--" in line or "@" in line for line in lines)
    rest = lines[len(comments) :]
    assert [line for line in rest if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line)] == []
    assert list(pins(name)) == sorted(pins(name))
    assert len(pins(name)) == len(rest)


@pytest.mark.parametrize("name", PYTHONS)
def test_every_direct_dependency_is_pinned_within_its_range(name: str) -> None:
    pinned, needs = pins(name), direct(PYTHONS[name])
    assert len(needs) > 20
    wrong = [
        f"{need} is {pinned.get(canonicalize_name(need.name))}"
        for need in needs
        if need.name not in UNPINNED and not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"))
    ]
    assert wrong == []
    assert not UNPINNED & pinned.keys()


@pytest.mark.parametrize("name", PYTHONS)
def test_what_pinned_packages_need_is_pinned_too(name: str) -> None:
    """As far as the packages of this environment say so; extras of theirs apart."""
    pinned = pins(name)
    for package in pinned:
        try:
            needs = [Requirement(text) for text in requires(package) or []]
        except PackageNotFoundError:
            continue
        environment = {"python_version": PYTHONS[name], "extra": ""}
        needs = [need for need in needs if need.marker is None or need.marker.evaluate(environment)]
        assert [need.name for need in needs if canonicalize_name(need.name) not in pinned] == [], package
