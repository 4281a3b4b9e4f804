"""Checks that the wheel and the source archive hold what the checkout holds: ``archives.py WHEEL SDIST``."""

import subprocess
import sys
import tarfile
import zipfile

LARGEST = 2 * 2**20
"""Bytes of the largest file that either may hold: pictures and models beyond it belong elsewhere."""


def checkout() -> set[str]:
    """The files that git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return set(subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines())


def differences(name: str, archive: set[str], files: set[str]) -> list[str]:
    lines = [f"{name} lacks {path}" for path in sorted(files - archive)]
    return lines + [f"{name} holds {path}, which nobody asked for" for path in sorted(archive - files)]


def wheel_problems(path: str, files: set[str]) -> list[str]:
    """The package with its recipes, the licence, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    package = {path for path in sizes if ".dist-info/" not in path}
    expected = {path for path in files if path.startswith("jrlhf/")}
    expected |= {path.replace("configs/", "jrlhf/recipes/", 1) for path in files if path.startswith("configs/")}
    problems = differences("the wheel", package, expected)
    if not any(path.endswith(".dist-info/licenses/LICENSE") for path in sizes):
        problems.append("the wheel lacks LICENSE")
    return problems + [f"the wheel: {path} is too large" for path, size in sizes.items() if size > LARGEST]


def source_problems(path: str, files: set[str]) -> list[str]:
    """The whole checkout: tests, recipes, documents, benchmarks and the gate too."""
    with tarfile.open(path) as archive:
        sizes = {entry.name.split("/", 1)[1]: entry.size for entry in archive.getmembers() if entry.isfile()}
    problems = differences("the source archive", sizes.keys() - {"PKG-INFO"}, files)
    return problems + [f"the source archive: {path} is too large" for path, size in sizes.items() if size > LARGEST]


def main() -> None:
    wheel, source = sys.argv[1:]
    files = checkout()
    problems = wheel_problems(wheel, files) + source_problems(source, files)
    if problems:
        sys.exit("\n".join(problems))
    print(f"archives: {len(files)} files, as in the checkout")


if __name__ == "__main__":
    main()
