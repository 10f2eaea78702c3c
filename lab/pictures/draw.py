"""Attention patterns as one picture: one row of panels per layer, one panel per head, one line of cells per query.

The picture is a single image with the panels side by side, so that 32 layers of 32 heads take seconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinymia_files import Error, printable

from .drawing import drawable, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Patterns = Mapping[int, npt.NDArray[np.float32]]    # layer: [n_head, n_tok, n_kv]

# In pixels:
WIDE = 2400             # total width of one row of panels, or height of one column of them
LEAST, MOST = 100, 480  # least and greatest width of one panel
GAP = 8                 # between panels
LABEL = 11              # the smallest cell for which the text of its token is written
DPI = 100


@dataclass(frozen=True)
class Layout:
    """The places of the panels in the image, in pixels."""

    pool: int           # weights per pixel, in each direction
    zoom: int           # pixels per weight, in each direction; pool or zoom is 1
    high: int           # height of one panel
    wide: int           # width of one panel
    tops: list[int]     # of each layer's panels
    lefts: list[int]    # of each head's panels


def draw(patterns: Patterns, path: str | os.PathLike[str], tokens: Sequence[str] | None = None,
         title: str | None = None, heads: Sequence[int] | None = None) -> None:
    """Write attention patterns, {layer: float32 [n_head, n_tok, n_kv]}, to `path` as one PNG.

    tokens: the texts of the n_kv keys; the queries are the last n_tok of them. heads: the numbers of the heads, if
    these are not all. Colours run from 0 to 1 on a square-root scale, so that weak attention is visible beside strong.
    A pixel that stands for several weights shows the largest. Raises Error without matplotlib, and for patterns, tokens
    or a path that do not fit.
    """
    shapes = {np.shape(p) for p in patterns.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 3 or 0 in shape:
        raise Error(f"a picture needs patterns of one shape [n_head, n_tok, n_kv], not {sorted(shapes) or 'none'}")
    if tokens is not None and len(tokens) != shape[2]:
        raise Error(f"a picture with {shape[2]} keys needs as many tokens, not {len(tokens)}")
    write_png(path, lambda: _figure(patterns, _layout(len(patterns), *shape), tokens,
                                    printable(" ".join((title or "").split())),
                                    range(shape[0]) if heads is None else heads))


def _layout(n_layer: int, n_head: int, n_tok: int, n_kv: int) -> Layout:
    side = min(max(WIDE // max(n_head, n_layer), LEAST), MOST)
    pool = -(-max(n_tok, n_kv) // side)
    zoom = max(1, side // max(n_tok, n_kv))
    high, wide = (-(-n // pool) * zoom for n in (n_tok, n_kv))
    tops, lefts = [y * (high + GAP) for y in range(n_layer)], [x * (wide + GAP) for x in range(n_head)]
    return Layout(pool, zoom, high, wide, tops, lefts)


def _figure(patterns: Patterns, at: Layout, tokens: Sequence[str] | None, title: str,
            heads: Sequence[int]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    colours = ScalarMappable(PowerNorm(0.5, 0, 1), colormaps["inferno"])
    image = _image(patterns, at, colours)
    labels = drawable([t.replace(" ", "▁") for t in tokens]) if tokens is not None and at.zoom >= LABEL else []
    size = min(9.0, 0.6 * at.zoom)                              # of the labels, in points
    edge = int(0.85 * size * max(map(len, labels), default=0))  # pixels they take; a monospaced letter is 0.6 em wide
    left, right, top, bottom = 90 + edge, 70, 80 if title else 36, 16 + edge
    width, height = left + image.shape[1] + right, top + image.shape[0] + bottom
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    low, tall = bottom / height, image.shape[0] / height
    axes = figure.add_axes((left / width, low, image.shape[1] / width, tall), frameon=False)
    axes.imshow(image, interpolation="nearest", aspect="auto")
    _write_tokens(axes, at, labels, size)
    _write_numbers(axes, at, sorted(patterns), heads, -edge - 14)
    figure.colorbar(colours, cax=figure.add_axes((1 - (right - 18) / width, low, 12 / width, tall)))
    room = (width - 20) // 10                                   # letters of the title
    title = title if len(title) <= room else title[:room - 1] + "…"
    figure.text(10 / width, 1 - 12 / height, title, va="top", fontsize=12, parse_math=False)
    return figure


def _image(patterns: Patterns, at: Layout, colours: ScalarMappable) -> npt.NDArray[np.uint8]:
    """The image with all panels on white: uint8 [height, width, RGBA]."""
    image = np.full((at.tops[-1] + at.high, at.lefts[-1] + at.wide, 4), 255, np.uint8)
    for y, layer in zip(at.tops, sorted(patterns), strict=True):
        for x, weights in zip(at.lefts, patterns[layer], strict=True):
            panel = _largest(weights, at.pool).repeat(at.zoom, axis=0).repeat(at.zoom, axis=1)
            image[y:y + at.high, x:x + at.wide] = colours.to_rgba(panel, bytes=True)
    return image


def _largest(weights: npt.NDArray[np.float32], pool: int) -> npt.NDArray[np.float32]:
    """The largest weight of each square of pool x pool weights; the last squares may be smaller."""
    rows, cols = (np.arange(0, n, pool) for n in weights.shape)
    return np.maximum.reduceat(np.maximum.reduceat(weights, rows, axis=0), cols, axis=1)


def _write_tokens(axes: Axes, at: Layout, labels: list[str], size: float) -> None:
    """Write the queries left of the first panels, and the keys under the last ones."""
    def centres(corners: list[int], length: int) -> list[float]:
        return [c + (i + 0.5) * at.zoom - 0.5 for c in corners for i in range(length // at.zoom)] if labels else []

    style: dict[str, Any] = {"fontsize": size, "fontfamily": "monospace", "parse_math": False}
    queries = labels[len(labels) - at.high // at.zoom:]
    axes.set_yticks(centres(at.tops, at.high), queries * len(at.tops) if labels else [], **style)
    axes.set_xticks(centres(at.lefts, at.wide), labels * len(at.lefts), rotation=90, **style)
    axes.tick_params(length=0, pad=3)


def _write_numbers(axes: Axes, at: Layout, layers: list[int], heads: Sequence[int], x: int) -> None:
    """Write the layer numbers left of the picture, and the head numbers on top."""
    for top, layer in zip(at.tops, layers, strict=True):
        axes.text(x, top + at.high / 2, f"{layer}", ha="right", va="center", fontsize=12)
    for head, left in zip(heads, at.lefts, strict=True):
        axes.text(left + at.wide / 2, -8, f"{head}", ha="center", va="bottom", fontsize=12)
    axes.text(x, -8, "layer / head", ha="right", va="bottom", fontsize=8)
