"""Exceptions of the package that a command turns into a message instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A file or a setting handed in from outside cannot be used.

    The message is one line that names the input, says what was expected and what came. The
    command line prints it to stderr and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
