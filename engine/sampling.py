"""Finding the best of many scores, and choosing a token from logits."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from tinymia_files import short

LARGEST = sys.float_info.max


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / (sum of exp(x)) along the last axis; the shape of x."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k greatest numbers along the last axis, the greatest first, equal ones in order: intp [..., k].

    Equal to np.argsort(-scores, kind="stable")[..., :k], but sorts only these k: a vocabulary has up to 256,000 tokens.
    """
    n = scores.shape[-1]
    if k >= n:
        return np.argsort(-scores, axis=-1, kind="stable")
    rows = -scores.reshape(-1, n)                                                   # [n_row, n]
    cuts = np.partition(rows, k - 1, axis=-1)[:, k - 1]                             # [n_row], the k-th of each
    found = np.empty((len(rows), k), np.intp)
    for i, (row, cut) in enumerate(zip(rows, cuts)):
        if cut == cut:
            ids = np.flatnonzero(row < cut)
            ids = np.concatenate([ids, np.flatnonzero(row == cut)[: k - len(ids)]])
            found[i] = ids[np.argsort(row[ids], kind="stable")]
        else:  # NaN, which sorts last
            found[i] = np.argsort(row, kind="stable")[:k]
    return found.reshape(*scores.shape[:-1], k)


@dataclass
class Sampler:
    """Chooses the next token by the steps of llama.cpp's samplers: penalty, top-k, top-p, min-p, temperature."""

    temp: float = 0.0           # 0: greedy
    top_k: int = 0              # keep the k best; 0: all
    top_p: float = 1.0          # keep the best tokens whose probabilities add up to top_p
    min_p: float = 0.0          # keep those at least min_p times as probable as the best
    repeat_penalty: float = 1.0     # the logits of the last 64 tokens are divided by it if positive, else multiplied
    seed: int | None = None     # None: different numbers each time

    def __post_init__(self) -> None:
        kind: Any
        for name, kind, ok, want in (
            ("temp", Real, lambda v: 0 <= v <= LARGEST, "a number, 0 or more"),
            ("top_k", Integral, lambda v: v >= 0, "a whole number, 0 or more"),
            ("top_p", Real, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
            ("min_p", Real, lambda v: 0 <= v <= 1, "a number, 0 to 1"),
            ("repeat_penalty", Real, lambda v: 0 < v <= LARGEST, "a number above 0"),
            ("seed", Integral, lambda v: v >= 0, "a whole number, 0 or more, or None"),
        ):
            value: Any = getattr(self, name)
            if value is None and name == "seed":
                continue
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind) or not ok(value):
                raise ValueError(f"{name} is {short(value)}: it must be {want}")
            setattr(self, name, float(value) if kind is Real else int(value))
        self.random = np.random.default_rng(self.seed)

    def sample(self, logits: np.ndarray, seen: Sequence[int] = ()) -> int:
        """Choose a token id from logits, float32 [n_vocab]; seen: the tokens before. Raises ValueError for NaN."""
        if self.repeat_penalty != 1.0 and len(seen):
            logits, last = logits.copy(), np.unique(seen[-64:])
            penalty = float(np.clip(self.repeat_penalty, 1e-38, 3e38))  # within float32, like the logits
            with np.errstate(over="ignore"):
                logits[last] = np.where(logits[last] > 0, logits[last] / np.float32(penalty),
                                        logits[last] * np.float32(penalty))
        token = int(logits.argmax())        # that of a NaN, if there is one
        most = logits[token]
        if math.isnan(most):
            raise ValueError("a logit is NaN")
        if self.temp == 0:
            return token
        # Subtract the greatest logit before dividing by the temperature, so that no probability overflows.
        x = np.where(logits == most, 0.0, -math.inf) if math.isinf(most) else logits.astype(np.float64) - float(most)
        with np.errstate(over="ignore", under="ignore"):
            ids = self._kept(x, logits) if self.top_k or self.top_p < 1 or self.min_p else None
            return int(self._draw(x, logits, ids))

    def _kept(self, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The ids that top-k, top-p and min-p keep, the best first. x: logits minus the greatest, float64 [n_vocab]."""
        most = min(self.top_k or len(x), len(x))
        n = most if self.top_k else min(64, most)
        ids = best(logits, n)
        total = float(np.exp(x[ids] if self.top_k else x).sum())
        while True:
            p = np.exp(x[ids]) / total
            before = np.cumsum(p) - p
            keep = (before < self.top_p) & (p >= self.min_p * p[0])
            if n == most or not keep[-1]:  # the probabilities fall, so the tokens after this one fail too
                keep[0] = True
                return ids[keep]
            n = min(8 * n, most)
            ids = best(logits, n)

    def _draw(self, x: np.ndarray, logits: np.ndarray, ids: np.ndarray | None) -> int:
        """Draw one of `ids`, or of all tokens if None, by its probability at the temperature.

        All tokens are sorted only as far as the draw needs.
        """
        e = np.exp((x if ids is None else x[ids]) / self.temp)
        at, n = self.random.random() * float(e.sum()), min(64, len(e)) if ids is None else len(e)
        while True:
            some = best(logits, n) if ids is None else ids
            weights = e[some] if ids is None else e
            place = int(np.searchsorted(np.cumsum(weights), at, side="right"))
            if place < n or n == len(e):
                last = int(np.count_nonzero(weights)) - 1
                return int(some[min(place, last)])  # rounding may put `at` beyond the last one
            n = min(8 * n, len(e))
