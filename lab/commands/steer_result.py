"""The result of `tinymia steer`, its text and its control vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..measure.control_vector import write_control_vector
from ..pictures.terminal import table, visible
from ..runs.result import Result


@dataclass
class Steering(Result):
    """A vector per layer, and the continuations without and with it."""

    layers: list[int]       # the layers to which it is added
    vectors: np.ndarray     # float32 [n_layer, n_embd]; NaN for layers without one
    means: np.ndarray       # float64 [2, n_layer, n_embd]: of the positive and of the negative prompts so far
    counts: np.ndarray      # int64 [2]: the number of prompts in the means so far
    plain: str | None       # text without the vector; None without a prompt
    plain_tokens: list[int]
    texts: list[dict[str, Any]]     # coef, text, tokens: one for each coefficient
    best: list[list[list[str]]] = field(default_factory=list)   # by layer: the tokens that its vector raises most, and
                                    # those that it lowers most, through the lens; none for a layer without a vector

    def directions(self) -> dict[int, np.ndarray]:
        """The vectors of the chosen layers, float32 [n_embd] by layer."""
        return {il: self.vectors[il] for il in self.layers}

    def __str__(self) -> str:
        return text(self)


def text(found: Steering) -> str:
    """The text that the terminal shows: a table of the layers' vectors, and the continuations.

    The table has the length of each vector (* if it is added), that of the mean of the prompts, and the best tokens
    through the lens.
    """
    rows = [["layer", "length", "of the mean", "towards", "away from"]]
    for il in np.flatnonzero(np.isfinite(found.vectors).all(1)).tolist():
        v, mean = found.vectors[il], found.means[:, il].mean(0)
        best = [" ".join(map(visible, pieces)) for pieces in found.best[il]]
        rows.append([f"{il}{' *' if il in found.layers else ''}", f"{np.linalg.norm(v):.3g}",
                     f"{np.linalg.norm(mean):.3g}" if np.isfinite(mean).all() else "", *best])
    said = [] if found.plain is None else ["", f'without: "{found.plain}"']
    said += [f'coef {t["coef"]:g}: "{t["text"]}"' for t in found.texts]
    return "\n".join([table(rows), *said])


def write_gguf(found: Steering, path: Path) -> None:
    """Write the vectors of the chosen layers as a control vector of llama.cpp."""
    write_control_vector(path, found.directions(), "llama", found.about)
