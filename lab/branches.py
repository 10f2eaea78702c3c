"""Several continuations of one sequence, run as one batch, so that every weight is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tinymia import Cache, Error
from tinymia_kernels import Pool, attention, kq, kqv, soft_max, store_keys, store_values

ROWS = 512  # of a batch: more does not make a row cheaper


class Branches(Cache):
    """Branch i has the positions starts[i] to end - 1 to itself, and sees before them what `base` holds.

        Model.run(tokens, cache=Branches(base, [9, 7, 7], 10), start=(il, x), logits="last").logits     # [3, n_vocab]

    The rows of a pass are those of the first branch, then those of the next: here 1 + 3 + 3. Products with weights see
    one batch; turning, storing and attending are done as at each row's own place. The base is read and never written,
    so that several threads may branch from it; keys and values of branches are not kept after their layer.
    Later starts come first. Raises Error for starts in another order, and beyond the base.
    """

    def __init__(self, base: Cache, starts: Sequence[int], end: int):
        if not starts or list(starts) != sorted(starts, reverse=True) or not 0 <= starts[-1] <= starts[0] <= base.n:
            raise Error(f"branches start at {list(starts)}: it must be at up to {base.n}, later ones first")
        if starts[0] >= end:
            raise Error(f"branches that start at {starts[0]} have no rows: they end before {end}")
        self.base, self.of, self.n = base, base.of, 0
        self.places = np.concatenate([np.arange(start, end) for start in starts])       # [n_tok]
        self.ends = np.cumsum([end - start for start in starts])                        # [n_branch]
        self.parts = [(slice(stop - (end - start), stop), start) for stop, start in zip(self.ends.tolist(), starts)]

    def reserve(self, n: int) -> None:
        self.base.reserve(n)

    def truncate(self, n: int) -> None:
        """Nothing is kept, so nothing is to be forgotten."""

    def positions(self, n_tok: int) -> np.ndarray:
        if n_tok != len(self.places):
            raise Error(f"{n_tok} tokens for branches that have {len(self.places)} together")
        return self.places

    def last(self, x: np.ndarray) -> np.ndarray:
        """Of each branch its last row: [n_branch, ...]."""
        return x[self.ends - 1]

    def store(self, il: int, k: np.ndarray, v: np.ndarray) -> None:
        self.rows = k, v

    def kq(self, il: int, q: np.ndarray) -> np.ndarray:
        n_kv, alone = int(self.places[-1]) + 1, len(self.places) == 1
        return np.concatenate([kq(q[rows], k, n_kv, alone=alone) for rows, _, k, _ in self._each(il)], axis=1)

    def soft_max(self, kq: np.ndarray, scale: np.float32) -> np.ndarray:
        parts = [soft_max(np.ascontiguousarray(kq[:, rows]), scale, start) for rows, start in self.parts]
        return np.concatenate(parts, axis=1)

    def kqv(self, il: int, pattern: np.ndarray) -> np.ndarray:
        alone = len(self.places) == 1
        parts = [kqv(np.ascontiguousarray(pattern[:, rows]), v, alone=alone) for rows, _, _, v in self._each(il)]
        return np.concatenate(parts, axis=1)

    def attention(self, il: int, q: np.ndarray, scale: np.float32, pool: Pool) -> np.ndarray:
        alone = len(self.places) == 1
        parts = [attention(q[rows], k, v, start, scale, pool, alone) for rows, start, k, v in self._each(il)]
        return np.concatenate(parts)

    def _each(self, il: int) -> Iterator[tuple[slice, int, np.ndarray, np.ndarray]]:
        """(rows, start, keys, values) of a branch after another, in the same two arrays.

        A branch overwrites nothing before its start, and the next one starts no later.
        """
        k, v = self.base.k[il].copy(), self.base.v[il].copy()
        for rows, start in self.parts:
            store_keys(k, self.rows[0][rows], start)
            store_values(v, self.rows[1][rows], start)
            yield rows, start, k, v
