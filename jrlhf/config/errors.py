"""What is raised for a config that cannot be run."""

import re

from jrlhf.system.errors import UsageError

LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""The user and password of a URL."""


class ConfigError(UsageError):
    """A config that cannot be run. Each line of the message begins with the place and path of one mistake.

    The user and password of a URL are left out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(LOGIN.sub("***@", message))
