"""Charts of accuracy, by layer as lines or by task as bars: as SVG in a page, or in a PNG beside a heatmap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinymia_files import printable

from .drawing import write_png
from .heatmap import Heatmap, number
from .heatmap_png import colour_scale, paint_cells
from .terminal import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, GREEN = "#8c8c8c", "#2a6fbb", "#3a9a55"     # without the vector, with it, with examples
HUES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c")   # Okabe and Ito (2008)
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))             # tell lines of the same hue apart, also in print
WIDE, HIGH, LEFT, TOP, BOTTOM = 560, 280, 44, 12, 40    # an SVG and its margins, in pixels


@dataclass(frozen=True)
class Chart:
    """A chart of numbers from 0 to 1: one series per label over places along x; lines, or bars if colours are given."""

    title: str
    x: str
    places: Sequence[str]           # [n_places]
    labels: Sequence[str]           # [n_series]
    values: np.ndarray              # float [n_series, n_places], NaN where there is no number
    colours: Sequence[str] = ()     # of bars, [n_series]
    y: str = "accuracy"

    def colour(self, i: int) -> str:
        """The colour of series i."""
        return self.colours[i] if self.colours else HUES[i % len(HUES)]

    def html(self) -> str:
        """A <figure> for a page of page.py."""
        n, step = len(self.labels), (WIDE - LEFT) / len(self.places)
        down = HIGH - TOP - BOTTOM
        out = []
        for tick in (0, 0.25, 0.5, 0.75, 1):
            y = TOP + down * (1 - tick)
            out.append(f'<line x1={LEFT} x2={WIDE} y1={y:g} y2={y:g} stroke="var(--line)"/>'
                       f'<text x={LEFT - 6} y={y + 4:g} text-anchor=end>{tick:g}</text>')
        some = max(1, len(self.places) * max(map(len, self.places)) * 7 // (WIDE - LEFT))  # every how many labels fit
        for j in range(0, len(self.places), some if not self.colours else 1):
            label = escape(fit(self.places[j], max(3, int(step * (1 if self.colours else some) / 6.5))).rstrip())
            out.append(f'<text x={LEFT + step * (j + 0.5):g} y={HIGH - BOTTOM + 16} text-anchor=middle>{label}</text>')
        out.append(f"<text x={(LEFT + WIDE) / 2:g} y={HIGH - 4} text-anchor=middle>{escape(self.x)}</text>")
        for i, row in enumerate(self.values):
            if not self.colours:
                dash = ",".join(map(str, DASHES[i // len(HUES) % len(DASHES)]))
                points = " ".join(f"{LEFT + step * (j + 0.5):g},{TOP + down * (1 - v):g}"
                                  for j, v in enumerate(row) if np.isfinite(v))
                out.append(f'<polyline points="{points}" fill=none stroke="{self.colour(i)}" stroke-width=2 '
                           f'stroke-dasharray="{dash}"/>')
            for j, v in enumerate(row):
                if np.isfinite(v):
                    out.append(self._mark(i, j, v, step, down, n))
        legend = " ".join(f'<span style="white-space:nowrap"><span style="color:{self.colour(i)}">■</span> '
                          f"{escape(label)}</span>" for i, label in enumerate(self.labels))
        return (f'<figure><figcaption>{escape(self.title)}</figcaption><svg viewBox="0 0 {WIDE} {HIGH}" role=img '
                f'aria-label="{escape(self.title, quote=True)}" style="max-width:{WIDE * 1.5:g}px;width:100%;'
                f'font:12px system-ui,sans-serif;fill:var(--text)">{"".join(out)}</svg><p>{legend}</p></figure>')

    def _mark(self, i: int, j: int, v: float, step: float, down: float, n: int) -> str:
        tip = escape(f"{self.labels[i]}, {self.x} {self.places[j]}: {number(v)}", quote=True)
        y = TOP + down * (1 - v)
        if not self.colours:
            return f'<circle cx={LEFT + step * (j + 0.5):g} cy={y:g} r=4 fill="{self.colour(i)}" data-tip="{tip}"/>'
        wide = 0.8 * step / n
        return (f'<rect x={LEFT + step * (j + 0.1) + i * wide:g} y={y:g} width={wide:g} height={max(down * v, 1):g} '
                f'fill="{self.colour(i)}" data-tip="{tip}"/>')

    def draw(self, ax: Axes) -> None:
        """Draw the chart in axes of matplotlib."""
        at = np.arange(len(self.places))
        for i, (label, row) in enumerate(zip(self.labels, self.values)):
            if self.colours:
                wide, colour = 0.8 / len(self.labels), self.colour(i)
                ax.bar(at - 0.4 + (i + 0.5) * wide, row, wide, color=colour, edgecolor=colour, label=label)
            else:
                dash = DASHES[i // len(HUES) % len(DASHES)]
                ax.plot(at, row, color=self.colour(i), label=label, marker="o", markersize=4, linewidth=1.8,
                        linestyle=(0, dash) if dash else "-")
        some = 1 if self.colours else -(-len(at) // 16)
        ax.set_xticks(at[::some], [self.places[j] for j in at[::some]], rotation=30 if self.colours else 0,
                      ha="right" if self.colours else "center")
        ax.set(title=printable(self.title), xlabel=self.x, ylabel=self.y, ylim=(-0.02, 1.02))
        ax.grid(axis="y", color="#dddddd")
        ax.set_axisbelow(True)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_heatmap(ax: Axes, heatmap: Heatmap) -> None:
    """Draw a heatmap in axes of matplotlib, beside charts, without numbers in the cells."""
    paint_cells(ax, heatmap)
    for axis, labels, order in ((ax.xaxis, heatmap.columns, range(len(heatmap.columns))),
                                (ax.yaxis, heatmap.rows, heatmap.order)):
        some = range(0, len(labels), -(-len(labels) // 16))
        axis.set_ticks([order.index(i) for i in some], [labels[i] for i in some])
    ax.set(title=heatmap.title, xlabel=heatmap.x, ylabel=heatmap.y)
    ax.figure.colorbar(colour_scale(heatmap), ax=ax, label=heatmap.unit)


def draw_png(path: str | Path, panels: Sequence[Chart | Heatmap], title: str) -> None:
    """Write charts and heatmaps side by side as a PNG. Raises Error without matplotlib."""
    write_png(path, lambda: _figure(panels, title))


def _figure(panels: Sequence[Chart | Heatmap], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 4.2), dpi=120, layout="constrained")
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        panel.draw(ax) if isinstance(panel, Chart) else draw_heatmap(ax, panel)
    figure.suptitle(printable(title).replace("$", r"\$"), fontsize=10)
    return figure
