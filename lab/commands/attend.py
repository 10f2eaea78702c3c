"""`tinymia attend`: the attention pattern of each head, and what kind of head it is.

Three scores describe a head: the weight on the token before, on the first token, and on what followed an earlier copy
of the token (induction). The last one is measured on a sequence of random tokens that repeats, where nothing else helps
to predict, and on the prompt.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tinymia
from tinymia import Action, Context, Error, Model
from tinymia_engine import best as best_of

from ..flags.action_flags import Output, change_flags, patch_flags, read_actions
from ..flags.arguments import check_file, prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser, least
from ..measure.attention_scores import first_score, induction_score, previous_score, repeated_tokens
from ..measure.selection import chosen
from ..measure.sinks import tell_sink
from ..pictures.attention_page import check_room, check_size, viewer
from ..pictures.draw import draw
from ..pictures.heatmap import Heatmap
from ..pictures.heatmap_png import draw_png
from ..pictures.page import page, write_page
from ..pictures.terminal import screen, table, visible
from ..runs.progress import keeping
from ..runs.result import Result, about, describe, resume


@dataclass
class Attention(Result):
    """The patterns of the chosen heads, and the scores of all heads."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    layers: list[int]               # the layers whose patterns are kept
    heads: list[int]
    patterns: np.ndarray            # float32 [len(layers), len(heads), n_tok, n_tok]: query, key
    previous: np.ndarray            # float32 [n_layer, n_head], on the prompt
    first: np.ndarray               # float32 [n_layer, n_head], on the prompt
    induction: np.ndarray           # float32 [n_layer, n_head], on random tokens that repeat
    induction_here: np.ndarray      # float32 [n_layer, n_head], on the prompt; NaN where no token has an earlier copy

    def __str__(self) -> str:
        return text(self)


SCORES = {
    "previous": "to the token before",
    "first": "to the first token",
    "induction": "to what followed an earlier copy, in random tokens that repeat",
    "induction_here": "to what followed an earlier copy, in the prompt",
}

MOST_KEPT = 4_000_000_000       # the most bytes of patterns in memory
MOST_LISTED = 16_000_000        # the most numbers of patterns in a JSON text; while it is written each takes 100 bytes


def attend(
    model: Model,
    prompt: str | Sequence[int],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
    actions: Action | Sequence[Action] = (),
    out: str | Path | None = None,
    kept: str | None = "float32",
) -> Attention:
    """Compute the attention patterns of some layers and heads (None: all), and the scores of every head.

    seed: for the random tokens. actions: done in the run of the prompt only. out: an .npz or .json file that keeps the
    result; a stopped run continues from it. kept: the type of the patterns: "float32"; "float16", which has half the
    size and three digits, enough for pictures; or None, for scores alone. Raises Error.
    """
    c = model.config
    if kept not in ("float32", "float16", None) or (out is not None and kept != "float32"):
        raise Error(f"kept {kept!r}: it must be float32 (and must where a result is kept), float16 or None")
    layers, heads = chosen(layers, c.n_layer, "layer"), chosen(heads, c.n_head, "head")
    ids = model.ids(prompt)
    check_kept(len(layers), len(heads), len(ids), kept, out is not None and str(out).endswith(".json"))
    actions = tinymia.listed(actions)
    again = repeated_tokens(model, seed)
    settings = {"layers": layers, "heads": heads, "seed": seed, "actions": describe(actions)}
    info = about(model, "attend", settings, prompt=prompt, repeated=again)

    def empty() -> np.ndarray:
        return np.full((c.n_layer, c.n_head), np.nan, np.float32)

    side = len(ids) if kept else 0
    patterns = np.full((len(layers), len(heads), side, side), np.nan, kept or "float32")
    found = resume(out, info, Attention, actions) or Attention(
        info, [model.piece(i) for i in ids], layers, heads, patterns, empty(), empty(), empty(), empty())

    def in_prompt(x: np.ndarray, ctx: Context) -> None:
        il = ctx.layer or 0
        found.previous[il], found.first[il] = previous_score(x), first_score(x)
        found.induction_here[il] = induction_score(x, ids)
        if il in layers and kept:
            found.patterns[layers.index(il)] = x[heads]
        bar.step()

    def in_repeated(x: np.ndarray, ctx: Context) -> None:
        found.induction[ctx.layer or 0] = induction_score(x, again)
        bar.step()

    known = found.patterns[..., 0, 0] if kept else np.full(1, np.nan)   # NaN if the pattern is not done
    todo: list[tuple[Any, list[Action], np.ndarray]] = [
        (prompt, [*actions, tinymia.Replace("kq_soft_max", in_prompt)], known),
        (again, [tinymia.Replace("kq_soft_max", in_repeated)], found.induction),
    ]
    todo = [part for part in todo if np.isnan(part[2]).any()]
    if todo:
        with keeping(found, out, 2 * c.n_layer, "attend", (2 - len(todo)) * c.n_layer) as bar:
            for tokens, steps, _ in todo:
                model.run(tokens, actions=steps, logits="last")
    return found


def check_kept(n_layer: int, n_head: int, n_tok: int, kept: str | None, listed: bool) -> None:
    """Raise Error for patterns that take too much memory, or are too many for JSON."""
    if kept:
        size = np.dtype(kept).itemsize * n_tok**2
        check_room(n_layer, n_head, n_tok, size, MOST_KEPT, "{:.1f} GB of memory, and at most {:.0f} GB are kept", 1e9)
    if listed:
        words = "{:.0f} million numbers in JSON, where at most {:.0f} million are written (an .npz file holds more)"
        check_room(n_layer, n_head, n_tok, n_tok**2, MOST_LISTED, words, 1e6)


# ---------------------------------------------------------------------------------------- pictures


def score_maps(found: Attention) -> list[Heatmap]:
    """The scores as heatmaps, layer x head, one per score that was measured."""
    maps = []
    for name, what in SCORES.items():
        values: np.ndarray = getattr(found, name)
        if not np.isnan(values).all():
            rows, columns = ([str(i) for i in range(n)] for n in values.shape)
            maps.append(Heatmap(values, rows, columns, f"attention {what}", "head", "layer", "mean weight",
                                limits=(0.0, 1.0), upward=True))
    return maps


def strongest(found: Attention, n: int = 5) -> str:
    """A table of the n heads with the highest scores, one line per score."""
    lines: list[list[Any]] = []
    for name, what in SCORES.items():
        values: np.ndarray = getattr(found, name)
        best = [np.unravel_index(i, values.shape) for i in best_of(values.reshape(-1), n)]
        heads = [f"{layer}.{head} {values[layer, head]:.2f}" for layer, head in best]
        lines.append([what, *heads] if not np.isnan(values).any() else [what, "no token of the prompt has one"])
    return f"strongest heads, layer.head and mean weight\n{table(lines)}"


def pattern_map(found: Attention, layer: int, head: int) -> Heatmap:
    """The pattern of one head as a heatmap; keys after the query are empty cells."""
    pattern = found.patterns[found.layers.index(layer), found.heads.index(head)]
    seen = np.tri(len(pattern), dtype=bool)
    return Heatmap(np.where(seen, pattern, np.nan), found.pieces, found.pieces,
                   f"attention of head {layer}.{head}", "key", "query", "weight", limits=(0.0, 1.0))


def pictures(found: Attention) -> list[Heatmap]:
    """The heatmaps of the scores and, if one head was chosen and its pattern kept, of the pattern."""
    one = len(found.layers) == len(found.heads) == 1 and found.patterns.size
    return score_maps(found) + ([pattern_map(found, found.layers[0], found.heads[0])] if one else [])


def text(found: Attention) -> str:
    """The text that the terminal shows."""
    return "\n\n".join([*(h.terminal(*screen()) for h in pictures(found)), strongest(found)])


def patterns_html(found: Attention) -> str:
    """The patterns as an interactive fragment for a page."""
    scores = {"previous token": found.previous, "first token": found.first, "induction": found.induction}
    return viewer(found.pieces, found.layers, found.heads, found.patterns, scores)


def write_html(found: Attention, path: Path) -> None:
    """Write the page with the interactive patterns and the scores."""
    title = f"attention: {visible(found.about['prompts']['prompt']['text'])}"
    write_page(path, page(title, [patterns_html(found), *(h.html() for h in score_maps(found))]))


def write_png(found: Attention, path: Path) -> None:
    """Draw the patterns as a PNG: a row of panels per layer, a panel per head."""
    title = f"{found.about['model']['name']}: {found.about['prompts']['prompt']['text']}"
    draw(dict(zip(found.layers, found.patterns)), path, found.pieces, title, found.heads)


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, the heads whose patterns are kept, the picture of scores, and actions."""
    prompt_flags(p)
    pair_flags(p, ("to-changed", "to-first", "first", "previous"))
    p.add_argument("--layers", metavar="LIST", help="layers whose patterns are kept and drawn: 0,3-5 (default: all)")
    p.add_argument("--heads", metavar="LIST", help="heads of these layers: 0,3-5 (default: all)")
    p.add_argument("--scores", type=Output, metavar="FILE.png", help="draw the heads' scores, layer x head")
    p.add_argument("--seed", type=least(0), default=0, metavar="N", help="seed of the random tokens (default 0)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))


def before(args: Namespace) -> None:
    """Raise Error for a picture of scores that could not be written."""
    if args.scores:
        check_file("--scores", args.scores, [".png"])


def run(args: Namespace, model: Model, out: Path | None) -> Attention:
    """Run what the flags describe, and keep the patterns only as exactly as the outputs need them."""
    prompt = prompt_ids(args, model)
    tell_sink(model, prompt)
    layers, heads = chosen(args.layers, model.config.n_layer, "layer"), chosen(args.heads, model.config.n_head, "head")
    if any(path.endswith(".html") for path in args.out):
        check_size(len(layers), len(heads), len(model.ids(prompt)))
    kept = "float16" if args.out or len(layers) == len(heads) == 1 else None
    kept = "float32" if args.json or out else kept
    check_kept(len(layers), len(heads), len(model.ids(prompt)), kept, args.json)
    found = attend(model, prompt, layers, heads, args.seed, read_actions(args, model), out, kept)
    if args.scores:
        draw_png(args.scores, score_maps(found))
    return found


command = Command(
    "attend", "Attention patterns: where each head looks, and what kind of head it is.", add_flags, run, text, pictures,
    'example: tinymia attend -p "Egypt -> Cairo, Norway -> Oslo, Estonia ->" -o attention.html', before=before,
    writers={".png": write_png, ".html": write_html})
