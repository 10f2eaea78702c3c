"""The layers, heads and positions that a caller chooses, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinymia import Error
from tinymia_engine import indices, out_of_range, whole


def chosen(wanted: str | Sequence[int] | None, n: int, what: str) -> list[int]:
    """The chosen ones of n layers or heads: from numbers, a mask, or a text such as 0,3-5; None: all. Raises Error."""
    if wanted is None:
        return list(range(n))
    if isinstance(wanted, str):
        try:
            ends = [[int(end) for end in part.split("-", 1)] for part in wanted.split(",")]
        except ValueError:
            raise Error(f"{what}s {wanted!r}: write 0,3-5 for {what}s 0, 3, 4 and 5") from None
        wanted = [i for end in ends for i in range(end[0], end[-1] + 1)]
    numbers = sorted(set(indices(wanted, what, n).tolist()))
    for i in numbers:
        if not 0 <= i < n:
            raise Error(out_of_range(what, i, n, f"{what}s"))
    return numbers


def position_of(position: int, n_tok: int, whose: str = "the prompt") -> int:
    """A position counted from 0; a negative one counts from the end. Raises Error if it is out of range."""
    if not -n_tok <= whole(position, "the position") < n_tok:
        raise Error(out_of_range("position", position, n_tok, "tokens", f"{whose} has"))
    return position % n_tok


def positions(at: int | Sequence[int] | None, n_tok: int, whose: str) -> np.ndarray:
    """Positions counted from 0, each at most once, intp [n_position]; None: all. Raises Error."""
    wanted = list(range(n_tok)) if at is None else indices(at, "position", n_tok).tolist()
    rows = [position_of(i, n_tok, whose) for i in wanted]
    if len(set(rows)) < max(len(rows), 1):
        raise Error(f"positions {wanted}: at least one is needed, and each only once")
    return np.array(rows, np.intp)
