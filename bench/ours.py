"""tinymia as the benchmark runs it. `python -m bench.ours MODEL THREADS N` runs a pass of N tokens, for its memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tinymia


def prompt(n: int, n_vocab: int) -> list[int]:
    """A prompt of n arbitrary token ids; first_token.c makes the same."""
    return [3 + i * 7919 % (n_vocab - 3) for i in range(n)]


class Ours:
    """A loaded model, whose passes are timed."""

    def __init__(self, path: Path, threads: int):
        self.model = tinymia.load(path, threads)

    @property
    def bytes_read(self) -> int:
        """The bytes of weights that one decoded token reads: all except the embedding, of which only a row is read."""
        weights = self.model.weights
        tied = weights.output.weight is weights.token_embd
        return sum(w.nbytes for w in weights.values() if tied or w is not weights.token_embd)

    def prefill(self, ids: list[int], keep: str = "") -> float:
        """The seconds of one pass over a prompt, with logits of its last token; keep: names of tensors to copy."""
        clock = time.perf_counter()
        self.model.run(ids, keep=[keep] if keep else [], logits="last")
        return time.perf_counter() - clock

    def decode(self, ids: list[int], n: int) -> float:
        """The seconds of n passes over one token each, after a prompt, as in generate(), without sampling."""
        model, cache, tap = self.model, self.model.cache(), tinymia.Tap(self.model, [])
        model.run(ids, logits="last", cache=cache)
        clock = time.perf_counter()
        for _ in range(n):
            model._pass(ids[:1], cache, tap, "decode", None, True)
        return time.perf_counter() - clock


def main(path: str, threads: str, n: str) -> None:
    """Run one pass over n tokens in this process, and print its seconds."""
    ours = Ours(Path(path), int(threads))
    print(ours.prefill(prompt(int(n), ours.model.config.n_vocab)))


if __name__ == "__main__":
    main(*sys.argv[1:])
