"""The sources of actions: rows of saved files, arrays and runs, and means over several of these.

Rows are chosen in each source before the mean is taken, so the sources may have different numbers of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymia_files import Error, Note, as_rows, read_tensor, short

from .given import indices, told, whole


def read_sources(source: Any, name: str, dims: Sequence[str], model: Any, asked: str) -> list[np.ndarray]:
    """The tensor `name` of each source, in the model's dtype, with the token axis first.

    A source is a file, an array, a mapping from names to arrays (a Run, a dict), or a tuple of these. A file whose only
    tensor has another name is accepted, with a Note; `asked` is what the caller asked for. Raises Error.
    """
    if isinstance(source, tuple):
        if not source:
            raise Error(f"{name}: a tuple of no sources")
        return [rows for one in source for rows in read_sources(one, name, dims, model, asked)]
    given, what, held = source, "the source", ""
    if isinstance(source, (str, Path)):
        what = str(source)
        given, held = read_tensor(source, name, model.about)
    elif hasattr(source, "__getitem__") and not isinstance(source, Sequence) and not hasattr(source, "__array__"):
        given = source[name]
    try:
        array = np.asarray(given, model.dtype)
    except (TypeError, ValueError) as e:
        raise Error(f"{name}: a source is a file, an array, a Run, or a tuple of these, not {short(source)}") from e
    rows = as_rows(array, name, dims, model.config.sizes(), what, held)
    if held not in ("", name):
        warnings.warn(f"{what} holds {held}; its rows go to {asked}", Note, stacklevel=3)
    return [rows]


def rows_for(source: np.ndarray, src: Any, at: Any, name: str) -> np.ndarray:
    """The rows of a source for a patch, [n_row, ...]: one per position in `at`, or all if `at` and `src` are None.

    With `src`, these rows; without it, the only row, or the rows at the same positions. Raises Error.
    """
    n, where = len(source), f"patch of {name}: "
    to = None if at is None else indices(at, "position", where=where)
    if src is not None:
        chosen = indices(src, "row", n, where)
        if to is None or len(chosen) != len(to):
            target = "all" if to is None else to.tolist()
            raise Error(f"{where}from {chosen.tolist()} to {target}: say as many positions to as from")
    elif to is None:
        return source
    else:
        chosen = to if n > 1 else np.zeros_like(to)
    if (chosen < -n).any() or (chosen >= n).any():
        raise Error(f"{where}no row {told(chosen)} in the source, which has {n} rows, 0 to {n - 1}")
    return source[chosen]


def read_row(source: Any, row: int | None, name: str, dims: Sequence[str], model: Any, asked: str) -> np.ndarray:
    """Row `row` of a source, or its only row; for several sources, the mean of these rows. Raises Error."""
    found = []
    for rows in read_sources(source, name, dims, model, asked):
        i = 0 if row is None and len(rows) == 1 else row
        if i is None or not -len(rows) <= whole(i, f"{name}: the row") < len(rows):
            raise Error(f"{name}: one vector is needed, and the source has {len(rows)} rows, 0 to {len(rows) - 1}: " + (
                f"there is no row {row}" if row is not None else
                "choose one (Add: row=I, --add: --from-token-idx I), or give one row alone"))
        found.append(rows[i])
    return mean(found, name)


def mean(parts: list[np.ndarray], name: str) -> np.ndarray:
    """The mean over sources of the rows chosen in each. Raises Error if their shapes differ."""
    if len({p.shape for p in parts}) != 1:
        shapes = " and ".join(str(list(p.shape)) for p in parts)
        raise Error(f"{name}: sources of {shapes} have no mean: choose as many rows in each, of the same width")
    return parts[0] if len(parts) == 1 else np.mean(parts, axis=0, dtype=parts[0].dtype)
