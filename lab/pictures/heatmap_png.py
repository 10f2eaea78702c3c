"""Heatmaps as a PNG, by matplotlib: cells are as large as their texts, or have no texts if there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymia_files import printable

from .colours import ink, stops
from .drawing import drawable, write_png
from .heatmap import Heatmap
from .terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# In pixels:
DPI = 100
LETTER = 6.7            # the width of a letter in the cells, at 8 points
LINE = 20               # the height of a row with texts
WIDEST = 5000           # the greatest width of a grid with texts; wider ones have none
SMALL = 1600            # the width of a grid without texts, unless cells would be under two pixels
TOP, RIGHT = 60, 76     # room for the title, and for the scale of colours
TITLE = 900             # the least room for titles, at 7 per letter; longer ones are cut
CAPTION = 16            # the height of a line above all heatmaps
MOST = 6000             # the most cells (not pixels) with texts


@dataclass(frozen=True)
class Layout:
    """The sizes of one heatmap, in pixels."""

    texts: bool     # whether the cells show their texts
    wide: float     # width of the grid
    high: float     # height of the grid
    left: float     # room for the labels of rows
    bottom: float   # room for the labels of columns


def draw_png(path: str | Path, heatmaps: Sequence[Heatmap], caption: Sequence[str] = ()) -> None:
    """Write heatmaps as a PNG, one below another, under lines of caption. Raises Error without matplotlib."""
    write_png(path, lambda: _figure(heatmaps, [printable(line) for line in caption]))


def paint_cells(axes: Axes, h: Heatmap) -> None:
    """Draw the cells of a heatmap in axes of matplotlib, the top row first; empty cells are grey."""
    there = np.isfinite(h.values)[..., None]
    axes.imshow(np.where(there, h.colours(), np.uint8(225))[list(h.order)], aspect="auto", interpolation="nearest")


def colour_scale(h: Heatmap) -> ScalarMappable:
    """The colours of a heatmap with their numbers, as matplotlib's colour bar needs them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    return ScalarMappable(Normalize(*h.span), LinearSegmentedColormap.from_list("", stops(h.diverging) / 255))


def _layout(h: Heatmap) -> Layout:
    n_rows, n_cols = len(h.rows), len(h.columns)
    longest = max((len(h.text(i, j)) for i in range(n_rows) for j in range(n_cols)), default=1)
    cell = min(max(longest, 3), 12) * LETTER + 8
    texts = n_cols * cell <= WIDEST and n_rows * n_cols <= MOST
    wide = n_cols * cell if texts else max(SMALL, 2.0 * n_cols)
    high = n_rows * LINE if texts else max(12.0 * n_rows, 2.0 * n_rows, 120)
    left, bottom = (30 + LETTER * min(max(map(len, labels), default=1), 14) for labels in (h.rows, h.columns))
    return Layout(texts, max(wide, 120), max(high, 60), left + 24, bottom + 24)


def _unit(h: Heatmap, at: Layout) -> list[str]:
    """The meaning of the colours, in up to three lines under the title."""
    return wrap(f"colour: {h.unit}", max(48, int(at.wide) // 7))[:3]


def _figure(heatmaps: Sequence[Heatmap], caption: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    layouts = [_layout(h) for h in heatmaps]
    lines = [max(map(len, (h.title, *_unit(h, at), *caption))) for h, at in zip(heatmaps, layouts)]
    width = max(at.left + max(at.wide, min(TITLE, 7 * line)) + RIGHT for at, line in zip(layouts, lines))
    height = sum(TOP + at.high + at.bottom for at in layouts) + CAPTION * len(caption)
    figure, top = Figure((width / DPI, height / DPI), dpi=DPI), height
    room = int(width - 2 * CAPTION) // 7
    for line in caption:
        top -= CAPTION
        line = line if len(line) <= room else line[: room - 1] + "…"
        figure.text(CAPTION / width, top / height, line, fontsize=9, parse_math=False)
    for h, at in zip(heatmaps, layouts):
        top -= TOP + at.high
        _draw_one(figure, h, at, [at.left / width, top / height, at.wide / width, at.high / height], width)
        top -= at.bottom
    return figure


def _draw_one(figure: Figure, h: Heatmap, at: Layout, box: list[float], width: float) -> None:
    """Draw one heatmap in its box [left, bottom, width, height] of the figure."""
    colours, there = h.colours(), np.isfinite(h.values)
    axes, order = figure.add_axes((box[0], box[1], box[2], box[3])), list(h.order)
    paint_cells(axes, h)
    style: dict[str, Any] = {"fontsize": 8, "fontfamily": "monospace", "parse_math": False}
    if at.texts:
        cells, dark = (iter(drawable([h.text(i, j) for i in order for j in range(len(h.columns))], 12)), ink(colours))
        for y, i in enumerate(order):
            for x in range(len(h.columns)):
                axes.text(x, y, next(cells), color="black" if dark[i, x] or not there[i, x] else "white",
                          ha="center", va="center", **style)
    every_x, every_y = (max(1, -(-n * 12 // round(size))) for n, size in
                        ((len(h.columns), at.wide), (len(h.rows), at.high)))
    axes.set_xticks(range(0, len(h.columns), every_x), drawable(list(map(visible, h.columns)))[::every_x],
                    rotation=90 if max(map(len, h.columns), default=0) > 2 else 0, **style)
    axes.set_yticks(range(0, len(order), every_y), drawable([visible(h.rows[i]) for i in order])[::every_y], **style)
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel(h.x, fontsize=9)
    axes.set_ylabel(h.y, fontsize=9)
    room = int(width - RIGHT - at.left) // 7
    title = h.title if len(h.title) <= room else h.title[: room - 1] + "…"
    axes.set_title("\n".join([title, *_unit(h, at)]), fontsize=9, loc="left", parse_math=False)
    bar = figure.add_axes((box[0] + box[2] + 14 / width, box[1], 12 / width, box[3]))
    figure.colorbar(colour_scale(h), cax=bar).ax.tick_params(labelsize=8)
