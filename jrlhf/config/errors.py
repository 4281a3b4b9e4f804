"""Errors of a config. Imports no JAX."""

import re

from jrlhf.system.errors import UsageError

LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""User and password of a URL."""


class ConfigError(UsageError):
    """A config that cannot run. Each line of the message begins with the place and path of one mistake.

    A user and password in a URL are replaced by ``***``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(LOGIN.sub("***@", message))
