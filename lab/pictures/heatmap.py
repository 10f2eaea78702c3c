"""A grid of numbers as colours and texts: in the terminal and in a page (heatmap_png.py draws it as a PNG)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tinymia_files import Error, printable

from .colours import ink, rgb
from .terminal import fit, visible, wide

CELL = 12       # the most columns of a terminal for the text of a cell
LABEL = 14      # the most columns for the label of a row


@dataclass(frozen=True)
class Heatmap:
    """Rows and columns with names, and one number per cell; NaN is an empty cell."""

    values: np.ndarray                              # float [n_rows, n_cols]
    rows: Sequence[str]                             # labels, [n_rows]
    columns: Sequence[str]                          # [n_cols]
    title: str
    x: str                                          # what the columns are, such as position
    y: str                                          # what the rows are, such as layer
    unit: str                                       # what the colour means
    texts: Sequence[Sequence[str]] | None = None    # the texts of the cells; None: the numbers
    hovers: Sequence[Sequence[str]] | None = None   # shown when a cell is pointed at; may have several lines
    links: Sequence[Sequence[str]] | None = None    # links of the cells in a page; "": none
    diverging: bool = False                         # colours around 0
    limits: tuple[float, float] | None = None       # numbers of the first and last colour; None: those of the cells
    upward: bool = False                            # the first row is drawn at the bottom

    def __post_init__(self) -> None:
        for grid in (self.values, self.texts, self.hovers, self.links):
            if grid is not None and {len(self.rows)} | {len(row) for row in grid} != {len(grid), len(self.columns)}:
                raise Error(f"heatmap {self.title!r}: [{len(self.rows)}, {len(self.columns)}] cells do not fit")
        for name in ("title", "x", "y", "unit"):    # they may quote a prompt, a piece, a model's name
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def corner(self) -> str:
        """The text over the rows' labels: the name of the rows and, if columns are numbers, that of the columns."""
        return f"{self.y} \\ {self.x}" if all(c.isdecimal() for c in self.columns) else self.y

    @property
    def order(self) -> range:
        """Indices of the rows from the top of the picture down."""
        n = len(self.rows)
        return range(n - 1, -1, -1) if self.upward else range(n)

    @property
    def span(self) -> tuple[float, float]:
        """The numbers of the first and of the last colour."""
        if self.limits is not None:
            return self.limits
        found = self.values[np.isfinite(self.values)]
        if not found.size:
            return (-1.0, 1.0) if self.diverging else (0.0, 1.0)
        most = float(np.abs(found).max()) or 1.0
        return (-most, most) if self.diverging else (float(found.min()), float(found.max()))

    def colours(self) -> np.ndarray:
        """Colours of the cells: uint8 [n_rows, n_cols, 3]."""
        return rgb(self.values, *self.span, self.diverging)

    def text(self, row: int, column: int) -> str:
        """The text in a cell."""
        if self.texts is not None:
            return visible(self.texts[row][column])
        return number(self.values[row, column], max(map(abs, self.span)))

    def hover(self, row: int, column: int) -> str:
        """The text that is shown when a cell is pointed at."""
        if self.hovers is not None:
            return self.hovers[row][column]
        return (f"{self.y} {visible(self.rows[row])}, {self.x} {visible(self.columns[column])}\n"
                f"{self.unit} {self.values[row, column]:.4g}")

    def terminal(self, width: int, colour: bool) -> str:
        """The heatmap as lines of up to `width` letters; columns that do not fit are put below the others."""
        edge = max(min(max([wide(visible(r)) for r in self.rows], default=0), LABEL), wide(self.corner))
        texts = [[self.text(i, j) for j in range(len(self.columns))] for i in range(len(self.rows))]
        widths = [min(max([wide(visible(c)), *(wide(row[j]) for row in texts)]), CELL)
                  for j, c in enumerate(self.columns)]
        low, high = self.span
        lines = [self.title] + [f"colour: {self.unit}, {number(low)} to {number(high)}"] * colour
        colours = self.colours()
        for block in blocks(widths, width - edge - 1):
            heads = [fit(visible(self.columns[j]), widths[j]) for j in block]
            lines += ["", f"{fit(self.corner, edge)} " + " ".join(heads)]
            for i in self.order:
                cells = [fit(texts[i][j], widths[j]) for j in block]
                if colour:
                    cells = [paint(cell, colours[i, j]) if np.isfinite(self.values[i, j]) else cell
                             for cell, j in zip(cells, block)]
                lines.append(f"{fit(visible(self.rows[i]), edge)} " + " ".join(cells))
        return "\n".join(line.rstrip() for line in lines)

    def html(self) -> str:
        """A <figure> for a page of page.py, whose script shows the hovers, by mouse, finger or arrow keys."""
        low, high = self.span
        colours, dark = self.colours(), ink(self.colours())
        head = "".join(f"<th scope=col>{escape(visible(c))}" for c in self.columns)
        body = []
        for i in self.order:
            cells = []
            for j in range(len(self.columns)):
                style = f"background:#{bytes(colours[i, j]).hex()};color:{'#000' if dark[i, j] else '#fff'}"
                there = f'style="{style}"' if np.isfinite(self.values[i, j]) else "class=none"
                tip = escape(self.hover(i, j), quote=True).replace("\n", "&#10;")
                text, link = escape(self.text(i, j)), self.links[i][j] if self.links is not None else ""
                text = f'<a href="{escape(link, quote=True)}">{text}</a>' if link else text
                cells.append(f'<td {there} data-tip="{tip}">{text}')
            body.append(f"<tr><th scope=row>{escape(visible(self.rows[i]))}" + "".join(cells))
        ramp = ",".join(f"#{bytes(c).hex()}" for c in rgb(np.linspace(0, 1, 9), 0, 1, self.diverging))
        return (
            f'<figure class=heatmap><figcaption>{escape(self.title)}</figcaption><div class=scroll>'
            f'<table tabindex=0 aria-label="{escape(self.title, quote=True)}"><thead><tr>'
            f"<th class=corner>{escape(self.corner)}{head}<tbody>" + "\n".join(body) +
            f'</table></div><p class=ramp>{number(low)} <span style="background:linear-gradient(90deg,{ramp})"></span> '
            f"{number(high)} {escape(self.unit)}</p></figure>"
        )


def number(value: float, most: float | None = None) -> str:
    """A number in about six letters, or a dot for NaN; all numbers of a grid whose largest is `most` look alike."""
    if not np.isfinite(value):
        return "·"
    size = abs(value) if most is None else most
    text = f"{value:.2f}" if 0.01 <= size < 1000 or value == 0 else f"{value:.1e}"
    return "0.00" if text == "-0.00" else text


def paint(text: str, colour: np.ndarray) -> str:
    """A text on a coloured background: in 24-bit colour if the terminal says that it has that, else in 256 colours."""
    r, g, b = map(int, colour)
    back = f"2;{r};{g};{b}"
    if os.environ.get("COLORTERM") not in ("truecolor", "24bit"):
        r, g, b = (0 if v < 48 else 1 if v < 115 else (v - 35) // 40 for v in (r, g, b))  # levels 0, 95, 135, ... 255
        back = f"5;{16 + 36 * r + 6 * g + b}"
    return f"\x1b[48;{back};{30 if ink(colour) else 97}m{text}\x1b[0m"


def blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Split columns into groups that fit in `room` each, with a space between two columns."""
    groups: list[list[int]] = []
    used = room + 1
    for j, width in enumerate(widths):
        if used + width > room:
            groups.append([])
            used = 0
        groups[-1].append(j)
        used += width + 1
    return groups
