"""The result of `tinymia task-vector`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures.charts import BLUE, GREEN, GREY, Chart, draw_png
from ..pictures.heatmap import Heatmap
from ..pictures.page import page, preformatted, write_page
from ..pictures.terminal import screen, table, visible
from ..runs.result import Result

NO_LAYER = """\
at no layer are there more right answers with the vector than for the bare query, on the development queries.
If `regular` is low too, the model does not do the task with examples either. Otherwise the template may not suit the
model (--template), or the query's word may be lost in the attention sink at position 0 (--bos)."""


@dataclass
class TaskVector(Result):
    """Tables by task, in the order of `tasks`; NaN where a number does not exist or is not computed yet."""

    tasks: list[str]
    by_layer: np.ndarray        # float64 [n_task, n_layer]: accuracy with the vector on the development queries
    baseline: np.ndarray        # float64 [n_task]: accuracy of the same queries without it
    layer: np.ndarray           # float64 [n_task]: the best of by_layer, the lowest where several tie
    accuracy: np.ndarray        # float64 [n_task, 3]: baseline, vector at that layer, regular, on the test queries
    probability: np.ndarray     # float64 [n_task, 3]: of the answer, mean over the test queries
    rank: np.ndarray            # float64 [n_task, 3]: of the answer, from 1, median
    conflict: np.ndarray        # float64 [n_task, n_task, 4]: prompt of a task, vector of another; see `conflict_hits`
    vectors: np.ndarray         # float64 [n_task, n_layer, n_embd]: mean theta of the development queries;
                                # "add": minus the mean of their own rows
    n_vectors: np.ndarray       # float64 [n_task]: queries in that mean so far
    lens: list[list[dict[str, Any]]]    # of each task: {"layer", "best": [[piece, probability], ...]}
    dev_hits: np.ndarray        # float64 [n_task, n_dev, 1 + n_layer], 0 or 1: bare, then with the vector at each layer
    tests: np.ndarray           # float64 [n_task, n_test, 3, 3]: right, probability, rank; as in `accuracy`
    conflict_hits: np.ndarray   # float64 [n_task, n_task, n_test, 4]: the prompt unchanged, share of answers of its
                                # own task, of the other; with the other's vector, of its own task, of the other

    def __str__(self) -> str:
        return text(self)


def no_layer(found: TaskVector) -> list[int]:
    """The indices of tasks for which, on the development queries, no layer is better than no vector."""
    return [i for i, (row, alone) in enumerate(zip(found.by_layer, found.baseline)) if not row.max() > alone]


def tables(found: TaskVector) -> list[str]:
    """The tables of the text: accuracies, the lens, the conflict test."""
    counts = [[int(np.isfinite(a[i, :, 0]).sum()) for a in (found.dev_hits, found.tests[..., 0])]
              for i in range(len(found.tasks))]
    none, what = no_layer(found), ["baseline", "vector", "regular"]
    rows = [[name, *count, "-" if i in none else int(found.layer[i]), *(f"{a:.2f}" for a in found.accuracy[i])]
            for i, (name, count) in enumerate(zip(found.tasks, counts))]
    if len(rows) > 1:
        rows.append(["mean", "", "", "", *(f"{a:.2f}" for a in found.accuracy.mean(0))])
    parts = [table([["task", "dev", "test", "layer", *what], *rows])]
    if none:
        parts.append(f"-: {', '.join(found.tasks[i] for i in none)}: {NO_LAYER}")
    parts.append("probability of the answer (mean), and its rank (median)\n" + table([
        ["task", *what, *what], *([name, *(f"{p:.3f}" for p in ps), *(f"{r:g}" for r in ranks)]
                                  for name, ps, ranks in zip(found.tasks, found.probability, found.rank))]))
    lens = [[name, f"l_out-{one['layer']}", " | ".join(f"{visible(piece)} {p:.2f}" for piece, p in one["best"])]
            for i, (name, lens) in enumerate(zip(found.tasks, found.lens)) if i not in none for one in lens]
    if lens:
        parts.append("the mean vector through the lens\n" + table(lens))
    rows = [[found.tasks[a], found.tasks[b], int(np.isfinite(found.conflict_hits[a, b, :, 0]).sum()),
             *(f"{v:.2f}" for v in found.conflict[a, b])]
            for a, b in np.argwhere(np.isfinite(found.conflict[..., 0])).tolist()]
    if rows:
        head = ["prompt of", "vector of", "queries", "its answer", "the other's", "patched: its answer", "the other's"]
        parts.append("conflict: the answer of the prompt's own task, and of the vector's, without and with the vector\n"
                     + table([head, *rows]))
    return parts


def accuracy_by_layer(found: TaskVector) -> Heatmap:
    """The heatmap of the accuracy with the vector, on the development queries."""
    return Heatmap(found.by_layer, found.tasks, [str(il) for il in range(found.by_layer.shape[1])],
                   "accuracy with the vector, by layer (development queries)", "layer", "task", "accuracy",
                   limits=(0.0, 1.0))


def charts(found: TaskVector) -> list[Chart]:
    """The charts: accuracy by layer as lines, and accuracy at the best layer as bars."""
    layers = [str(il) for il in range(found.by_layer.shape[1])]
    return [Chart("accuracy with the vector (development queries)", "layer", layers, found.tasks, found.by_layer),
            Chart("accuracy at the best layer (test queries)", "task", found.tasks,
                  ("baseline", "task vector", "regular"), found.accuracy.T, (GREY, BLUE, GREEN))]


def pictures(found: TaskVector) -> list[Chart | Heatmap]:
    """The charts, and accuracy by layer as a heatmap."""
    return [*charts(found), accuracy_by_layer(found)]


def text(found: TaskVector) -> str:
    """The text that the terminal shows."""
    first, *rest = tables(found)
    return "\n\n".join([first, accuracy_by_layer(found).terminal(*screen()), *rest])


def title(found: TaskVector) -> str:
    """The title of the page and of the picture."""
    return f"task vectors, {Path(found.about['model']['path']).name} (Hendel et al. 2023)"


def write_png(found: TaskVector, path: Path) -> None:
    """Draw the charts side by side."""
    draw_png(path, charts(found), title(found))


def write_html(found: TaskVector, path: Path) -> None:
    """Write the page: pictures, then all tables."""
    sections = [*(picture.html() for picture in pictures(found)), *map(preformatted, tables(found))]
    write_page(path, page(title(found), sections))
