"""Errors that a user can put right. Imports no JAX."""

import re

LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""User and password of a URL."""


class ConfigError(ValueError):
    """A config that cannot run. Each line of the message begins with the place and path of one mistake.

    A user and password in a URL are replaced by ``***``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(LOGIN.sub("***@", message))
