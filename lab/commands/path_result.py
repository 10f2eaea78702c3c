"""The result of `tinymia path`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..pictures.heatmap import Heatmap
from ..pictures.terminal import fixed, screen, table, visible
from ..runs.result import Result
from .sweep_result import UNITS, ends_table

MOVED = "change of logit {0} minus logit {1}, from 0 (as clean) to 1 (as corrupt)"


@dataclass
class PathPatching(Result):
    """The metrics of the last position's logits for each sender; NaN for senders that are not done."""

    metric: str                     # the one that `values` and the picture show
    senders: list[str]              # such as 3.2, ffn-3, embedding: [n_sender]
    receivers: list[str]            # such as 5.1:v
    reading: list[str]              # by receiver: the heads that share what it reads, such as 5.0 and 5.1
    clean_pieces: list[str]         # [n_tok]
    corrupt_pieces: list[str]
    answer: int                     # id
    answer_piece: str
    against: int
    against_piece: str
    clean: dict[str, float]         # by metric, of the unpatched clean run; the logit difference in logits
    corrupt: dict[str, float]
    logit_difference: np.ndarray    # float64 [n_sender]: 0 as in the clean run, 1 as in the corrupt one
    probability: np.ndarray         # float64 [n_sender], of the answer
    kl: np.ndarray                  # float64 [n_sender], divergence from the clean run, in nats
    rank: np.ndarray                # float64 [n_sender], of the answer, 0 for the best token

    @property
    def values(self) -> np.ndarray:
        """The chosen metric: float64 [n_sender]."""
        return getattr(self, self.metric.replace("-", "_"))

    def __str__(self) -> str:
        return text(self)


def told(found: PathPatching, value: float) -> str:
    """A value of the chosen metric as text."""
    return f"{value:.0f}" if found.metric == "rank" else fixed(value)


def unit(found: PathPatching) -> str:
    """The meaning of the numbers of the chosen metric."""
    shown = f"share of the {MOVED}" if found.metric == "logit-difference" else UNITS[found.metric]
    return shown.format(visible(found.answer_piece), visible(found.against_piece))


def title(found: PathPatching) -> str:
    """The path: from each sender to the receivers."""
    at = found.about["settings"]["at"]
    where = "" if at is None else f", changed at {', '.join(map(str, at))}"
    return f"from each sender{where}, directly to {', '.join(found.reading)}"


def picture(found: PathPatching) -> Heatmap:
    """The heatmap: senders by layer, heads and FFN side by side, the embedding below the first layer."""
    cells = {name: ("tokens", "embedding") if name == "embedding" else
             (name[4:], "FFN") if name.startswith("ffn-") else tuple(name.split(".")) for name in found.senders}
    rows, columns = ({cell[i] for cell in cells.values()} for i in (0, 1))
    layers = [*["tokens"] * ("tokens" in rows), *sorted(rows - {"tokens"}, key=int)]
    others = [part for part in ("FFN", "embedding") if part in columns]
    parts = [*sorted(columns.difference(others), key=int), *others]
    values, hovers = np.full((len(layers), len(parts)), np.nan), [[""] * len(parts) for _ in layers]
    for k, (name, (layer, part)) in enumerate(cells.items()):
        i, j = layers.index(layer), parts.index(part)
        values[i, j], hovers[i][j] = found.values[k], hover(found, k, name)
    texts = [["" if np.isnan(v) else told(found, v) for v in row] for row in values]
    diverging = found.metric == "logit-difference"
    most = float(np.nanmax(np.abs(values), initial=1e-9))
    limits = {"logit-difference": (-most, most), "probability": (0.0, 1.0)}.get(found.metric)
    return Heatmap(values, layers, parts, title(found), "head", "layer", unit(found), texts, hovers,
                   diverging=diverging, limits=limits, upward=True)


def pictures(found: PathPatching) -> list[Heatmap]:
    """The heatmap of the senders, as a list."""
    return [picture(found)]


def hover(found: PathPatching, k: int, name: str) -> str:
    """The text shown when a cell is pointed at: all metrics of one path."""
    return (f"from {name} to {', '.join(found.receivers)}\n"
            f"share of the logit difference {found.logit_difference[k]:.4g}\nprobability {found.probability[k]:.4g}\n"
            f"KL from clean {found.kl[k]:.4g}\nrank {found.rank[k]:.0f}")


def largest(found: PathPatching, k: int) -> str:
    """A table of the senders whose path changes the logit difference the most, with all metrics."""
    by_size = found.kl if np.isnan(found.logit_difference).all() else found.logit_difference
    order = np.argsort(-np.abs(by_size), kind="stable")[:k]
    rows = [["sender", "share", "probability", "KL from clean", "rank"]]
    rows += [[found.senders[i], fixed(found.logit_difference[i], 4), f"{found.probability[i]:.4f}",
              f"{found.kl[i]:.4f}", f"{found.rank[i]:.0f}"] for i in order]
    return table(rows)


def text(found: PathPatching, k: int = 10) -> str:
    """The text that the terminal shows: the two unpatched runs, the heatmap, and the largest paths."""
    shown = picture(found).terminal(*screen()) if len(found.senders) > 1 else title(found)
    share = f"share: of the {MOVED.format(visible(found.answer_piece), visible(found.against_piece))}"
    return "\n\n".join([ends_table(found), shown, f"{largest(found, k)}\n{share}"])
