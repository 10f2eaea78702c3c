"""The result of `tinymia function-vector`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..pictures.charts import Chart, draw_png
from ..pictures.heatmap import Heatmap
from ..pictures.page import page, preformatted, write_page
from ..pictures.terminal import screen, signed, table
from ..runs.result import Result

NO_LAYER = """\
at no layer are there more right answers with the vector than without it, on the development queries. The
heads of the vector may not carry the task (--heads own, --top 20), or the vector may be too short (--coef 2), or the
labels alone show the task, so that the effects of heads mean little."""


@dataclass
class FunctionVector(Result):
    """Tables by task, in the order of `tasks`; NaN where a number does not exist or is not computed yet."""

    tasks: list[str]
    effects: np.ndarray         # float64 [n_layer, n_head]: mean causal indirect effect over tasks and prompts
    heads: list[list[list[int]]]    # of each task: (layer, head), the largest effect first
    vectors: np.ndarray         # float32 [n_task, n_embd]: the function vector, coef included
    dev_accuracy: np.ndarray    # float64 [n_task, 2, n_layer + 2], on the development queries; see below
    accuracy: np.ndarray        # float64 [n_task, 2, n_layer + 2], on the test queries; bare query, shuffled
                                # demonstrations: alone, with the vector at each layer, and last with right
                                # demonstrations instead
    means: np.ndarray           # float64 [n_task, n_layer, n_head, d_head_v]: mean head outputs, before Wo
    n_means: np.ndarray         # float64 [n_task]: prompts in the means so far
    prompt_effects: np.ndarray  # float64 [n_task, n_effect, n_layer, n_head]
    dev_hits: np.ndarray        # float64 [n_task, n_dev, 2, n_layer + 2], 0 or 1
    hits: np.ndarray            # float64 [n_task, n_test, 2, n_layer + 2]

    @property
    def layers(self) -> np.ndarray:
        """The best layer by dev_accuracy, after the bare query and after shuffled examples: intp [n_task, 2].

        The lowest of equal ones; -1 if no layer is better than no vector.
        """
        with_it = self.dev_accuracy[..., 1:-1]
        return np.where(with_it.max(-1) > self.dev_accuracy[..., 0], with_it.argmax(-1), -1)

    def __str__(self) -> str:
        return text(self)


def tables(found: FunctionVector) -> list[str]:
    """The tables of the text: accuracies and heads, with a warning if the effects mean nothing."""
    rows, none = [], []
    for i, (name, layers) in enumerate(zip(found.tasks, found.layers.tolist())):
        cells = []
        for what, accuracy, layer in zip(("bare", "shuffled"), found.accuracy[i], layers):
            shown = ("-", "-") if layer < 0 else (layer, f"{accuracy[layer + 1]:.2f}")
            cells += [f"{accuracy[0]:.2f}", *shown]
            none += [f"{name} ({what})"] if layer < 0 else []
        rows.append([name, *(int(np.isfinite(hits[i, :, 0, 0]).sum()) for hits in (found.dev_hits, found.hits)), *cells,
                     f"{found.accuracy[i, 0, -1]:.2f}"])
    parts = [table([["task", "dev", "test", "bare", "layer", "+ vector", "shuffled", "layer", "+ vector",
                     "right examples"], *rows])]
    if none:
        parts.append(f"-: {', '.join(none)}: {NO_LAYER}")
    known = [name for name, (_, shuffled) in zip(found.tasks, found.accuracy) if shuffled[0] >= 0.9 * shuffled[-1]]
    if known:
        parts.append(f"{', '.join(known)}: answered with shuffled examples as well as with right ones. The labels "
                     "alone show the task,\nso that giving a head its mean cannot help, and its effect means little.")
    own = found.about["settings"]["heads"] == "own"
    by_task = list(found.prompt_effects.mean(1)) if own else [found.effects]
    columns = [[f"{il}.{head} {signed(effects[il, head])}" for il, head in heads]
               for effects, heads in zip(by_task, found.heads)]
    title = [f"{name}: head, effect" for name in found.tasks] if own else ["head, effect"]
    return [*parts, "heads of the vector\n" + table([title, *(list(row) for row in zip(*columns))])]


def heatmaps(found: FunctionVector) -> list[Heatmap]:
    """The heatmaps: effects of the heads; accuracies by layer."""
    layers = [str(il) for il in range(len(found.effects))]
    heads = Heatmap(found.effects, layers, [str(h) for h in range(found.effects.shape[1])],
                    "causal indirect effect of each head (probability of the answer)", "head", "layer",
                    "change of probability", [[signed(v, 3) for v in row] for row in found.effects], diverging=True,
                    upward=True)
    return [heads, *(Heatmap(chart.values, found.tasks, layers, chart.title, "layer", "task", "accuracy",
                             limits=(0.0, 1.0)) for chart in charts(found))]


def charts(found: FunctionVector) -> list[Chart]:
    """The charts: accuracies by layer as lines."""
    layers = [str(il) for il in range(len(found.effects))]
    return [Chart(f"accuracy with the vector, {what}", "layer", layers, found.tasks, found.accuracy[:, i, 1:-1])
            for i, what in enumerate(("bare query", "shuffled examples"))]


def pictures(found: FunctionVector) -> list[Chart | Heatmap]:
    """The effects of the heads as a heatmap, and the charts."""
    return [heatmaps(found)[0], *charts(found)]


def text(found: FunctionVector) -> str:
    """The text that the terminal shows."""
    first, *rest = tables(found)
    return "\n\n".join([first, *(h.terminal(*screen()) for h in heatmaps(found)), *rest])


def title(found: FunctionVector) -> str:
    """The title of the page and of the picture."""
    return f"function vectors, {Path(found.about['model']['path']).name} (Todd et al. 2023)"


def write_png(found: FunctionVector, path: Path) -> None:
    """Draw the pictures side by side."""
    draw_png(path, pictures(found), title(found))


def write_html(found: FunctionVector, path: Path) -> None:
    """Write the page: pictures, then all tables."""
    sections = [*(picture.html() for picture in pictures(found)), *map(preformatted, tables(found))]
    write_page(path, page(title(found), sections))
