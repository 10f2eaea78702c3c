"""The errors that a user can cause. Each message is one line: what is wrong, where, and what would be right."""

import unicodedata
from collections.abc import Callable

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}     # categories: controls, invisible marks, half characters, line ends


def printable(text: str, keep: str = "", instead: Callable[[str], str] = lambda c: "\ufffd") -> str:
    """Return a text that a terminal can show: control characters, escape sequences and marks that turn the direction
    of writing are replaced, by U+FFFD unless `instead` says by what. Characters in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in UNSAFE else instead(c) for c in text)


class Error(Exception):
    """Something wrong with a file, a name, an index or a flag."""

    def __init__(self, message: str, limit: int = 400):
        """Make the message one line that a terminal can show, since it may hold names from a hostile file."""
        line = printable(message)
        super().__init__(line if len(line) <= limit else line[: limit - 3] + "...")


class Note(UserWarning):
    """A warning about something that is not an error; Python gets it by `warnings.warn`, the command line prints it."""


class FileError(Error):
    """A file that cannot be read or written, or is not what it should be."""


class GGUFError(FileError):
    """The model file is not what it should be."""


class UnknownName(Error, KeyError):
    """A name that matches no tensor; the message lists the closest ones."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class ActionError(Error):
    """An action that is impossible: a source of another shape, a position out of range; or one that never fired."""


def short(value: object) -> str:
    """A value in at most 60 characters, for one line of a message; NumPy's arrays and numbers as Python's."""
    size = getattr(value, "size", None)
    text = repr(value.tolist() if isinstance(size, int) and size < 60 and hasattr(value, "tolist") else value)
    return text if len(text) <= 60 else text[:57] + "..."
