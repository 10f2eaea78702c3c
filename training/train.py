"""The training: three stages, from random weights to copycat.

    python -m training.train --out build                # 30 to 50 minutes of one core; run it again to resume
    python -m training.train --out build0 --tv-weight 0 # the control: what emerges without the task-vector loss

Stage 1 is plain next-token prediction, after which the model learns from examples almost perfectly. Stage 2, of the
same length, adds the task-vector loss in every second step: the residual after layer 3 at the end of a few-shot
prompt must be enough to make a bare query be answered. Stage 3, a fifth as long, goes on with that at a lower rate
and draws the sequence tasks with answers of one symbol twice as often, because they are confused most easily (`first`
and `previous`).

The task-vector loss never sees the task `capital`, nor a held-out pair of any task. One seed decides everything: on one
machine, the same command gives the same weights.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinymia_files import Error
from tinymia_models.facts import Facts

from .command import Interrupted, Parser, run, say, stop_without_torch

try:
    import torch
except ImportError:
    stop_without_torch()

from .batches import Batches
from .checkpoint import Options, resume, save_checkpoint
from .model import Params, init_params, language_loss, task_vector_loss
from .optimiser import Optimiser
from .tokenizer import Vocab, train_tokenizer

STAGES = (1.0, 1.0, 0.2)  # lengths in units of --steps
PEAK_RATE = {1: 1.0, 2: 0.5, 3: 0.25}  # factor on both learning rates, by stage
TV_EVERY = 2  # steps between two uses of the task-vector loss
SAVE_EVERY = 60.0  # seconds between two checkpoints


def stage_of(step: int, steps: int) -> tuple[int, int, int]:
    """Return the stage that a step belongs to, counted from 1, its first step, and the step after its last."""
    first = 0
    for stage, length in enumerate(STAGES, 1):
        end = first + max(1, round(length * steps))
        if step < end or stage == len(STAGES):
            return stage, first, end
        first = end
    raise AssertionError("STAGES is empty")


def learning_rate(step: int, steps: int) -> float:
    """Return the factor on the learning rates: constant for 40 % of a stage, then linearly to zero.

    Each stage begins with a warm-up of 20 steps. The decay matters: before it `France ->` goes on with a continent,
    after it with a country.
    """
    stage, first, end = stage_of(step, steps)
    done = (step - first) / (end - first)
    return PEAK_RATE[stage] * min(1.0, (1.0 - done) / 0.6, (step - first + 1) / 20)


def train_step(
    p: Params, optimiser: Optimiser, batches: Batches, step: int, stage: int, opts: Options, n_unseen: int
) -> dict[str, float]:
    """Make one update and return the losses by name."""
    parts = [language_loss(p, *batches.language(step, stage, is_list), n_unseen) for is_list in (False, True)]
    loss = sum(s for s, _ in parts) / sum(n for _, n in parts)
    losses = {n: float((s / c).detach()) for n, (s, c) in zip(("words", "lists"), parts)}
    if stage >= 2 and opts.tv_weight and step % TV_EVERY == 0:
        for is_list in (False, True):
            tv = task_vector_loss(p, batches.task_vectors(step, stage, is_list), n_unseen)
            losses["tv-lists" if is_list else "tv-words"] = float(tv.detach())
            loss = loss + opts.tv_weight * tv
    if not math.isfinite(float(loss.detach())):
        raise Error(f"step {step}: the loss is {float(loss.detach())}; the last checkpoint is kept")
    loss.backward()
    optimiser.step(learning_rate(step, opts.steps))
    return losses


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of ending the program, so that a step is never cut in two."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def train(opts: Options, out: Path, threads: int, start_from: Path | None = None, log_every: int = 50) -> None:
    """Train all stages, with tokenizer and checkpoints in the folder `out`; go on from the checkpoint that is there.

    start_from: the stage1.pt of another run, whose first stage this run shares.
    """
    opts.check()
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    facts = Facts.read()
    path, first, seconds = out / "checkpoint.pt", 0, 0.0
    if not path.exists():
        train_tokenizer(facts, out / "copycat.model", opts.vocab_size)
    vocab = Vocab.read(out / "copycat.model", facts)
    n_unseen = len(vocab.pieces) - len(vocab.used)
    p = init_params(len(vocab.used) + 1, opts.seed)
    optimiser = Optimiser(p)
    if path.exists():
        first, seconds = resume(path, p, optimiser, opts)
        say(f"resuming {path} at step {first}")
    elif start_from:
        first, seconds = resume(start_from, p, optimiser, opts, after_stage_1=True)
        say(f"starting from {start_from} at step {first}")
    batches = Batches(facts, vocab, opts.seed)
    n_steps = stage_of(sys.maxsize, opts.steps)[2]
    say(f"{sum(w.numel() for w in p.values()):,} parameters, {len(vocab.pieces)} pieces, {len(vocab.used)} of them in "
        f"the corpus, {n_steps} steps")
    if first == n_steps:
        say("this run is complete; python -m training.export writes it as GGUF")

    began, last_save = time.monotonic() - seconds, time.monotonic()
    seen: dict[str, list[float]] = {}  # losses since the last line of the log
    with signals() as caught:
        for step in range(first, n_steps):
            stage, _, end = stage_of(step, opts.steps)
            for name, value in train_step(p, optimiser, batches, step, stage, opts, n_unseen).items():
                seen.setdefault(name, []).append(value)
            done, took = step + 1, time.monotonic() - began
            if done % log_every == 0:
                losses = " ".join(f"{n} {np.mean(v):.4f}" for n, v in seen.items())
                left = (n_steps - done) * (took - seconds) / (done - first)
                say(f"stage {stage} step {done}/{n_steps} {losses} | {took:.0f} s, {left:.0f} s to go")
                seen = {}
            if caught or done == end or time.monotonic() - last_save > SAVE_EVERY:
                save_checkpoint(path, p, optimiser, done, took, opts)
                last_save = time.monotonic()
            if done == end and stage < len(STAGES):
                save_checkpoint(out / f"stage{stage}.pt", p, optimiser, done, took, opts)
            if caught:
                raise Interrupted(f"interrupted after step {done}: {path} is kept, run the same command again to go on")


def work(args: argparse.Namespace) -> None:
    """Train as the flags say."""
    if not 1 <= args.threads <= 256:
        raise Error(f"--threads {args.threads}: it must be 1 to 256")
    train(Options(args.seed, args.steps, args.tv_weight, args.vocab_size), args.out, args.threads, args.start_from)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = Parser("training.train", __doc__)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where tokenizer and checkpoints go")
    p.add_argument("--seed", type=int, default=Options.seed, metavar="N", help="(%(default)s)")
    p.add_argument("--steps", type=int, default=Options.steps, metavar="N",
                   help="steps of stage 1 and of stage 2; stage 3 has a fifth (%(default)s)")
    p.add_argument("--tv-weight", type=float, default=Options.tv_weight, metavar="X",
                   help="weight of the task-vector loss from stage 2 on; 0 trains without it (%(default)s)")
    p.add_argument("--vocab-size", type=int, default=Options.vocab_size, metavar="N", help="pieces (%(default)s)")
    p.add_argument("--start-from", type=Path, metavar="FILE", help="another run's stage1.pt: share its first stage")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="(%(default)s)")
    return run(work, p, argv)


if __name__ == "__main__":
    raise SystemExit(main())
