"""What the README promises, run as it stands there."""

import re
from pathlib import Path

from jrlhf.cli import COMMANDS
from jrlhf.config import load_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_own_model_example_learns() -> None:
    """The example runs as printed, under strict promotion too, and PPO finds the rule's token."""
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    space: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert float(space["scores"].mean()) > 8.0  # of 16 tokens; a uniform sampler has 0.5


def test_every_config_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        path = tmp_path / "config.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path)


def test_every_command_has_a_row() -> None:
    rows = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    for command in COMMANDS:
        assert command in rows, command
