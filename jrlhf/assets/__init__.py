"""What is shipped with the package: a small pretrained model, human ratings of film reviews, an opinion lexicon."""

from pathlib import Path

from jrlhf.system.errors import UsageError

_PREFIX = "asset:"
_FOLDER = Path(__file__).parent / "quickstart"


def names() -> list[str]:
    """What ``asset:NAME`` may name: the folders and .jsonl files that are shipped."""
    return sorted(p.stem for p in _FOLDER.iterdir() if p.is_dir() or p.suffix == ".jsonl")


def resolve(path: str) -> str:
    """``asset:NAME`` becomes the path of a shipped file or folder; any other string comes back as it is.

    An unknown name is a UsageError that lists the known ones.
    """
    if not path.startswith(_PREFIX):
        return path
    name = path.removeprefix(_PREFIX)
    if name not in names():
        raise UsageError(f"no asset {name!r}; there are: {', '.join(names())}")
    folder = _FOLDER / name
    return str(folder if folder.is_dir() else folder.with_suffix(".jsonl"))
