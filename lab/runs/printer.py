"""The output of the command `tinymia` beside the text: the graph, and what actions recorded."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import tinymia
from tinymia import Error, Model, Record


def two_digits(score: float) -> str:
    """A score in two significant digits, without an exponent if it is not very large or small: 190, not 1.9e+02."""
    return f"{float(f'{score:.2g}'):g}"


class Printer:
    """Prints the records of actions as they come, or collects them for --json."""

    def __init__(self, args: argparse.Namespace, model: Model):
        self.args, self.model = args, model
        self.out: dict[str, Any] = {
            "tinymia": tinymia.__version__, "model": str(model.path), "numerics": model.numerics,
            "lens": [], "log": [], "saved": [],
        }
        self.patterns: dict[int, np.ndarray] = {}
        self.rows: set[int] | None = None       # positions that the lens shows; None: all

    def begin(self, n_tok: int) -> None:
        """Take the number of tokens of the prompt. Raises Error for a --lens-position beyond it."""
        for position in self.args.lens_position or ():
            if not -n_tok <= position < n_tok:
                raise Error(f"--lens-position {position}: the prompt has {n_tok} tokens, 0 to {n_tok - 1}")
            self.rows = (self.rows or set()) | {position % n_tok}

    def line(self, text: str) -> None:
        """Print a line, unless --json is given."""
        if not self.args.json:
            print(text)

    def record(self, r: Record) -> None:
        """Print or collect a record of an action."""
        about = {"tensor": r.name, "layer": r.layer, "phase": r.phase}
        if isinstance(r.action, tinymia.Lens):
            self.line(f"Layer #{r.layer} {r.name}:" if r.layer is not None else f"{r.name}:")
            seen = [(p, best) for p, best in zip(r.positions.tolist(), r.value) if self.rows is None or p in self.rows]
            for position, best in seen:
                shown = "".join(f"{piece} {two_digits(score)}|" for piece, score in best)
                self.line(f"{position}: {shown or 'NaN: no tokens'}")
            rows = [{"position": p, "best": best} for p, best in seen]
            self.out["lens"].append({**about, "rows": rows})
        elif isinstance(r.action, tinymia.Log):
            first = " ".join(f"{v:.4g}" for v in r.value["first"])
            numbers = " ".join(f"{k} {r.value[k]:.4g}" for k in ("mean", "rms", "min", "max"))
            self.line(f"{r.name} {r.value['shape']} {numbers} first {first}")
            self.out["log"].append({**about, **r.value})
        elif isinstance(r.action, tinymia.Save) and r.action.path is not None:
            self.out["saved"].append({**about, "file": str(r.action.path), "shape": list(r.value.shape)})
        elif r.layer is not None:
            self.patterns[r.layer] = r.value
