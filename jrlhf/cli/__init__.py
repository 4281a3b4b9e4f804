"""Command line: ``jrlhf <command>`` reads YAML and flags and runs a stage or a tool."""

from jrlhf.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
