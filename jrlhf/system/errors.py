"""Errors that a user can put right, apart from failures of the program, and how both are told."""

from json import JSONDecodeError


class UsageError(ValueError):
    """An input that jrlhf cannot work with: a setting, a file, a folder. The message says what to change."""


class RunError(RuntimeError):
    """A run or a command that cannot go on, for a reason that jrlhf knows. The message says all."""


USAGE_ERRORS = (UsageError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""The errors on which the command line ends with exit code 2, without a traceback.

Any other ValueError, as from inside a library or an array operation, is a failure of the program: exit code 1.
"""

PLAIN_ERRORS = (*USAGE_ERRORS, RunError, FloatingPointError, TimeoutError, JSONDecodeError)
"""The errors whose message says all without the name of their class."""


def reason_of(error: BaseException) -> str:
    """Return the reason of a failure: the message, after the name of the class if the message alone may say too little.

    The message of an error about a file begins with the file.
    """
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error)
    name = type(error).__name__
    if not message:
        return name
    return message if isinstance(error, PLAIN_ERRORS) else f"{name}: {message}"
