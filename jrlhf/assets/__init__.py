"""Data that the package ships: a small pretrained model, human ratings of film reviews, and an opinion lexicon."""

from pathlib import Path

from jrlhf.system.errors import UsageError

_PREFIX = "asset:"
_FOLDER = Path(__file__).parent / "quickstart"


def names() -> list[str]:
    """Return the names of all assets, which are the shipped folders and .jsonl files."""
    return sorted(p.stem for p in _FOLDER.iterdir() if p.is_dir() or p.suffix == ".jsonl")


def resolve(path: str) -> str:
    """Return the path of the file or folder that ``asset:NAME`` names; return any other string unchanged.

    Raises ValueError with the known names for an unknown one.
    """
    if not path.startswith(_PREFIX):
        return path
    name = path.removeprefix(_PREFIX)
    if name not in names():
        raise UsageError(f"no asset {name!r}; there are: {', '.join(names())}")
    folder = _FOLDER / name
    return str(folder if folder.is_dir() else folder.with_suffix(".jsonl"))
