"""Choosing a token from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclass
class Sampler:
    """Chooses the next token, as llama.cpp's chain of these names does: penalty, top-k, top-p, min-p, temperature."""

    temp: float = 0.0           # 0: greedy
    top_k: int = 0              # keep the k best; 0: all
    top_p: float = 1.0          # keep the best that together have probability p
    min_p: float = 0.0          # keep those at least min_p times as probable as the best
    repeat_penalty: float = 1.0     # logits of the last 64 tokens: divided by it when positive, else multiplied
    seed: int | None = None     # None: another one each time

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("temp", 0 <= self.temp < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repeat_penalty", 0 < self.repeat_penalty < math.inf, "above 0"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {want}")
        self.random = np.random.default_rng(self.seed)

    def sample(self, logits: np.ndarray, seen: Sequence[int] = ()) -> int:
        """A token id from logits [n_vocab]; `seen` are the tokens before."""
        if self.repeat_penalty != 1.0 and len(seen):
            logits, last = logits.copy(), np.unique(seen[-64:])
            logits[last] *= np.where(logits[last] > 0, 1 / self.repeat_penalty, self.repeat_penalty).astype(np.float32)
        if self.temp == 0:
            return int(logits.argmax())
        ids = np.argsort(-logits, kind="stable")[: self.top_k or None]
        p = softmax(logits[ids].astype(np.float64))
        keep = (np.cumsum(p) - p < self.top_p) & (p >= self.min_p * p[0])
        keep[0] = True
        p = softmax(logits[ids[keep]].astype(np.float64) / self.temp)
        return int(self.random.choice(ids[keep], p=p))
