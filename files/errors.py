"""The errors that a user can cause; each is one line that says what, where and what would be right."""

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
        """Names from a hostile file may stand in the message: it stays one line that a terminal can show."""
        line = printable(message)
        super().__init__(line if len(line) <= limit else line[: limit - 3] + "...")


class Note(UserWarning):
    """What a user should know and what is no error; given by `warnings.warn`, and printed by the command line."""


class FileError(Error):
    """A file that cannot be read or written, or is not what it should be."""


class GGUFError(FileError):
    """The model file is not what it should be."""


class UnknownName(Error, KeyError):
    """A name that matches no tensor; the message lists the closest ones."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class ActionError(Error):
    """An action that cannot be done: a source of another shape, a position out of range, one that never fired."""


def short(value: object) -> str:
    """A value from a file, or from a caller, fit for one line of a message: arrays and their numbers as Python's."""
    size = getattr(value, "size", None)
    text = repr(value.tolist() if isinstance(size, int) and size < 60 and hasattr(value, "tolist") else value)
    return text if len(text) <= 60 else text[:57] + "..."
