"""Text for the terminal: whether it has colours, the width of a text, tokens with visible spaces, tables."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tinymia import Error, Note
from tinymia_files import note, printable

from ..runs.streams import is_terminal

WIDE = 120  # columns if stdout is not a terminal


def screen() -> tuple[int, bool]:
    """The columns of stdout, and whether to use colours: on a terminal, unless NO_COLOR is set (no-color.org)."""
    colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return shutil.get_terminal_size((WIDE, 24)).columns, colour


@contextmanager
def notes() -> Iterator[None]:
    """Print the engine's Notes as lines on stderr, `note: ...`, each once."""
    said = set[str]()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Any, category: Any, *where: Any, **more: Any) -> None:
            line = str(Error(str(message), limit=1000))     # one line, without escape sequences
            if not issubclass(category, Note):
                show(message, category, *where, **more)
            elif line not in said:
                said.add(line)
                note(f"note: {line}")

        warnings.simplefilter("always", Note)
        warnings.showwarning = tell
        yield


def visible(text: str) -> str:
    """A token made visible: spaces in front as ▁, line ends and tabs as arrows, unprintable characters as U+FFFD."""
    rest = text.lstrip(" ").translate({ord("\n"): "↵", ord("\t"): "⇥"})
    return "▁" * (len(text) - len(rest)) + "".join(c if c.isprintable() else "\ufffd" for c in rest)


def wide(text: str) -> int:
    """The columns that a text takes: none for a combining mark, two for an East Asian wide letter."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int) -> str:
    """A text cut, or filled with spaces, to `width` columns."""
    if wide(text) > width:
        while text and wide(text) > width - 1:
            text = text[:-1]
        text += "…"[:width]
    return text + " " * (width - wide(text))


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign; zero, also after rounding, is +0.0000, never -0.0000."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text.replace("-", "+")


def fixed(value: float, digits: int = 2) -> str:
    """A number with so many decimal places; zero, also after rounding, is 0.00, never -0.00."""
    text = f"{value:.{digits}f}"
    return text if float(text) else text.replace("-", "")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """A table of left-aligned columns; each row is one line, even if a cell holds line ends."""
    text = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(wide, column)) for column in zip(*text)]
    return "\n".join("  ".join(fit(cell, w) for cell, w in zip(row, widths)).rstrip() for row in text)
