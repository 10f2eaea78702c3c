"""`tinymia lens`: the next token that the model would predict if it ended after a layer, at each position.

Each row of a tensor as wide as the residual stream goes through the final norm and the output matrix, which gives
tokens, scores and probabilities. Source: nostalgebraist, interpreting GPT: the logit lens (2020).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import tinymia
from tinymia import Action, Model
from tinymia_engine import best as best_of
from tinymia_engine import softmax
from tinymia_kernels import rms_norm

from ..flags.action_flags import change_flags, patch_flags, read_actions
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser, least
from ..measure.answers import log_softmax, token_or
from ..measure.selection import position_of
from ..measure.sinks import tell_sink
from ..pictures.heatmap import Heatmap
from ..pictures.terminal import screen, table, visible
from ..runs.progress import keeping
from ..runs.result import Result, about, describe, resume

NONE = -1   # instead of a token id, if a row is NaN
ROWS = 32   # rows that go through the output matrix at a time: with 128,256 tokens their logits take 16 MB


@dataclass
class Lens(Result):
    """The best tokens of every row of every tensor, with scores, probabilities and entropy."""

    names: list[str]                # exact names of the tensors, in the order of computation: [n_name]
    pieces: list[str]               # of the prompt's tokens, [n_tok]
    best: np.ndarray                # int32 [n_name, n_tok, k], ids, the best first; -1 if the row is NaN
    best_pieces: list[list[list[str]]]
    scores: np.ndarray              # float32 [n_name, n_tok, k], raw, logit or prob
    probabilities: np.ndarray       # float32 [n_name, n_tok, k]
    entropy: np.ndarray             # float32 [n_name, n_tok], of all tokens, in nats
    target: int | None              # id of the token that is followed
    target_piece: str | None
    target_rank: np.ndarray         # int32 [n_name, n_tok], 0 for the best token; [0, 0] without a target
    target_score: np.ndarray        # float32 [n_name, n_tok]
    target_probability: np.ndarray  # float32 [n_name, n_tok]

    def __str__(self) -> str:
        return text(self)


def lens(
    model: Model,
    prompt: str | Sequence[int],
    names: str | Sequence[str] = "l_out",
    k: int = 5,
    score: str = "logit",
    target: str | int | None = None,
    actions: Action | Sequence[Action] = (),
    out: str | Path | None = None,
) -> Lens:
    """Apply the logit lens to tensors of shape [n_tok, n_embd], at all positions of a prompt.

    names: exact names, base names, globs. score: as in Model.lens. target: an answer, or an id, whose rank and
    probability are given for every row. out: an .npz or .json file that keeps the result; a stopped run continues from
    it. Raises Error.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    found = {name for pattern in patterns for name in tinymia.match(pattern, model.table)}
    chosen = [name for name in model.table if name in found]
    for name in chosen:
        tinymia.Lens(name, k, score).bind(name, model.table[name][0], model)
    model.lens(np.ones(model.config.n_embd, np.float32), k, score)      # raises Error for a wrong k or score
    ids = model.ids(prompt)
    actions = tinymia.listed(actions)
    wanted = token_or(model, target, prompt, None, "target")
    settings = {"names": patterns, "k": k, "score": score, "target": wanted, "actions": describe(actions)}
    info = about(model, "lens", settings, prompt=prompt)
    result = resume(out, info, Lens, actions) or _empty(model, info, chosen, ids, min(k, model.config.n_vocab), wanted)
    todo = [i for i in range(len(chosen)) if np.isnan(result.entropy[i]).any()]
    if not todo:
        return result
    with keeping(result, out, len(chosen), "lens", len(chosen) - len(todo)) as bar:
        run = model.run(prompt, keep=[chosen[i] for i in todo], actions=actions)
        for i in todo:
            _fill(result, i, model, run[chosen[i]], score)
            bar.step()
    return result


def _empty(model: Model, info: dict[str, object], names: list[str], ids: list[int], k: int, target: int | None) -> Lens:
    n_name, n_tok = len(names), len(ids)
    top, each = (n_name, n_tok, k), (n_name, n_tok) if target is not None else (0, 0)
    return Lens(
        about=info, names=names, pieces=[model.piece(i) for i in ids], best=np.zeros(top, np.int32),
        best_pieces=[[] for _ in names], scores=np.full(top, np.nan, np.float32),
        probabilities=np.full(top, np.nan, np.float32), entropy=np.full((n_name, n_tok), np.nan, np.float32),
        target=target, target_piece=None if target is None else model.piece(target),
        target_rank=np.zeros(each, np.int32), target_score=np.full(each, np.nan, np.float32),
        target_probability=np.full(each, np.nan, np.float32),
    )


def _fill(result: Lens, i: int, model: Model, x: np.ndarray, score: str) -> None:
    """Fill in the results for one tensor x, float32 [n_tok, n_embd]."""
    k = result.best.shape[2]
    entropy = np.empty(len(x), np.float32)
    for rows in (slice(at, at + ROWS) for at in range(0, len(x), ROWS)):
        normed = rms_norm(np.ascontiguousarray(x[rows]), model.config.eps)              # [n_row, n_embd]
        logits = model.unembed(normed)                                                  # [n_row, n_vocab]
        log_prob = log_softmax(logits)                                                  # [n_row, n_vocab]
        prob = np.exp(log_prob)                                                         # [n_row, n_vocab]
        scores = logits                                                                 # [n_row, n_vocab]
        if score != "logit":
            scores = softmax(logits) if score == "prob" else model.unembed(np.ascontiguousarray(x[rows]), raw=True)
        best = best_of(scores, k)                                                       # [n_row, k]
        best[np.isnan(scores).any(1)] = NONE
        result.best[i, rows] = best
        result.scores[i, rows] = np.take_along_axis(scores, best, 1)
        result.probabilities[i, rows] = np.take_along_axis(prob, best, 1)
        entropy[rows] = -(prob * log_prob).sum(1)
        if result.target is not None:
            t = result.target
            ahead = (scores > scores[:, t:t + 1]).sum(1) + (scores[:, :t] == scores[:, t:t + 1]).sum(1)
            result.target_rank[i, rows], result.target_score[i, rows] = ahead, scores[:, t]
            result.target_probability[i, rows] = prob[:, t]
    result.best_pieces[i] = [["" if token == NONE else model.piece(int(token)) for token in row]
                             for row in result.best[i]]
    result.entropy[i] = entropy  # set last: a row without NaN is done


# ---------------------------------------------------------------------------------------- pictures


def labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the rows, and their labels: layer numbers if all tensors have the same base name."""
    parts = [name.rpartition("-") for name in names]
    if len({base for base, _, _ in parts}) == 1 and all(dash for _, dash, _ in parts):
        return "layer", [layer for _, _, layer in parts]
    return "tensor", list(names)


def pictures(found: Lens, colour: str = "prob") -> list[Heatmap]:
    """The heatmaps: best tokens, coloured by probability or entropy; then the target's rank and probability."""
    (y, rows), prompt = labels(found.names), visible(found.about["prompts"]["prompt"]["text"])
    what = found.names[0].rpartition("-")[0] if y == "layer" else "tensors"
    hovers = [[hover(found, i, j) for j in range(len(found.pieces))] for i in range(len(found.names))]
    best = Heatmap(
        found.probabilities[..., 0] if colour == "prob" else found.entropy, rows, found.pieces,
        f"{what} through the logit lens: {prompt}", "token", y,
        "probability of the best token" if colour == "prob" else "entropy (nats)",
        texts=[[row[0] for row in tensor] for tensor in found.best_pieces], hovers=hovers,
        limits=(0.0, 1.0) if colour == "prob" else None, upward=True,
    )
    if found.target is None:
        return [best]
    piece = visible(found.target_piece or "")
    target = Heatmap(
        found.target_probability, rows, found.pieces, f"rank of {piece} in {what}: {prompt}", "token", y,
        f"probability of {piece}",
        texts=[[str(rank) for rank in row] for row in found.target_rank.tolist()], hovers=hovers, limits=(0.0, 1.0),
        upward=True,
    )
    return [best, target]


def hover(found: Lens, i: int, j: int) -> str:
    """The text shown when a cell is pointed at: all results for one row of one tensor."""
    rows = [[visible(piece), f"{score:.4g}", f"{probability:.1%}"] for piece, score, probability in
            zip(found.best_pieces[i][j], found.scores[i, j], found.probabilities[i, j])]
    lines = [f"{found.names[i]}, position {j} {visible(found.pieces[j])}", table(rows),
             f"entropy {found.entropy[i, j]:.3g} nats"]
    if found.target is not None:
        lines.append(f"{visible(found.target_piece or '')}: rank {found.target_rank[i, j]}, score "
                     f"{found.target_score[i, j]:.4g}, {found.target_probability[i, j]:.2%}")
    return "\n".join(lines)


def details(found: Lens, position: int) -> str:
    """A table for one position, layer by layer: best token, score, probability, entropy, and those of the target."""
    (y, rows), score = labels(found.names), found.about["settings"]["score"]
    j = position_of(position, len(found.pieces))
    head = [y, "best", score, "probability", "entropy"]
    target = visible(found.target_piece or "")
    lines = [head + [f"rank of {target}", score, "probability"] * (found.target is not None)]
    for i in reversed(range(len(rows))):
        line = [rows[i], visible(found.best_pieces[i][j][0]), f"{found.scores[i, j, 0]:.4g}",
                f"{found.probabilities[i, j, 0]:.4f}", f"{found.entropy[i, j]:.3f}"]
        if found.target is not None:
            line += [str(found.target_rank[i, j]), f"{found.target_score[i, j]:.4g}",
                     f"{found.target_probability[i, j]:.2e}"]
        lines.append(line)
    return f"position {j}, {visible(found.pieces[j])}\n{table(lines)}"


def text(found: Lens, position: int = -1, colour: str = "prob") -> str:
    """The text that the terminal shows; without colours, numbers stand before the tokens."""
    width, colours = screen()

    def plain(h: Heatmap) -> Heatmap:
        shown = "{:<4.0%} {}" if h.limits else "{:<4.1f} {}"
        cells = [[shown.format(v, visible(t)) for v, t in zip(*row)] for row in zip(h.values, h.texts or ())]
        return replace(h, texts=cells)

    maps = [(h if colours else plain(h)).terminal(width, colours) for h in pictures(found, colour)]
    return "\n\n".join([*maps, details(found, position)])


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, the tensors, the output, and actions."""
    prompt_flags(p)
    pair_flags(p, ("probability", "rank", "logit-difference"))
    p.add_argument("--tensor", action="append", metavar="NAME",
                   help="any with n_embd numbers per row (default l_out); more than once")
    p.add_argument("-k", type=least(1), default=5, metavar="K", help="best tokens that are kept (default 5)")
    p.add_argument("--score", choices=("raw", "logit", "prob"), default="logit",
                   help="raw: norm weight only, as in mia; logit: the whole final norm (default); prob: its softmax")
    p.add_argument("--target", metavar="TEXT", help="an answer, or #id: give its rank and probability everywhere")
    p.add_argument("--colour", choices=("prob", "entropy"), default="prob", help="what the colours show")
    p.add_argument("--position", type=int, default=-1, metavar="POS",
                   help="position of the table in the text (default -1, the last)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))


def run(args: Namespace, model: Model, out: Path | None) -> Lens:
    """Run the lens as the flags describe."""
    prompt = prompt_ids(args, model)
    tell_sink(model, prompt)
    return lens(model, prompt, args.tensor or "l_out", args.k, args.score, args.target, read_actions(args, model), out)


command = Command(
    "lens", "The logit lens: what the model would say at each position if it ended after a layer.", add_flags, run,
    text, pictures, 'example: tinymia lens -p "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --target Tallinn '
    "-o lens.html", text_flags=("position", "colour"), picture_flags=("colour",))
