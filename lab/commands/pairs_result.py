"""The result of a command over pairs of prompts: the numbers of every pair, their mean and its standard error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinymia import Error

from ..pictures.heatmap import Heatmap
from ..pictures.terminal import screen, signed, table, visible
from ..runs.result import Result

TOP = 12    # the most cells in the table


@dataclass
class PairsResult(Result):
    """The quantities of a command in rows and columns, per pair; NaN for a pair that is not done."""

    command: str
    quantities: list[str]           # [n_quantity]
    units: list[str]                # [n_quantity]
    quantity: str                   # the one that is shown
    y: str                          # name of the rows, such as layer
    x: str                          # name of the columns
    rows: list[str]                 # [n_row]
    columns: list[str]              # [n_column]
    pairs: list[dict[str, str]]     # clean, corrupt, answer, against: texts, and tokens as the model has them
    values: np.ndarray              # float64 [n_pair, n_quantity, n_row, n_column]; NaN where a pair has no such cell
    clean: np.ndarray               # float64 [n_pair]: logit of the answer minus that of against, after clean
    corrupt: np.ndarray             # float64 [n_pair]: ... after corrupt
    probability: np.ndarray         # float64 [n_pair], of the answer after clean
    rank: np.ndarray                # float64 [n_pair], of the answer after clean, 0 for the best token

    @property
    def n(self) -> np.ndarray:
        """The number of pairs that have a cell: int [n_quantity, n_row, n_column]."""
        return np.isfinite(self.values).sum(0)

    @property
    def mean(self) -> np.ndarray:
        """The mean over the pairs: float64 [n_quantity, n_row, n_column], NaN where no pair has the cell."""
        return np.where(self.n > 0, np.nansum(self.values, 0) / np.maximum(self.n, 1), np.nan)

    @property
    def error(self) -> np.ndarray:
        """The standard error of the mean, s / sqrt(n): float64 [n_quantity, n_row, n_column], NaN for one pair."""
        n = self.n
        squares = np.nansum((self.values - self.mean) ** 2, 0)
        return np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1)), np.nan)

    def __str__(self) -> str:
        return text(self)


def picture(found: PairsResult, of: np.ndarray, what: str, diverging: bool) -> Heatmap:
    """A heatmap of the shown quantity, without columns that no pair has."""
    q = found.quantities.index(found.quantity)
    mean, error, n = found.mean[q], found.error[q], found.n[q]
    kept = np.flatnonzero(n.any(0)).tolist()
    hovers = [[f"{found.y} {row}, {found.x} {found.columns[j]}\nmean {mean[i, j]:.4g}\nstandard error "
               f"{error[i, j]:.2g}\n{n[i, j]} pairs" for j in kept] for i, row in enumerate(found.rows)]
    return Heatmap(of[q][:, kept], found.rows, [found.columns[j] for j in kept],
                   f"{found.command} over {len(found.pairs)} pairs: {what} of {found.quantity}", found.x, found.y,
                   found.units[q], hovers=hovers, diverging=diverging, upward=True)


def pictures(found: PairsResult) -> list[Heatmap]:
    """The heatmaps of mean and standard error of the shown quantity."""
    q = found.quantities.index(found.quantity)
    signs = bool((found.mean[q][found.n[q] > 0] < 0).any())
    maps = [picture(found, found.mean, "mean", signs)]
    return maps + [picture(found, found.error, "standard error", False)] * bool(np.isfinite(found.error[q]).any())


def right(found: PairsResult) -> str:
    """A sentence on the number of pairs in which the model knows the answer."""
    n, done = len(found.pairs), np.isfinite(found.clean)
    best, preferred, other = ((values & done).sum() for values in
                              (found.rank == 0, found.clean > 0, found.corrupt < 0))
    diff, n_done = found.clean[done], int(done.sum())
    spread = f" ± {diff.std(ddof=1) / np.sqrt(n_done):.2f}" if n_done > 1 else ""
    mean = f"{signed(float(diff.mean()), 2)}{spread}" if n_done else "none"
    return (f"{n_done} of {n} pairs done; after the clean prompt the answer is the best token in {best} of them,\n"
            f"and better than the other answer in {preferred}; after the corrupt prompt the other answer is better in "
            f"{other};\nlogit difference of the two answers after the clean prompt: {mean}")


def largest(found: PairsResult) -> str:
    """A table of the cells with the largest means in size."""
    q = found.quantities.index(found.quantity)
    mean, error, n = found.mean[q], found.error[q], found.n[q]
    order = np.argsort(-np.nan_to_num(np.abs(mean), nan=-1), axis=None, kind="stable")[:TOP]
    lines = [[f"{found.y}, {found.x}", "mean", "standard error", "pairs"]]
    for i, j in (divmod(int(at), mean.shape[1]) for at in order):
        if n[i, j]:
            lines.append([f"{found.rows[i]}, {found.columns[j]}", signed(mean[i, j]), f"{error[i, j]:.4f}",
                          str(n[i, j])])
    return f"{found.units[q]}, the largest first\n{table(lines)}"


def text(found: PairsResult) -> str:
    """The text that the terminal shows."""
    return "\n\n".join([right(found), *(h.terminal(*screen()) for h in pictures(found)), largest(found)])


def pairs_table(found: PairsResult) -> str:
    """A table with a line per pair: how the model answers its prompts."""
    lines = [["pair", "clean", "answer", "against", "probability", "rank", "logit difference"]]
    for i, pair in enumerate(found.pairs):
        lines.append([str(i + 1), visible(pair["clean"]), visible(pair["answer"]), visible(pair["against"]),
                      f"{found.probability[i]:.3f}", f"{found.rank[i]:.0f}", signed(found.clean[i], 2)])
    return table(lines)


def check_quantity(quantity: str, known: list[str]) -> None:
    """Raise Error for a quantity that the command does not measure."""
    if quantity not in known:
        raise Error(f"quantity {quantity!r}: it must be one of {', '.join(known)}")
