"""`tinymia ablate`: what each attention head contributes to the answer, measured by removing it.

The output of one head at a time, before Wo (its slice of kqv_merged), is replaced by zero, by the head's mean over a
set of prompts, or by its output on another prompt. The effect is the metric after that minus the metric of the
unchanged run: a head that the answer needs has a negative effect on logit difference, logit and probability. Zero is
far from the values that later layers usually get, so it does more damage than the loss of information alone; a mean, or
another prompt, gives usual values. Effects do not add up: if heads can replace each other, no single one seems to
matter.

Source: Michel, Levy, Neubig, Are Sixteen Heads Really Better than One? (2019), arXiv 1905.10650 (zero); Wang et al.,
Interpretability in the Wild (2022), arXiv 2211.00593 (mean, logit difference); Chan et al., Causal Scrubbing (2022)
(resample).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model
from tinymia_engine import indices, is_mask, stream

from ..flags.action_flags import integers
from ..flags.arguments import prompt_flags, prompt_ids, typed
from ..flags.chat import in_chat
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser, least
from ..measure.answers import answer_and_rival
from ..measure.head_ablation import METRICS, MODES, Layer, ablate_layer, check_mode, head_outputs, measure
from ..measure.prompt_sets import POOLS, cut_prompts, pooled, read_prompts
from ..measure.selection import chosen, positions
from ..runs.executors import commit, spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .ablate_groups import GroupAblation, group_flags, run_groups
from .ablate_result import Ablation, heads_table, heatmap, pictures, ranked, text

__all__ = ["Ablation", "ablate", "command", "heads_table", "heatmap", "pictures", "ranked", "text"]

EPILOG = """\
  tinymia ablate -p "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --answer Tallinn --against Oslo -o heads.html
  tinymia ablate -p "Egypt -> Cairo, Estonia ->" --mode mean --prompts examples/prompts.txt --metric kl
  tinymia ablate -p "Egypt -> Cairo, Estonia ->" --ffn --group 2.1,3.3 --group @-1:1
  tinymia ablate -p "Egypt -> Cairo, Estonia ->" --mode resample --other "Egypt -> Coptic, Estonia ->" --at -1
A file of prompts has one per line, such as the three of examples/prompts.txt:
  Norway -> Oslo, Poland ->
  Italy -> Rome, France ->
  dog -> dogs, bird ->
"""


def ablate(
    model: Model,
    prompt: str | Sequence[int],
    answer: str | int | None = None,
    against: str | int | None = None,
    mode: str = "zero",
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    pool: str = "mean",
    other: str | Sequence[int] | None = None,
    at: int | Sequence[int] | None = None,
    layers: str | Sequence[int] | None = None,
    heads: str | Sequence[int] | None = None,
    executor: Executor | None = None,
    out: str | Path | None = None,
) -> Ablation:
    """Ablate each head alone, at positions `at` (None: all), and measure the change of the logits at the last position.

    answer: text or id, by default the model's best token; against: the other token of the logit difference, by default
    the best token except the answer. mode "mean": put in the mean of the head over `prompts`, over all their tokens or,
    with pool "last", over their last ones; "resample": its output at the same positions of `other`. layers, heads: such
    as "0,3-5" (None: all). An executor's workers get a layer at a time. `out`, a .npz or .json file, keeps the result,
    and a stopped run continues from it. Raises Error.
    """
    c = model.config
    check_mode(mode, pool, prompts, other)
    ids = model.ids(prompt)
    at = at if at is None or not is_mask(at) else indices(at, "position", len(ids)).tolist()
    rows = positions(at, len(ids), "the prompt")
    wanted, which = chosen(layers, c.n_layer, "layer"), chosen(heads, c.n_head, "head")
    given = cut_prompts(model, prompts, "mean's") if prompts is not None else []
    put = np.zeros((c.n_layer, 1, c.n_head, c.d_head_v), np.float32)        # put in: [n_layer, n_row or 1, ...]
    if other is not None:
        put = head_outputs(model, other, at, len(ids))
    cache = model.cache()
    run = model.run(ids, keep=[stream(c, 0), "l_out"], logits="last", cache=cache)
    plain = run.logits[-1]
    token, rival = answer_and_rival(model, plain, answer, against, prompt)
    settings = {"mode": mode, "answer": token, "against": rival, "pool": pool, "at": at, "layers": wanted,
                "heads": which}
    note = about(model, "ablate", settings, prompt=prompt, **({"mean": given} if given else {}),
                 **({"other": other} if other is not None else {}))
    found = resume(out, note, Ablation) or _nothing(note, model, ids, token, rival, measure(plain, plain, token, rival))
    todo = [il for il in wanted if np.isnan(found.values[0, il, which]).any()]
    n_means, first = int(found.n_means), int(rows.min())
    total, done = len(given) + len(wanted) * len(which), n_means + (len(wanted) - len(todo)) * len(which)
    with keeping(found, out, total, "ablate", done) as bar:
        items = [("kqv_merged", pool, one) for one in given[n_means:]]
        for i, x in enumerate(spread(model, pooled, items, executor), n_means + 1):
            x = x.reshape(found.means.shape)
            commit(found, means=x if i == 1 else found.means + (x - found.means) / i, n_means=np.array(i))
            bar.step()
        if mode == "mean":
            put = found.means[:, None].astype(np.float32)
        work = [Layer(il, ids[first:], cache if first else model.cache(), first,
                      run[stream(c, il)][first:], rows - first, which, put[il])
                for il in todo]
        for il, logits in zip(todo, spread(model, ablate_layer, work, executor)):
            for head, row in zip(which, logits):
                found.best[il, head] = row.argmax()
                found.best_pieces[il][head] = model.piece(int(row.argmax()))
            found.values[:, il, which] = np.array([measure(row, plain, token, rival) for row in logits]).T
            bar.step(len(which))
    return found


def _nothing(note: dict[str, Any], model: Model, ids: list[int], answer: int, against: int, plain: Any) -> Ablation:
    """An empty result, before the first cell is computed."""
    c = model.config
    return Ablation(
        note, [model.piece(i) for i in ids], answer, against, model.piece(answer), model.piece(against), list(METRICS),
        np.array(plain), np.full((len(METRICS), c.n_layer, c.n_head), np.nan),
        np.full((c.n_layer, c.n_head), -1, np.int32), [[""] * c.n_head for _ in range(c.n_layer)],
        np.full((c.n_layer, c.n_head, c.d_head_v), np.nan), np.array(0),
    )


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, its answer, what is ablated and how, and what is shown."""
    prompt_flags(p)
    pair_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="text, or #id (default: the model's best token)")
    p.add_argument("--against", metavar="TEXT", help="the other token (default: the best but the answer)")
    p.add_argument("--mode", choices=MODES, default="zero",
                   help="what replaces the head's output: zero (default), its mean over --prompts, or that on --other")
    p.add_argument("--prompts", metavar="FILE", help="for --mode mean: one prompt per line, or a JSON list (.json)")
    p.add_argument("--pool", choices=POOLS, default="mean",
                   help="the mean is that of all tokens of the prompts (mean, default), or of their last ones (last)")
    p.add_argument("--other", metavar="TEXT", help="another prompt, for --mode resample")
    p.add_argument("--at", type=integers, metavar="POS", help="positions: 3 or 3,5 or -1 (default: all)")
    p.add_argument("--layers", metavar="LIST", help="0,3-5 (default: all)")
    p.add_argument("--heads", metavar="LIST", help="0,3-5 (default: all)")
    group_flags(p)
    p.add_argument("--metric", choices=METRICS, default=METRICS[0], help="the metric of table and picture "
                   f"(default {METRICS[0]})")
    p.add_argument("-k", type=least(1), default=20, metavar="N", help="heads in the table (20)")


def before(args: Namespace) -> None:
    """Raise Error for flags that do not go together, and read the prompts of --prompts."""
    for mode, flag, given in (("mean", "--prompts FILE", args.prompts), ("resample", "--other TEXT", args.other)):
        if (args.mode == mode) != (given is not None):
            word = flag.split()[0]
            raise Error(f"--mode {mode} needs {flag}" if given is None else f"{word} goes with --mode {mode}")
    args.prompts = None if args.prompts is None else read_prompts(args.prompts)


def run(args: Namespace, model: Model, out: Path | None) -> Ablation | GroupAblation:
    """Run the ablation that the flags describe: of single heads, or with --ffn or --group of groups."""
    given = None if args.other is None else typed(args, args.other)
    prompt = prompt_ids(args, model, [*(args.prompts or ()), given or ""])
    prompts = None if args.prompts is None else [in_chat(args, model, text) for text in args.prompts]
    other = None if given is None else in_chat(args, model, given)
    if args.ffn or args.group:
        return run_groups(args, model, prompt, prompts, other, out)
    return ablate(model, prompt, args.answer, args.against, args.mode, prompts=prompts, pool=args.pool, other=other,
                  at=args.at, layers=args.layers, heads=args.heads, out=out)


command = Command("ablate", "Silence one attention head at a time, and measure how the answer changes.", add_flags,
                  run, text, pictures, EPILOG, text_flags=("metric", "k"), picture_flags=("metric",), before=before,
                  with_pairs=("mode", "prompts", "pool", "at", "layers", "heads"))
