"""`tinymia path`: exact path patching. What does one part tell another directly, and how much does the answer need it?

A sweep changes a part's output for everything that comes later. Here the change goes to one receiver only: the receiver
reads the residual stream of the clean run plus the sender's change, which is what the sender writes in the corrupt run
minus what it writes in the clean one. All parts between the two keep their values of the clean run. What comes after
the receiver is computed as usual.

Sources: Wang et al., Interpretability in the Wild (2022), arXiv 2211.00593 (there the FFNs between the two are computed
again; here they are frozen as well); Goldowsky-Dill et al., Localizing Model Behavior with Path Patching (2023), arXiv
2304.05969.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model

from ..flags.action_flags import integers
from ..flags.arguments import escape_flag, typed
from ..flags.chat import chat_flags, in_chat
from ..flags.command import Command
from ..flags.parser import Parser, least
from ..flags.prompt_notes import tell_unknown
from ..measure.answers import token_or
from ..measure.patching import METRICS, check_aligned, check_ends, measure
from ..measure.path_parts import check_order, every_sender, group, read_parts
from ..measure.paths import Setting, batches, run_batch, runs_of
from ..measure.selection import positions
from ..measure.sinks import tell_sink
from ..runs.executors import spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .path_result import PathPatching, picture, pictures, text

__all__ = ["PathPatching", "command", "path", "picture", "pictures", "text"]
EPILOG = """\
senders: 3.2 (a head), ffn-4, embedding; receivers: 5.1:q, 5.1:k, 5.1:v, ffn-5, logits; several with commas between
  tinymia path --clean "Egypt -> Cairo, France ->" --corrupt "Egypt -> Cairo, Norway ->" --receiver logits
  tinymia path --clean ... --corrupt ... --receiver 5.0:v,5.0:k -o path.html
  tinymia path --clean ... --corrupt ... --receiver 5.1:v --sender 3.2 --at -1
"""


def path(
    model: Model, clean: str | Sequence[int], corrupt: str | Sequence[int], receiver: str | Sequence[str],
    sender: str | Sequence[str] | None = None, answer: str | int | None = None, against: str | int | None = None, *,
    metric: str = "logit-difference", at: int | Sequence[int] | None = None, executor: Executor | None = None,
    out: str | Path | None = None,
) -> PathPatching:
    """Patch the direct path from each sender to the receivers, between two prompts with equally many tokens.

    receiver: "5.1:q", "5.1:k" or "5.1:v", "ffn-5" or "logits"; several, as a list or with commas, are changed together.
    sender: "3.2", "ffn-4" or "embedding"; several are patched one at a time; by default all that write before the
    receiver reads. answer, against: text or id; by default the best token of the clean and of the corrupt run. metric:
    logit-difference, probability, kl or rank; all four are kept. at: the positions where the sender changes (None:
    all). An executor gets batches of senders. `out`, a .npz or .json file, keeps the result, and a stopped run
    continues from it. Raises Error.
    """
    if metric not in METRICS:
        raise Error(f"metric {metric!r}: it must be one of {', '.join(METRICS)}")
    receivers = read_parts(model, receiver, "receiver")
    senders = every_sender(model, receivers) if sender is None else read_parts(model, sender, "sender")
    check_order(senders, receivers)
    ids, other_ids = tuple(model.ids(clean)), tuple(model.ids(corrupt))
    check_aligned(model, ids, other_ids)
    rows = None if at is None else tuple(sorted(positions(at, len(ids), "the prompt").tolist()))
    setting = Setting(ids, other_ids, tuple(receivers), rows, 0, 0)
    runs = runs_of(model, setting)
    token = token_or(model, answer, clean, int(runs.clean.argmax()))
    other = token_or(model, against, clean, int(runs.corrupt.argmax()))
    setting = replace(setting, answer=token, against=other)
    ends = measure(np.stack([runs.clean, runs.corrupt]), runs.clean, token, other)      # [2, 4]
    if metric == METRICS[0]:
        check_ends(model, ids, other_ids, token, other, ends)
    names = list(map(str, senders))
    settings = {"senders": names, "receivers": list(map(str, receivers)), "at": rows, "answer": token,
                "against": other}
    note = about(model, "path", settings, clean=clean, corrupt=corrupt)
    found = resume(out, note, PathPatching) or _nothing(model, note, setting, names, ends)
    found.metric = metric
    left = [part for part, kl in zip(senders, found.kl) if np.isnan(kl)]
    with keeping(found, out, len(senders), "path", len(senders) - len(left)) as bar:
        same, work = batches(model, setting, runs, left)
        _fill(found, list(map(str, same)), ends[0], ends)
        bar.step(len(same))
        for batch, scores in zip(work, spread(model, run_batch, work, executor)):
            _fill(found, list(map(str, batch.senders)), scores, ends)
            bar.step(len(batch.senders))
    return found


def _nothing(
    model: Model, note: dict[str, Any], setting: Setting, senders: list[str], ends: np.ndarray
) -> PathPatching:
    """A result with nothing done."""
    clean, corrupt = ([model.piece(i) for i in ids] for ids in (setting.clean, setting.corrupt))
    tokens = setting.answer, model.piece(setting.answer), setting.against, model.piece(setting.against)
    whole: list[Any] = [dict(zip(METRICS, row.tolist())) for row in ends]
    empty = [np.full(len(senders), np.nan) for _ in METRICS]
    return PathPatching(note, METRICS[0], senders, list(map(str, setting.receivers)),
                        [group(model, part) for part in setting.receivers], clean, corrupt, *tokens, *whole, *empty)


def _fill(found: PathPatching, senders: list[str], scores: np.ndarray, ends: np.ndarray) -> None:
    """Set some senders: scores [n_sender, 4] or [4]; ends [2, 4]: the scores of the unpatched clean and corrupt run."""
    at = [found.senders.index(name) for name in senders]
    with np.errstate(all="ignore"):  # NaN where both runs have the same logit difference
        found.logit_difference[at] = (ends[0, 0] - scores[..., 0]) / (ends[0, 0] - ends[1, 0])
    found.probability[at], found.rank[at] = scores[..., 1], scores[..., 3]
    found.kl[at] = scores[..., 2]   # set last: a sender that is not NaN here is done


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the two prompts and their answers, of the two ends of the path, and of what is shown."""
    p.add_argument("--clean", required=True, metavar="TEXT", help="the prompt that has the answer")
    p.add_argument("--corrupt", required=True, metavar="TEXT", help="a prompt of as many tokens, with another answer")
    escape_flag(p, "--clean and --corrupt")
    chat_flags(p)
    p.add_argument("--receiver", required=True, metavar="PART", help="5.1:q, 5.1:k, 5.1:v, ffn-5 or logits; several, "
                   "with commas between, are changed together")
    p.add_argument("--sender", metavar="PART", help="3.2, ffn-4 or embedding; several, with commas between, are "
                   "patched one at a time (default: all that write before the receiver reads)")
    p.add_argument("--answer", metavar="TEXT", help="or #id; default: the clean run's best token")
    p.add_argument("--against", metavar="TEXT", help="or #id; default: the corrupt run's best token")
    p.add_argument("--at", type=integers, metavar="POS", help="where the sender changes: 3 or 3,5 or -1 (default: all)")
    p.add_argument("--metric", choices=METRICS, default=METRICS[0], help="the metric to show; all four are kept")
    p.add_argument("-k", type=least(1), default=10, metavar="N", help="senders in the table (10)")


def run(args: Namespace, model: Model, out: Path | None) -> PathPatching:
    """Run the path patching that the flags describe."""
    texts = [typed(args, text) for text in (args.clean, args.corrupt)]
    tell_unknown(model, texts)
    clean, corrupt = (in_chat(args, model, text) for text in texts)
    tell_sink(model, clean, corrupt)
    return path(model, clean, corrupt, args.receiver, args.sender, args.answer, args.against, metric=args.metric,
                at=args.at, out=out)


command = Command("path", "Path patching: what one part tells another directly, one pair of parts at a time.",
                  add_flags, run, text, pictures, EPILOG, text_flags=("k",))
