"""Attribution patching: an estimate of what every patch of a sweep would do, from one gradient.

The change of a piece, from one run to the other, times the gradient with respect to it, is the change of the logit
difference if the model were linear. With several steps the gradient is a mean over runs whose embeddings lie between
those of the two prompts; this takes more of the model's curvature into account.

Sources: Nanda, Attribution patching (2023); Syed et al., Attribution patching outperforms automated circuit discovery
(2023), arXiv 2310.10348; Hanna et al., Have faith in faithfulness (2024), arXiv 2403.17806.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinymia import LogitDifference, Model, Patch

from .patching import BY_POSITION, Batch, Runs, Setting, batches


def slopes(model: Model, setting: Setting, layers: Sequence[int], steps: int) -> list[np.ndarray]:
    """The gradient of the logit difference with respect to the tensor in each layer, token axis first.

    One step: in the base run. More: the mean over `steps` runs, in the middle of equal parts of the way between the
    embeddings of both prompts.
    """
    of, names = LogitDifference(setting.answer, setting.against), [f"{setting.tensor}-{il}" for il in layers]
    other = setting.corrupt if setting.noising else setting.clean
    a, b = (model.rows(model.weights.token_embd, np.array(ids)) for ids in (setting.base, other))
    total: list[Any] = [0.0] * len(names)
    for at in [0.0] if steps == 1 else (np.arange(steps) + 0.5) / steps:
        patch = [Patch("inp_embd", a + a.dtype.type(at) * (b - a))] if at else []
        found = model.gradients(setting.base, of, names, patch)
        total = [x + found[name] for x, name in zip(total, names)]
    axis = model.table[f"{setting.tensor}-0"][0].dims.index("n_tok")
    return [np.moveaxis(x / x.dtype.type(steps), axis, 0) for x in total]


def estimated(model: Model, setting: Setting, runs: Runs, layers: Sequence[int], steps: int) -> np.ndarray:
    """Estimate the change of the logit difference by each patch: float64 [n_layer, n_column]."""
    rows = []
    for il, slope in zip(layers, slopes(model, setting, layers, steps)):
        change = (runs.source[il] - runs.own[il]) * slope.astype(np.float64)            # [n_tok, ...]
        change = change[-1:] if setting.last else change
        over = 1 if setting.tensor in BY_POSITION else (0, *range(2, change.ndim))      # a head: all rows, all numbers
        rows.append(change.sum(over))
    return np.stack(rows)


def largest(
    setting: Setting, runs: Runs, layers: Sequence[int], cells: np.ndarray, k: int
) -> Iterator[tuple[int, list[int], list[Batch]]]:
    """The k cells of the largest estimates, by rows of the table: (row, columns whose patch changes nothing, batches of
    the others)."""
    chosen = np.argsort(-np.abs(cells), axis=None, kind="stable")[:k]
    for i, il in enumerate(layers):
        columns = sorted(int(cell) % cells.shape[1] for cell in chosen if cell // cells.shape[1] == i)
        yield i, *batches(setting, runs, il, columns)
