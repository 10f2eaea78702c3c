"""`tinymia sweep`: activation patching. Which pieces of one run bring its answer along when they are put into another?

The clean prompt has the answer; the corrupt prompt differs in a word or two, and has another answer. Denoising puts one
piece of the clean run into the corrupt run, and measures how much of the clean answer comes back: this shows what is
sufficient. Noising puts a piece of the corrupt run into the clean run, and measures how much is lost: this shows what
is necessary. The logit difference (LD) of the two answers is given as (LD - LD_corrupt) / (LD_clean - LD_corrupt): 0 as
in the corrupt run, 1 as in the clean one.

Sources: Meng et al., Locating and Editing Factual Associations in GPT (2022), arXiv 2202.05262; Heimersheim, Nanda, How
to use and interpret activation patching (2024), arXiv 2404.15255.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model
from tinymia_engine import whole

from ..flags.arguments import escape_flag, typed
from ..flags.chat import chat_flags, in_chat
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser, least
from ..flags.prompt_notes import tell_unknown
from ..measure.answers import token_or
from ..measure.estimate import estimated, largest
from ..measure.patching import (
    BY_HEAD,
    BY_POSITION,
    METRICS,
    Batch,
    Runs,
    Setting,
    batches,
    check_aligned,
    check_ends,
    measure,
    run_batch,
    runs_of,
)
from ..measure.selection import chosen
from ..measure.sinks import tell_sink
from ..pictures.terminal import visible
from ..runs.executors import spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .sweep_result import Sweep, picture, pictures, text

__all__ = ["Sweep", "command", "picture", "sweep"]
EPILOG = """\
l_out, kqv_out and ffn_out are patched at each layer and position; kqv, a head's output, and kq_soft_max, its attention
pattern, at each layer and head.
  tinymia sweep --clean "Egypt -> Cairo, France ->" --corrupt "Egypt -> Cairo, Norway ->" -o sweep.png
  tinymia sweep --clean ... --corrupt ... --tensor kqv --estimate --check 10
  tinymia sweep --clean ... --corrupt ... --tensor kqv --noising --metric kl --answer Paris --against Oslo
"""


def sweep(
    model: Model, clean: str | Sequence[int], corrupt: str | Sequence[int], answer: str | int | None = None,
    against: str | int | None = None, *, tensor: str = "l_out", metric: str = "logit-difference", noising: bool = False,
    at: str = "all", layers: str | Sequence[int] | None = None, estimate: bool = False, steps: int | None = None,
    check: int = 0, executor: Executor | None = None, out: str | Path | None = None,
) -> Sweep:
    """Run activation patching between two prompts with equally many tokens, one cell per patch.

    answer, against: text or id; by default the best token of the clean and of the corrupt run. tensor: l_out, kqv_out
    or ffn_out, by layer and position; kqv or kq_soft_max, by layer and head. metric: logit-difference, probability, kl
    or rank; all four are kept. noising: corrupt into clean. at: "all" rows of a head, or its "last" one. layers: such
    as "0,3-5". estimate: only the logit difference, of all cells from one gradient, or from the mean of `steps`; the
    `check` largest cells are then also patched. An executor gets batches of cells. `out`, a .npz or .json file, keeps
    the result, and a stopped run continues from it. Raises Error.
    """
    for what, given, possible in (("tensor", tensor, BY_POSITION + BY_HEAD), ("metric", metric, METRICS),
                                  ("at", at, ("all", "last"))):
        if given not in possible:
            raise Error(f"{what} {given!r}: it must be one of {', '.join(possible)}")
    if at == "last" and tensor in BY_POSITION:
        raise Error(f"at=last goes with {' and '.join(BY_HEAD)}: {tensor} is patched at each position by itself")
    check_estimate(estimate, metric, steps, check)
    c, names = model.config, {"clean": clean, "corrupt": corrupt}
    ids = {name: tuple(model.ids(p)) for name, p in names.items()}
    check_aligned(model, ids["clean"], ids["corrupt"])
    wanted = chosen(layers, c.n_layer, "layer")
    setting = Setting(ids["clean"], ids["corrupt"], tensor, noising, at == "last", 0, 0)
    runs = runs_of(model, setting)
    token = token_or(model, answer, clean, int(runs.clean.argmax()))
    other = token_or(model, against, clean, int(runs.corrupt.argmax()))
    setting = Setting(ids["clean"], ids["corrupt"], tensor, noising, at == "last", token, other)
    ends = measure(np.stack([runs.clean, runs.corrupt]), runs.clean, token, other)      # [2, 4]
    if metric == METRICS[0]:
        check_ends(model, ids["clean"], ids["corrupt"], token, other, ends)
    settings = {"tensor": tensor, "noising": noising, "at": at, "layers": wanted, "answer": token, "against": other}
    if estimate:
        settings |= {"estimate": True, "steps": steps or 1, "check": check}
    note = about(model, "sweep", settings, clean=clean, corrupt=corrupt)
    found = resume(out, note, Sweep) or _nothing(model, note, setting, wanted, ends)
    found.metric = metric
    if estimate:
        if not np.isfinite(found.logit_difference).all():
            _estimate(found, model, setting, runs, ends, executor)
            if out is not None:
                found.save(out)
        return found
    work: list[Batch] = []
    done = int(np.isfinite(found.kl).sum())
    with keeping(found, out, found.kl.size, "sweep", done) as bar:
        for i, il in enumerate(wanted):
            known, todo = batches(setting, runs, il, np.flatnonzero(np.isnan(found.kl[i])).tolist())
            _fill(found, i, known, ends[0 if noising else 1], ends)
            bar.step(len(known))
            work += todo
        for batch, scores in zip(work, spread(model, run_batch, work, executor)):
            _fill(found, wanted.index(batch.layer), batch.columns, scores, ends)
            bar.step(len(batch.columns))
    return found


def _nothing(model: Model, note: dict[str, Any], setting: Setting, layers: list[int], ends: np.ndarray) -> Sweep:
    """A result with nothing done."""
    clean, corrupt = ([model.piece(i) for i in ids] for ids in (setting.clean, setting.corrupt))
    columns = [str(head) for head in range(model.config.n_head)]
    if setting.tensor in BY_POSITION:
        texts = [list(map(visible, pieces)) for pieces in (clean, corrupt)]
        columns = [f"{i} {a}" if a == b else f"{i} {a}/{b}" for i, (a, b) in enumerate(zip(*texts))]
    shape = len(layers), len(columns)
    grids = [np.full(shape, np.nan) for _ in METRICS]
    tokens = setting.answer, model.piece(setting.answer), setting.against, model.piece(setting.against)
    whole: list[Any] = [dict(zip(METRICS, row.tolist())) for row in ends]
    return Sweep(note, METRICS[0], layers, columns, clean, corrupt, *tokens, *whole, *grids)


def check_estimate(estimate: bool, metric: str, steps: int | None, check: int) -> None:
    """Raise Error for an estimate of what has none, and for what goes with an estimate only."""
    if not estimate and (steps is not None or check):
        raise Error("--steps and --check go with --estimate (in Python steps=, check=, estimate=True)")
    if estimate and metric != METRICS[0]:
        raise Error(f"an estimate is of the logit difference, and there is none of metric {metric}")
    for name, value, low in (("steps", 1 if steps is None else steps, 1), ("check", check, 0)):
        if whole(value, name) < low:
            raise Error(f"{name} is {value}: it must be {low} or more")


def _estimate(
    found: Sweep, model: Model, setting: Setting, runs: Runs, ends: np.ndarray, executor: Executor | None
) -> None:
    """Fill in the estimates, and patch the cells that are to be checked."""
    s, base, length = found.about["settings"], ends[0 if setting.noising else 1, 0], ends[0, 0] - ends[1, 0]
    cells = estimated(model, setting, runs, found.layers, s["steps"])
    found.logit_difference[:], found.exact = (base + cells - ends[1, 0]) / length, np.full(cells.shape, np.nan)
    work: list[Batch] = []
    for i, same, todo in largest(setting, runs, found.layers, cells, s["check"]):
        found.exact[i, same] = (base - ends[1, 0]) / length
        work += todo
    for batch, scores in zip(work, spread(model, run_batch, work, executor)):
        found.exact[found.layers.index(batch.layer), batch.columns] = (scores[:, 0] - ends[1, 0]) / length


def _fill(found: Sweep, i: int, columns: list[int], scores: np.ndarray, ends: np.ndarray) -> None:
    """Set cells of row i: scores [n_cell, 4] or [4]; ends [2, 4]: the scores of the unpatched clean and corrupt run."""
    with np.errstate(all="ignore"):  # NaN where both runs have the same logit difference
        found.logit_difference[i, columns] = (scores[..., 0] - ends[1, 0]) / (ends[0, 0] - ends[1, 0])
    found.probability[i, columns], found.rank[i, columns] = scores[..., 1], scores[..., 3]
    found.kl[i, columns] = scores[..., 2]  # set last: a cell that is not NaN here is done


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the two prompts and their answers, and of what is patched, measured and shown."""
    p.add_argument("--clean", required=True, metavar="TEXT", help="the prompt that has the answer")
    p.add_argument("--corrupt", required=True, metavar="TEXT", help="a prompt of as many tokens, with another answer")
    escape_flag(p, "--clean and --corrupt")
    chat_flags(p)
    pair_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="or #id; default: the clean run's best token")
    p.add_argument("--against", metavar="TEXT", help="or #id; default: the corrupt run's best token")
    p.add_argument("--tensor", choices=BY_POSITION + BY_HEAD, default="l_out")
    p.add_argument("--metric", choices=METRICS, default=METRICS[0], help="the metric to show; all four are kept")
    p.add_argument("--noising", action="store_true", help="patch corrupt into clean instead of clean into corrupt")
    p.add_argument("--at", choices=("all", "last"), default="all", help="rows of a head that are patched")
    p.add_argument("--layers", metavar="LIST", help="such as 0,3-5 (default: all)")
    p.add_argument("--estimate", action="store_true", help="attribution patching: all cells from one gradient")
    p.add_argument("--steps", type=least(1), metavar="N", help="estimate: the mean of N gradients (default: 1)")
    p.add_argument("--check", type=least(0), default=0, metavar="K", help="estimate: patch the K largest cells as well")


def before(args: Namespace) -> None:
    """Raise Error for flags that do not go together."""
    check_estimate(args.estimate, args.metric, args.steps, args.check)
    if args.at == "last" and args.tensor in BY_POSITION:
        raise Error(f"--at last goes with --tensor {' or '.join(BY_HEAD)}: {args.tensor} is patched row by row anyway")


def run(args: Namespace, model: Model, out: Path | None) -> Sweep:
    """Run the sweep that the flags describe."""
    texts = [typed(args, text) for text in (args.clean, args.corrupt)]
    tell_unknown(model, texts)
    clean, corrupt = (in_chat(args, model, text) for text in texts)
    tell_sink(model, clean, corrupt)
    return sweep(model, clean, corrupt, args.answer, args.against, tensor=args.tensor, metric=args.metric,
                 noising=args.noising, at=args.at, layers=args.layers, estimate=args.estimate, steps=args.steps,
                 check=args.check, out=out)


command = Command("sweep", "Activation patching: pieces of one run put into another, one at a time.", add_flags, run,
                  text, pictures, EPILOG, before=before, with_pairs=("tensor", "noising", "at", "layers"))
