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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model

from ..flags.chat import chat_flags, in_chat
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser
from ..flags.prompt_notes import tell_unknown
from ..measure.answers import token_or
from ..measure.patching import (
    BY_HEAD,
    BY_POSITION,
    METRICS,
    Batch,
    Setting,
    batches,
    check_aligned,
    measure,
    run_batch,
    runs_of,
)
from ..measure.selection import chosen
from ..measure.sinks import tell_sink
from ..pictures.heatmap import Heatmap
from ..pictures.terminal import fixed, screen, signed, table, visible
from ..runs.executors import spread
from ..runs.progress import keeping
from ..runs.result import Result, about, resume

EPILOG = """\
l_out, kqv_out and ffn_out are patched at each layer and position; kqv, a head's output, and kq_soft_max, its attention
pattern, at each layer and head.
  tinymia sweep --clean "Egypt -> Cairo, France ->" --corrupt "Egypt -> Cairo, Norway ->" -o sweep.png
  tinymia sweep --clean ... --corrupt ... --tensor kqv --noising --metric kl --answer Paris --against Oslo
"""
UNITS = {"logit-difference": "logit of {0} minus logit of {1}, from 0 (as corrupt) to 1 (as clean)",
         "probability": "probability of {0}", "kl": "KL divergence from the clean run (nats)", "rank": "rank of {0}"}


@dataclass
class Sweep(Result):
    """The metrics of the last position's logits for each patch; NaN for cells that are not done."""

    metric: str                     # the one that `values` and the picture show
    layers: list[int]               # [n_layer]
    columns: list[str]              # positions or heads, [n_column]
    clean_pieces: list[str]         # [n_tok]
    corrupt_pieces: list[str]
    answer: int                     # id
    answer_piece: str
    against: int
    against_piece: str
    clean: dict[str, float]         # by metric, of the unpatched clean run; the logit difference in logits
    corrupt: dict[str, float]
    logit_difference: np.ndarray    # float64 [n_layer, n_column]: 0 as in the corrupt run, 1 as in the clean one
    probability: np.ndarray         # float64 [n_layer, n_column], of the answer
    kl: np.ndarray                  # float64 [n_layer, n_column], divergence from the clean run, in nats
    rank: np.ndarray                # float64 [n_layer, n_column], of the answer, 0 for the best token

    @property
    def values(self) -> np.ndarray:
        """The chosen metric: float64 [n_layer, n_column]."""
        return getattr(self, self.metric.replace("-", "_"))

    def __str__(self) -> str:
        return text(self)


def sweep(
    model: Model, clean: str | Sequence[int], corrupt: str | Sequence[int], answer: str | int | None = None,
    against: str | int | None = None, *, tensor: str = "l_out", metric: str = "logit-difference", noising: bool = False,
    at: str = "all", layers: str | Sequence[int] | None = None, executor: Executor | None = None,
    out: str | Path | None = None,
) -> Sweep:
    """Run activation patching between two prompts with equally many tokens, one cell per patch.

    answer, against: text or id; by default the best token of the clean and of the corrupt run. tensor: l_out, kqv_out
    or ffn_out, by layer and position; kqv or kq_soft_max, by layer and head. metric: logit-difference, probability, kl
    or rank; all four are kept. noising: corrupt into clean. at: "all" rows of a head, or its "last" one. layers: such
    as "0,3-5". An executor gets batches of cells. `out`, a .npz or .json file, keeps the result, and a stopped run
    continues from it. Raises Error.
    """
    for what, given, possible in (("tensor", tensor, BY_POSITION + BY_HEAD), ("metric", metric, METRICS),
                                  ("at", at, ("all", "last"))):
        if given not in possible:
            raise Error(f"{what} {given!r}: it must be one of {', '.join(possible)}")
    if at == "last" and tensor in BY_POSITION:
        raise Error(f"at=last goes with {' and '.join(BY_HEAD)}: {tensor} is patched at each position by itself")
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
    if metric == "logit-difference" and ends[0, 0] == ends[1, 0]:
        same = "the prompts are the same, and so " * (ids["clean"] == ids["corrupt"])
        raise Error(f"{same}the logit difference of {model.piece(token)!r} and {model.piece(other)!r} is the same in "
                    "both runs: choose other tokens (--answer, --against) or another metric (--metric)")
    settings = {"tensor": tensor, "noising": noising, "at": at, "layers": wanted, "answer": token, "against": other}
    note = about(model, "sweep", settings, clean=clean, corrupt=corrupt)
    found = resume(out, note, Sweep) or _nothing(model, note, setting, wanted, ends)
    found.metric = metric
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


def _fill(found: Sweep, i: int, columns: list[int], scores: np.ndarray, ends: np.ndarray) -> None:
    """Set cells of row i: scores [n_cell, 4] or [4]; ends [2, 4]: the scores of the unpatched clean and corrupt run."""
    with np.errstate(all="ignore"):  # NaN where both runs have the same logit difference
        found.logit_difference[i, columns] = (scores[..., 0] - ends[1, 0]) / (ends[0, 0] - ends[1, 0])
    found.probability[i, columns], found.rank[i, columns] = scores[..., 1], scores[..., 3]
    found.kl[i, columns] = scores[..., 2]  # set last: a cell that is not NaN here is done


# ---------------------------------------------------------------------------------------- pictures


def picture(found: Sweep) -> Heatmap:
    """The heatmap, layers by positions or heads, in the chosen metric."""
    s, metric = found.about["settings"], found.metric
    kind = "position" if s["tensor"] in BY_POSITION else "head"
    how = "corrupt into clean (noising)" if s["noising"] else "clean into corrupt (denoising)"
    where = ", last position" if s["at"] == "last" else ""
    texts = [[f"{v:.0f}" if metric == "rank" else fixed(v) for v in row] for row in found.values]
    diverging = metric == "logit-difference"
    most = float(np.nanmax(np.abs(found.values), initial=1.0))
    limits = {"logit-difference": (-most, most), "probability": (0.0, 1.0)}.get(metric)
    hovers = [[hover(found, i, j) for j in range(len(found.columns))] for i in range(len(found.layers))]
    unit = UNITS[metric].format(visible(found.answer_piece), visible(found.against_piece))
    return Heatmap(found.values, [str(il) for il in found.layers], found.columns,
                   f"{s['tensor']}{where}, {how}", kind, "layer", unit,
                   texts, hovers, diverging=diverging, limits=limits, upward=True)


def pictures(found: Sweep) -> list[Heatmap]:
    """The heatmap of a sweep, as a list."""
    return [picture(found)]


def hover(found: Sweep, i: int, j: int) -> str:
    """The text shown when a cell is pointed at: all metrics of one patch."""
    kind = "position" if found.about["settings"]["tensor"] in BY_POSITION else "head"
    return (f"layer {found.layers[i]}, {kind} {found.columns[j]}\n"
            f"logit difference {found.logit_difference[i, j]:.4g}\nprobability {found.probability[i, j]:.4g}\n"
            f"KL from clean {found.kl[i, j]:.4g}\nrank {found.rank[i, j]:.0f}")


def text(found: Sweep) -> str:
    """The text that the terminal shows: the two unpatched runs, and the heatmap."""
    rows = [["run", f"{found.answer_piece!r} - {found.against_piece!r}", "probability", "KL from clean", "rank"]]
    for name, run in (("clean", found.clean), ("corrupt", found.corrupt)):
        rows.append([name, signed(run['logit-difference'], 3), f"{run['probability']:.4f}", f"{run['kl']:.4f}",
                     f"{run['rank']:.0f}"])
    return table(rows) + "\n\n" + picture(found).terminal(*screen())


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the two prompts and their answers, and of what is patched, measured and shown."""
    p.add_argument("--clean", required=True, metavar="TEXT", help="the prompt that has the answer")
    p.add_argument("--corrupt", required=True, metavar="TEXT", help="a prompt of as many tokens, with another answer")
    chat_flags(p)
    pair_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="or #id; default: the clean run's best token")
    p.add_argument("--against", metavar="TEXT", help="or #id; default: the corrupt run's best token")
    p.add_argument("--tensor", choices=BY_POSITION + BY_HEAD, default="l_out")
    p.add_argument("--metric", choices=METRICS, default=METRICS[0], help="the metric to show; all four are kept")
    p.add_argument("--noising", action="store_true", help="patch corrupt into clean instead of clean into corrupt")
    p.add_argument("--at", choices=("all", "last"), default="all", help="rows of a head that are patched")
    p.add_argument("--layers", metavar="LIST", help="such as 0,3-5 (default: all)")


def before(args: Namespace) -> None:
    """Raise Error for flags that do not go together."""
    if args.at == "last" and args.tensor in BY_POSITION:
        raise Error(f"--at last goes with --tensor {' or '.join(BY_HEAD)}: {args.tensor} is patched row by row anyway")


def run(args: Namespace, model: Model, out: Path | None) -> Sweep:
    """Run the sweep that the flags describe."""
    tell_unknown(model, [args.clean, args.corrupt])
    clean, corrupt = (in_chat(args, model, text) for text in (args.clean, args.corrupt))
    tell_sink(model, clean, corrupt)
    return sweep(model, clean, corrupt, args.answer, args.against, tensor=args.tensor, metric=args.metric,
                 noising=args.noising, at=args.at, layers=args.layers, out=out)


command = Command("sweep", "Activation patching: pieces of one run put into another, one at a time.", add_flags, run,
                  text, pictures, EPILOG, before=before, with_pairs=("tensor", "noising", "at", "layers"))
