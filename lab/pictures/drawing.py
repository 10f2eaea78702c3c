"""Help for every picture that matplotlib draws: the check that it is installed, and texts that its font can show."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tinymia_files import Error, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need_matplotlib(where: str = "") -> None:
    """Raise Error if matplotlib is not installed; `where` names the flag and the file that need it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Error(f"{where}{': ' if where else ''}drawing needs matplotlib: pip install 'tinymia[lab]'")


def write_png(path: str | os.PathLike[str], make: Callable[[], Figure]) -> None:
    """Write the figure that `make` returns as a PNG, completely or not at all. Raises Error without matplotlib."""
    need_matplotlib(os.fspath(path))
    figure = make()
    write_atomic(os.fspath(path), lambda file: figure.savefig(file, format="png"))


def drawable(texts: Sequence[str], most: int = 14) -> list[str]:
    """Texts as the font can show them: line ends as arrows, long ones cut, missing letters as their code points."""
    from matplotlib.font_manager import findfont, get_font

    font, labels = get_font(findfont("monospace")), []
    for text in texts:
        text = text.translate({ord("\n"): "↵", ord("\t"): "⇥"})
        text = "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
        labels.append(text if len(text) <= most else text[: most - 1] + "…")
    return labels
