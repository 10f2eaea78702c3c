"""tinymia as the benchmark runs it. `python -m bench.ours MODEL THREADS N` is one pass of N tokens, for its memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tinymia


def prompt(n: int, n_vocab: int) -> list[int]:
    """n tokens of no meaning, the same in first_token.c."""
    return [3 + i * 7919 % (n_vocab - 3) for i in range(n)]


class Ours:
    """A loaded model: seconds of passes."""

    def __init__(self, path: Path, threads: int):
        self.model = tinymia.load(path, threads)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one decoded token reads: all but the embedding, of which it takes a row."""
        weights = self.model.weights
        tied = weights.output.weight is weights.token_embd
        return sum(w.nbytes for w in weights.values() if tied or w is not weights.token_embd)

    def prefill(self, ids: list[int], keep: str = "") -> float:
        """Seconds of one pass over a prompt, logits of its last token; keep: names of what is copied out of it."""
        clock = time.perf_counter()
        self.model.run(ids, keep=[keep] if keep else [], logits="last")
        return time.perf_counter() - clock

    def decode(self, ids: list[int], n: int) -> float:
        """Seconds of n passes over one token each, after a prompt, as generate() makes them; nothing is sampled."""
        model, cache, tap = self.model, self.model.cache(), tinymia.Tap(self.model, [])
        model.run(ids, logits="last", cache=cache)
        clock = time.perf_counter()
        for _ in range(n):
            model._pass(ids[:1], cache, tap, "decode", None, True)
        return time.perf_counter() - clock


def main(path: str, threads: str, n: str) -> None:
    """One pass over n tokens in this process."""
    ours = Ours(Path(path), int(threads))
    print(ours.prefill(prompt(int(n), ours.model.config.n_vocab)))


if __name__ == "__main__":
    main(*sys.argv[1:])
