"""Several continuations of one sequence, run as one batch, so that every weight is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinymia import Cache, Error

ROWS = 512  # the most rows in a batch: larger batches are not faster per row


class Branches(Cache):
    """A cache for one pass over several branches: branch i has its own positions starts[i] to end - 1, after `base`'s.

        Model.run(tokens, cache=Branches(base, [9, 7, 7], 10), start=(il, x), logits="last").logits     # [3, n_vocab]

    The rows of a pass are those of the first branch, then those of the next: here 1 + 3 + 3. Products with weights run
    on all rows as one batch; RoPE, storing and attention use each row's own position. The base is only read, so that
    several threads may branch from it; keys and values of branches are kept for their layer only.
    Later starts must come first. Raises Error for starts in another order, and for starts beyond the base.
    """

    def __init__(self, base: Cache, starts: Sequence[int], end: int):
        if not starts or list(starts) != sorted(starts, reverse=True) or not 0 <= starts[-1] <= starts[0] <= base.n:
            raise Error(f"branches start at {list(starts)}: it must be at up to {base.n}, later ones first")
        if starts[0] >= end:
            raise Error(f"branches that start at {starts[0]} have no rows: they end before {end}")
        self.base, self.config, self.numerics, self.n = base, base.config, base.numerics, 0
        self.k = self.v = [np.zeros(0)] * base.config.n_layer   # not used: `ops` looks into the base
        self.places = np.concatenate([np.arange(start, end) for start in starts])       # [n_tok]
        self.ends = np.cumsum([end - start for start in starts])                        # [n_branch]
        self.parts = [(slice(stop - (end - start), stop), start) for stop, start in zip(self.ends.tolist(), starts)]

    def reserve(self, n: int) -> None:
        """Make room for n positions in the base."""
        self.base.reserve(n)

    def truncate(self, n: int) -> None:
        """Do nothing: a branch keeps nothing that could be dropped."""

    def positions(self, n_tok: int) -> np.ndarray:
        """The sequence positions of all rows, intp [n_tok]. Raises Error for another number of tokens."""
        if n_tok != len(self.places):
            raise Error(f"{n_tok} tokens for branches that have {len(self.places)} together")
        return self.places

    def last(self, x: np.ndarray) -> np.ndarray:
        """The last row of each branch: [n_branch, ...]."""
        return x[self.ends - 1]

    def store(self, il: int, k: np.ndarray, v: np.ndarray, ops: Any) -> None:
        """Hold the keys and values of all rows of layer il until the next layer."""
        self.il, self.rows, self.put = il, (k, v), ops.put

    def ops(self, ops: Any) -> Any:
        """The arithmetic `ops`, with attention done branch by branch, each on its own keys and values."""
        if len(self.places) > 1:    # even a branch of one row is then part of a larger pass
            ops = ops.several()

        def scores(q: np.ndarray, keys: np.ndarray, n_kv: int) -> np.ndarray:
            return np.concatenate([ops.scores(q[rows], k, n_kv) for rows, k, _ in self._each()], axis=1)

        def soft_max(
            kq: np.ndarray, scale: float, positions: np.ndarray, window: int | None = None
        ) -> np.ndarray:
            parts = [ops.soft_max(np.ascontiguousarray(kq[:, rows]), scale, positions[rows], window)
                     for rows, _ in self.parts]
            return np.concatenate(parts, axis=1)

        def mix(pattern: np.ndarray, values: np.ndarray) -> np.ndarray:
            parts = [ops.mix(np.ascontiguousarray(pattern[:, rows]), v) for rows, _, v in self._each()]
            return np.concatenate(parts, axis=1)

        def attention(
            q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, positions: np.ndarray,
            window: int | None = None, cap: float | None = None,
        ) -> np.ndarray:
            parts = [ops.attention(q[rows], k, v, scale, positions[rows], window, cap) for rows, k, v in self._each()]
            return np.concatenate(parts)

        return Wrapped(ops, scores=scores, soft_max=soft_max, mix=mix, attention=attention)

    def _each(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield (rows, keys, values) of one branch after another, in the same two arrays.

        A branch writes nothing before its start, and the next branch starts no later, so it sees no foreign rows.
        """
        k, v = self.base.k[self.il].copy(), self.base.v[self.il].copy()
        for rows, start in self.parts:
            self.put(k, v, self.rows[0][rows], self.rows[1][rows], start)
            yield rows, k, v


class Wrapped:
    """An object with the attributes of another one, some of them replaced."""

    def __init__(self, inner: Any, **replaced: Any):
        self._inner = inner
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
