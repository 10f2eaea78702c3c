"""The result of `tinymia sweep`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..measure.patching import BY_POSITION
from ..pictures.heatmap import Heatmap
from ..pictures.terminal import fixed, screen, signed, table, visible
from ..runs.result import Result

UNITS = {"logit-difference": "logit of {0} minus logit of {1}, from 0 (as corrupt) to 1 (as clean)",
         "probability": "probability of {0}", "kl": "KL divergence from the clean run (nats)", "rank": "rank of {0}"}


@dataclass
class Sweep(Result):
    """The metrics of the last position's logits for each patch; NaN for cells that are not done."""

    metric: str                     # the one that `values` and the picture show
    layers: list[int]               # [n_layer]
    columns: list[str]              # positions or heads, [n_column]
    clean_pieces: list[str]         # [n_tok]
    corrupt_pieces: list[str]
    answer: int                     # id
    answer_piece: str
    against: int
    against_piece: str
    clean: dict[str, float]         # by metric, of the unpatched clean run; the logit difference in logits
    corrupt: dict[str, float]
    logit_difference: np.ndarray    # float64 [n_layer, n_column]: 0 as in the corrupt run, 1 as in the clean one
    probability: np.ndarray         # float64 [n_layer, n_column], of the answer
    kl: np.ndarray                  # float64 [n_layer, n_column], divergence from the clean run, in nats
    rank: np.ndarray                # float64 [n_layer, n_column], of the answer, 0 for the best token
    exact: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))     # of an estimate: the logit difference of
                                                                            # the cells that were checked, NaN elsewhere

    @property
    def values(self) -> np.ndarray:
        """The chosen metric: float64 [n_layer, n_column]."""
        return getattr(self, self.metric.replace("-", "_"))

    def __str__(self) -> str:
        return text(self)


def picture(found: Sweep) -> Heatmap:
    """The heatmap, layers by positions or heads, in the chosen metric."""
    s, metric = found.about["settings"], found.metric
    kind = "position" if s["tensor"] in BY_POSITION else "head"
    how = "corrupt into clean (noising)" if s["noising"] else "clean into corrupt (denoising)"
    where = ", last position" if s["at"] == "last" else ""
    how += f", estimated in {s['steps']} step{'s' * (s['steps'] > 1)}" if "estimate" in s else ""
    texts = [[f"{v:.0f}" if metric == "rank" else fixed(v) for v in row] for row in found.values]
    diverging = metric == "logit-difference"
    most = float(np.nanmax(np.abs(found.values), initial=1.0))
    limits = {"logit-difference": (-most, most), "probability": (0.0, 1.0)}.get(metric)
    hovers = [[hover(found, i, j) for j in range(len(found.columns))] for i in range(len(found.layers))]
    unit = UNITS[metric].format(visible(found.answer_piece), visible(found.against_piece))
    return Heatmap(found.values, [str(il) for il in found.layers], found.columns,
                   f"{s['tensor']}{where}, {how}", kind, "layer", unit,
                   texts, hovers, diverging=diverging, limits=limits, upward=True)


def pictures(found: Sweep) -> list[Heatmap]:
    """The heatmap of a sweep, as a list."""
    return [picture(found)]


def hover(found: Sweep, i: int, j: int) -> str:
    """The text shown when a cell is pointed at: all metrics of one patch."""
    kind = "position" if found.about["settings"]["tensor"] in BY_POSITION else "head"
    if "estimate" in found.about["settings"]:
        return f"layer {found.layers[i]}, {kind} {found.columns[j]}\nestimate {found.logit_difference[i, j]:.4g}"
    return (f"layer {found.layers[i]}, {kind} {found.columns[j]}\n"
            f"logit difference {found.logit_difference[i, j]:.4g}\nprobability {found.probability[i, j]:.4g}\n"
            f"KL from clean {found.kl[i, j]:.4g}\nrank {found.rank[i, j]:.0f}")


def ends_table(found: Any) -> str:
    """A table of the metrics of the two unpatched runs."""
    rows = [["run", f"{found.answer_piece!r} - {found.against_piece!r}", "probability", "KL from clean", "rank"]]
    for name, run in (("clean", found.clean), ("corrupt", found.corrupt)):
        rows.append([name, signed(run['logit-difference'], 3), f"{run['probability']:.4f}", f"{run['kl']:.4f}",
                     f"{run['rank']:.0f}"])
    return table(rows)


def text(found: Sweep) -> str:
    """The text that the terminal shows: the two unpatched runs, and the heatmap."""
    return "\n\n".join([ends_table(found), picture(found).terminal(*screen()), *checked(found)])


def checked(found: Sweep) -> list[str]:
    """The cells of an estimate that were also patched, the largest estimates first, and the correlation of the two."""
    known = np.argwhere(np.isfinite(found.exact))
    if not len(known):
        return []
    pairs = np.array([(found.logit_difference[i, j], found.exact[i, j]) for i, j in known])
    kind = "position" if found.about["settings"]["tensor"] in BY_POSITION else "head"
    rows = [["layer", kind, "estimate", "exact"]]
    for k in np.argsort(-np.abs(pairs[:, 0]), kind="stable"):
        (i, j), (guess, exact) = known[k], pairs[k]
        rows.append([str(found.layers[i]), found.columns[j], fixed(guess), fixed(exact)])
    spread_out = len(pairs) > 1 and (np.ptp(pairs, axis=0) > 0).all()
    line = [f"correlation of these {len(pairs)}: {np.corrcoef(pairs.T)[0, 1]:.3f}"] if spread_out else []
    return ["\n".join([table(rows), *line])]
