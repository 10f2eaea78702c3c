"""`tinymia ablate --group` and `--ffn`: groups of heads, FFNs and attention edges; a group is ablated as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model
from tinymia_engine import indices, is_mask

from ..measure.answers import answer_and_rival
from ..measure.head_ablation import METRICS, check_mode, measure
from ..measure.knockout import Work, instead, read_group, run_group
from ..measure.selection import chosen, positions
from ..pictures.heatmap import Heatmap
from ..pictures.terminal import table, visible
from ..runs.executors import spread
from ..runs.progress import keeping
from ..runs.result import Result, about, resume


@dataclass
class GroupAblation(Result):
    """The metrics with one group ablated at a time; NaN, or -1, where a group is not done yet."""

    groups: list[str]
    pieces: list[str]           # of the prompt's tokens, [n_tok]
    answer: int                 # ids
    against: int
    answer_piece: str
    against_piece: str
    metrics: list[str]          # logit-difference, logit and probability of the answer, kl: [n_metric]
    plain: np.ndarray           # float64 [n_metric]: of the unchanged run
    values: np.ndarray          # float64 [n_metric, n_group]
    best: np.ndarray            # int32 [n_group]: id of the best token
    best_pieces: list[str]

    @property
    def effects(self) -> np.ndarray:
        """The metrics minus those of the unchanged run: float64 [n_metric, n_group]."""
        return self.values - self.plain[:, None]

    def __str__(self) -> str:
        return groups_text(self)


def ablate_groups(
    model: Model, prompt: str | Sequence[int], groups: Sequence[str], answer: str | int | None = None,
    against: str | int | None = None, mode: str = "zero", *, prompts: Sequence[str | Sequence[int]] | None = None,
    pool: str = "mean", other: str | Sequence[int] | None = None, at: int | Sequence[int] | None = None,
    executor: Executor | None = None, out: str | Path | None = None,
) -> GroupAblation:
    """Ablate each group as a whole (knockout.py says how they are written), and measure the change of the last logits.

    The other arguments are those of `ablate`; `at`, `mode` and its arguments apply to heads and FFNs, not to edges. An
    executor's workers get a group at a time. Raises Error.
    """
    if isinstance(groups, str) or not groups:
        raise Error("groups is a list of one or more, such as ['20.5,14.1', 'ffn-3', '23.4@-1:3']")
    check_mode(mode, pool, prompts, other)
    ids = model.ids(prompt)
    at = at if at is None or not is_mask(at) else indices(at, "position", len(ids)).tolist()
    run = model.run(ids, logits="last")
    plain = run.logits[-1]
    rows = positions(at, len(ids), "the prompt").tolist()
    read = [read_group(model, group, len(ids)) for group in groups]
    put = instead(model, mode, prompts, pool, other, at, len(ids))
    token, rival = answer_and_rival(model, plain, answer, against, prompt)
    settings = {"groups": list(groups), "mode": mode, "answer": token, "against": rival, "pool": pool, "at": at}
    given = {"prompts": prompts} if prompts is not None else {"other": other} if other is not None else {}
    note = about(model, "ablate", settings, prompt=prompt, **given)
    n = len(groups)
    found = resume(out, note, GroupAblation) or GroupAblation(
        note, list(groups), [model.piece(i) for i in ids], token, rival, model.piece(token), model.piece(rival),
        list(METRICS), np.array(measure(plain, plain, token, rival)), np.full((len(METRICS), n), np.nan),
        np.full(n, -1, np.int32), [""] * n)
    todo = np.flatnonzero(np.isnan(found.values[0])).tolist()
    with keeping(found, out, n, "ablate", n - len(todo)) as bar:
        for i, logits in zip(todo, spread(model, run_group, [Work(ids, read[i], put, rows) for i in todo], executor)):
            found.best[i], found.best_pieces[i] = logits.argmax(), model.piece(int(logits.argmax()))
            found.values[:, i] = measure(logits, plain, token, rival)
            bar.step()
    return found


def groups_table(found: GroupAblation, metric: str, k: int) -> str:
    """A table of the k groups with the largest effects: all metrics, and the best token without the group."""
    effects = found.effects[METRICS.index(metric)]
    rows = [["without", "effect", *(f"{name} *" if name == metric else name for name in found.metrics), "says"],
            ["nothing", "", *(f"{v:.4g}" for v in found.plain), ""]]
    for i in np.argsort(-np.abs(effects), kind="stable")[:k].tolist():
        rows.append([found.groups[i], f"{effects[i]:+.4f}", *(f"{v:.4g}" for v in found.values[:, i]),
                     visible(found.best_pieces[i])])
    return table(rows)


def groups_text(found: GroupAblation, metric: str = METRICS[0], k: int = 20) -> str:
    """The text that the terminal shows."""
    return f"change of {in_words(found, metric)}, the largest first\n{groups_table(found, metric, k)}"


def groups_map(found: GroupAblation, metric: str = METRICS[0]) -> Heatmap:
    """The effects as a heatmap, one row per group."""
    return Heatmap(found.effects[METRICS.index(metric)][:, None], found.groups, [metric],
                   "effect of ablating groups: " + visible(found.about["prompts"]["prompt"]["text"]), "metric",
                   "without", f"change of {in_words(found, metric)}", diverging=True)


def in_words(found: Any, metric: str) -> str:
    """A metric in words."""
    answer, against = visible(found.answer_piece), visible(found.against_piece)
    return {"logit-difference": f"logit of {answer} - logit of {against}", "logit": f"logit of {answer}",
            "probability": f"probability of {answer}", "kl": "KL divergence from the unchanged run (nats)"}[metric]


def group_flags(p: argparse.ArgumentParser) -> None:
    """Add --ffn and --group."""
    p.add_argument("--ffn", action="store_true", help="every FFN instead of every head (or those of --layers)")
    p.add_argument("--group", action="append", default=[], metavar="PARTS",
                   help="ablate parts together, and more than once for several groups: 20.5,14.1 (heads), attn-20, "
                        "ffn-3-5, 23.4@-1:3 (head 23.4 at the last position no longer sees position 3), @4:3 (no head)")


def run_groups(
    args: argparse.Namespace, model: Model, prompt: str | Sequence[int],
    prompts: Sequence[str | Sequence[int]] | None, other: str | Sequence[int] | None, out: Path | None,
) -> GroupAblation:
    """Run the ablation of the groups that --ffn and --group name."""
    if args.heads or (args.layers and not args.ffn):
        raise Error("--heads and --layers choose among single heads: leave them out beside --group and --ffn "
                    "(--layers goes with --ffn)")
    ffns = chosen(args.layers, model.config.n_layer, "layer") if args.ffn else []
    return ablate_groups(model, prompt, [*args.group, *(f"ffn-{il}" for il in ffns)], args.answer, args.against,
                         args.mode, prompts=prompts, pool=args.pool, other=other, at=args.at, out=out)
