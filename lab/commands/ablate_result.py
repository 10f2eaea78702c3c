"""The result of `tinymia ablate`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..measure.head_ablation import METRICS
from ..pictures.heatmap import Heatmap
from ..pictures.terminal import screen, signed, table, visible
from ..runs.result import Result
from .ablate_groups import GroupAblation, groups_map, groups_text, in_words


@dataclass
class Ablation(Result):
    """The metrics with one head ablated at a time; NaN, or -1, where a head was not chosen or is not done yet."""

    pieces: list[str]           # of the prompt's tokens, [n_tok]
    answer: int                 # ids
    against: int
    answer_piece: str
    against_piece: str
    metrics: list[str]          # logit-difference, logit and probability of the answer, kl: [n_metric]
    plain: np.ndarray           # float64 [n_metric]: of the unchanged run
    values: np.ndarray          # float64 [n_metric, n_layer, n_head]; kl: from the unchanged run, in nats
    best: np.ndarray            # int32 [n_layer, n_head]: id of the best token
    best_pieces: list[list[str]]
    means: np.ndarray           # float64 [n_layer, n_head, d_head_v]: for mode mean, over the prompts so far
    n_means: np.ndarray         # int64 []: the number of prompts in the means so far

    @property
    def effects(self) -> np.ndarray:
        """The metrics minus those of the unchanged run: float64 [n_metric, n_layer, n_head]."""
        return self.values - self.plain[:, None, None]

    def __str__(self) -> str:
        return text(self)


def ranked(found: Ablation, metric: str) -> list[tuple[int, int]]:
    """The heads, as (layer, head), by the size of their effect, the largest first."""
    effects = np.nan_to_num(np.abs(found.effects[METRICS.index(metric)]), nan=-1.0)
    order = np.argsort(-effects, axis=None, kind="stable")
    return [(int(i) // effects.shape[1], int(i) % effects.shape[1]) for i in order if effects.flat[i] >= 0]


def heads_table(found: Ablation, metric: str, k: int) -> str:
    """A table of the k heads with the largest effects: all metrics, and the best token without the head."""
    mark = ["effect"] + [f"{name} *" if name == metric else name for name in found.metrics]
    rows = [["head", *mark, "says"], ["none", "", *(f"{v:.4g}" for v in found.plain), ""]]
    for il, head in ranked(found, metric)[:k]:
        effect = found.effects[METRICS.index(metric), il, head]
        rows.append([f"{il}.{head}", signed(effect), *(f"{v:.4g}" for v in found.values[:, il, head]),
                     visible(found.best_pieces[il][head])])
    return table(rows)


def heatmap(found: Ablation, metric: str = METRICS[0]) -> Heatmap:
    """The effects as a heatmap, layer x head."""
    effects = found.effects[METRICS.index(metric)]
    layers, heads = ([str(i) for i in range(n)] for n in effects.shape)

    def hover(il: int, head: int) -> str:
        lines = [[name, f"{v:.4g}", f"{v - p:+.4g}"] for name, v, p in
                 zip(found.metrics, found.values[:, il, head], found.plain)]
        return f"head {il}.{head}, says {visible(found.best_pieces[il][head])}\n{table(lines)}"

    settings = found.about["settings"]
    where = "" if settings["at"] is None else f" at {settings['at']}"
    return Heatmap(
        effects, layers, heads, f"effect of each head's ablation ({settings['mode']}{where}): "
        + visible(found.about["prompts"]["prompt"]["text"]), "head", "layer", f"change of {in_words(found, metric)}",
        hovers=[[hover(il, head) for head in range(len(heads))] for il in range(len(layers))], diverging=True,
        upward=True,
    )


def pictures(found: Ablation | GroupAblation, metric: str = METRICS[0]) -> list[Heatmap]:
    """The heatmap of the effects in one metric, of single heads or of groups."""
    return [groups_map(found, metric) if isinstance(found, GroupAblation) else heatmap(found, metric)]


def text(found: Ablation | GroupAblation, metric: str = METRICS[0], k: int = 20) -> str:
    """The text that the terminal shows."""
    if isinstance(found, GroupAblation):
        return groups_text(found, metric, k)
    picture = heatmap(found, metric)
    return f"{picture.terminal(*screen())}\n\n{picture.unit}, the largest first\n{heads_table(found, metric, k)}"
