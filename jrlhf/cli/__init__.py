"""``jrlhf <command>``: YAML and flags in, one stage or tool out."""

from jrlhf.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
