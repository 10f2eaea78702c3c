"""How long a gradient takes, as a multiple of the forward pass: `python -m bench.gradients MODEL... [-t N] [--torch]`.

The backward pass is `Model.gradients` with respect to the embeddings, minus the forward pass that is in it. With one
thread the seconds are those that the CPU worked, with more they are the clock's. --torch also times torch's autograd in
float32 on the decoded weights of a Llama.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(f: Callable[[], object], repeats: int, threads: int) -> float:
    """The shortest of some runs, after one that is not counted."""
    f()
    found, clock = [], time.process_time if threads == 1 else time.perf_counter
    for _ in range(repeats):
        begun = clock()
        f()
        found.append(clock() - begun)
    return min(found)


def ours(path: str, threads: int, n_tok: int, repeats: int) -> None:
    """Print a row per numerics: a gradient of one logit, which needs little of the output matrix, and of the loss."""
    import tinymia

    from .ours import prompt

    for numerics in ("f32", "ggml"):
        model = tinymia.load(path, threads, numerics)
        ids = prompt(n_tok, model.config.n_vocab)
        for of, logits in ((tinymia.Logit(300), "last"), (tinymia.Loss(), "all")):
            forward = seconds(lambda model=model, ids=ids, rows=logits: model.run(ids, logits=rows), repeats,
                              threads)
            both = seconds(lambda model=model, ids=ids, of=of: model.gradients(ids, of, "inp_embd"), repeats,
                           threads)
            row(f"{model.config.name} {numerics}", type(of).__name__, n_tok, forward, both)


def theirs(path: str, threads: int, n_tok: int, repeats: int) -> None:
    """Print the same rows for torch."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from torch_llama import Llama

    from .ours import prompt

    torch.set_num_threads(threads)
    model = Llama(path, torch.float32)
    ids = prompt(n_tok, len(model.w["token_embd.weight"]))

    def forward() -> Any:
        return model.forward(ids, lambda name, x: x)

    for name, of in (("logit", lambda x: x[-1, 300]),
                     ("loss", lambda x: torch.nn.functional.cross_entropy(x[:-1], torch.tensor(ids[1:])))):
        with torch.no_grad():
            alone = seconds(forward, repeats, threads)
        both = seconds(lambda of=of: of(forward()).backward(), repeats, threads)
        row("torch float32", name, n_tok, alone, both)


def row(who: str, of: str, n_tok: int, forward: float, both: float) -> None:
    """Print one row."""
    print(f"{who:38} {of.lower():6} {n_tok:5} tokens  forward {forward:7.3f} s  backward {both - forward:7.3f} s  "
          f"{both / forward - 1:5.2f} x", flush=True)


def main() -> int:
    """Time what the command line names. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="MODEL", help="GGUF files")
    p.add_argument("-t", "--threads", type=int, default=1)
    p.add_argument("-n", "--tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--torch", action="store_true")
    args = p.parse_args()
    if os.environ.setdefault("OPENBLAS_NUM_THREADS", str(args.threads)) != str(args.threads):
        print(f"note: OPENBLAS_NUM_THREADS is {os.environ['OPENBLAS_NUM_THREADS']}", file=sys.stderr)
    for path in args.models:
        ours(path, args.threads, args.tokens, args.repeats)
        if args.torch:
            theirs(path, args.threads, args.tokens, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
