"""The results as a table in Markdown, as JSON, and as a chart of decoding speed beside the memory's limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tinymia import Error
from tinymia_files import write_atomic
from tinymia_lab.pictures.charts import BLUE, GREY

from .measure import Goal, Row

HEAD = "| measure | model | threads | unit | tinymia | llama.cpp | ratio | spread | of ceiling | goal | reached |"
RULE = "|---|---|--:|---|--:|--:|--:|--:|--:|---|---|"
SUFFIXES = (".md", ".json", ".png")
PLAIN = {"keep"}    # measures whose other side is tinymia itself


def short(x: float) -> str:
    """A number with three significant digits."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def middle(values: Sequence[float]) -> str:
    """The median as text, or a dash if there are no values."""
    return short(median(values)) if values else "–"


def goal(row: Row) -> str:
    """The goal of a row as text; "" if it has none."""
    if row.goal is None:
        return ""
    return f"{row.goal.sign} {row.goal.value:g}" + (f" {row.unit}" if row.goal.on == "ours" else " x")


def line(row: Row) -> str:
    """A row of the table in Markdown: medians, and the lowest and highest ratio."""
    spread = f"{min(row.ratio):.2f} to {max(row.ratio):.2f}" if row.ratio else "–"
    share = f"{median(row.of_ceiling):.0%}" if row.bandwidth and row.measure == "decode" else ""
    reached = {None: "", True: "yes", False: "**no**"}[row.met]
    theirs = middle(row.theirs) + (" (keeping nothing)" if row.measure in PLAIN else "")
    ratio = f"{median(row.ratio):.2f}" if row.ratio else "–"
    return (f"| {row.measure} | {row.model} | {row.threads} | {row.unit} | {middle(row.ours)} | {theirs} | {ratio} | "
            f"{spread} | {share} | {goal(row)} | {reached} |")


def markdown(about: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The report in Markdown: computer and versions, the table, and notes about what could not be measured."""
    bandwidth = ", ".join(f"{n} threads {short(x / 1e9)} GB/s" if n > 1 else f"1 thread {short(x / 1e9)} GB/s"
                          for n, x in about["bandwidth"].items())
    versions = ", ".join(f"{k} {about[k]}" for k in ("tinymia", "commit", "python", "numba", "llvmlite", "numpy",
                                                     "llama_cpp") if about.get(k))
    lines = [f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['memory'] / 1e9:.0f} GB, {about['os']}",
             "", f"{versions}", ""]
    if "llama_cpp_built_for" in about:
        lines += [f"llama.cpp: {about['llama_cpp_built_for']}", ""]
    lines += [f"memory read: {bandwidth}", "", f"```bash\n{about['command']}\n```", "", HEAD, RULE, *map(line, rows)]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines)


def as_json(about: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The report as JSON, with the numbers of every pair."""
    def plain(row: Row) -> dict[str, Any]:
        g: Goal | None = row.goal
        return {**vars(row), "goal": vars(g) if g else None, "ratio": row.ratio, "ceiling": row.ceiling,
                "of_ceiling": row.of_ceiling, "met": row.met}

    return json.dumps({"about": about, "rows": [plain(row) for row in rows], "notes": list(notes)}, indent=1,
                      ensure_ascii=False)


def chart(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw the chart: a panel per number of threads, a pair of bars per model, and a mark at the memory's limit.

    Small models, which fit in the caches, are drawn only if there is no other model. Raises Error without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error(f"{path}: drawing needs matplotlib: pip install 'tinymia[lab]'") from None
    rows = [r for r in rows if r.measure == "decode"] or [r for r in rows if r.measure == "small"]
    if not rows:
        return
    threads, models = sorted({r.threads for r in rows}), list(dict.fromkeys(r.model for r in rows))
    figure = Figure(figsize=(2 + 4.5 * len(threads), 2.2 + 0.62 * len(models)), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(threads), sharey=True, sharex=True))
    for ax, n in zip(panels, threads):
        for row in (r for r in rows if r.threads == n):
            y, first = models.index(row.model), row is next(r for r in rows if r.threads == n)
            bars(ax, y - 0.19, row.ours, BLUE, "tinymia" if first else None)
            if row.theirs:
                bars(ax, y + 0.19, row.theirs, GREY, "llama.cpp" if first else None)
            ax.plot([median(row.ceiling)] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2,
                    label="memory ceiling" if first else None)
        ax.set(title=f"{n} thread{'s' * (n > 1)}, {short(about['bandwidth'][n] / 1e9)} GB/s",
               xlabel="tokens per second")
        ax.set_yticks(range(len(models)), models)
        ax.grid(axis="x", color="#dddddd")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Decoding, {about['cpu']}, {about['date'][:10]}", fontsize=10)
    write_atomic(path, lambda f: figure.savefig(f, format="png"))


def bars(ax: Any, y: float, values: Sequence[float], colour: str, label: str | None) -> None:
    """Draw the median as a bar with its number, and the spread as a line."""
    at = median(values)
    ax.barh(y, at, 0.36, color=colour, label=label)
    ax.plot([min(values), max(values)], [y, y], color="black", linewidth=0.8)
    ax.annotate(short(at), (max(values), y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def write(prefix: str, about: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Write PREFIX.md, PREFIX.json and PREFIX.png. Raises Error if one cannot be written."""
    def put(suffix: str, text: str) -> None:
        write_atomic(f"{prefix}{suffix}", lambda f: f.write(text.encode()))

    put(".md", markdown(about, rows, notes) + "\n")
    put(".json", as_json(about, rows, notes) + "\n")
    chart(Path(f"{prefix}.png"), about, rows)
