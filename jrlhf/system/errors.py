"""Errors that a user can put right, apart from failures of the program."""


class UsageError(ValueError):
    """An input that jrlhf cannot work with: a setting, a file, a folder. The message says what to change."""


USAGE_ERRORS = (UsageError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""The errors on which the command line ends with exit code 2, without a traceback.

Any other ValueError, as from inside a library or an array operation, is a failure of the program: exit code 1.
"""
