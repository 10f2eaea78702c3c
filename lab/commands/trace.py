"""`tinymia trace`: the forward pass explained op by op: formula, inputs, shapes, and the values that came out."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tinymia
from tinymia import Action, Context, Error, Lens, Log, Model, Save
from tinymia_engine import best, softmax

from ..flags.action_flags import change_flags, patch_flags, read_actions
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.parser import Parser
from ..measure.formulas import cgraph, told
from ..measure.selection import chosen, position_of
from ..pictures.terminal import screen, table, visible
from ..runs.progress import Progress, interruptible
from ..runs.result import Result, about, describe, resume

WIDTH = 100     # the most columns of the text
FIRST = 6       # the most values shown per row
NUMERICS = {"f32": "everything is computed in float32",
            "ggml": "activations are rounded before a product, as the weights' type asks; formulas leave it out"}


@dataclass
class Trace(Result):
    """The ops of some layers, and those before the first and after the last layer."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    position: int                   # the position whose values are shown
    layers: list[int]
    n_layer: int                    # of the model
    ops: list[dict[str, Any]]       # in the order of computation; see `told`, `trace` and, for "changed", `change`
    best: list[list[Any]]           # [piece, probability] of the next token, the most probable first

    def __str__(self) -> str:
        return text(self)


def trace(
    model: Model,
    prompt: str | Sequence[int],
    layers: str | Sequence[int] | None = (0,),
    position: int = -1,
    actions: Action | Sequence[Action] = (),
    out: str | Path | None = None,
) -> Trace:
    """Describe every op of some layers (None: all), and those before and after the layers, with values at a position.

    An op that actions change has the values after the actions, and in "changed" those before them.
    out: an .npz or .json file that keeps the result; if it holds this trace already, that is returned. Raises Error.
    """
    layers = chosen(layers, model.config.n_layer, "layer")
    ids, actions = model.ids(prompt), tinymia.listed(actions)
    position = position_of(position, len(ids))
    info = about(model, "trace", {"layers": layers, "position": position, "actions": describe(actions)}, prompt=prompt)
    found = resume(out, info, Trace, actions)
    if found is not None:
        return found
    graph = {op["name"]: op for op in cgraph(model, len(ids))}
    found = Trace(info, [model.piece(i) for i in ids], position, layers, model.config.n_layer, [], [])
    names = [name for name, (_, il) in model.table.items() if il is None or il in layers]

    by = {name: [repr(a) for a in actions if a.when != "decode" and not isinstance(a, (Lens, Log, Save))
                 and name in tinymia.match(a.name, model.table)] for name in names}
    computed: dict[str, np.ndarray] = {}

    def before(x: np.ndarray, ctx: Context) -> None:
        computed[ctx.name] = x

    def take(x: np.ndarray, ctx: Context) -> None:
        row = ctx.rows(x)[position]
        found.ops.append(told(model, ctx.op, ctx.layer, graph) | {
            "head": 0 if row.ndim > 1 else None,    # the head of the first values
            "size": row.size, "first": row.reshape(-1)[:FIRST].tolist(),
            "norm": float(np.linalg.norm(row.astype(np.float64))),
            "changed": change(by[ctx.name], ctx.rows(computed.pop(ctx.name)), ctx.rows(x), position)
            if by[ctx.name] else None})
        bar.step()
        check_interrupt()

    with interruptible() as check_interrupt, Progress(len(names), "trace") as bar:
        first = [tinymia.Replace(name, before) for name in names if by[name]]
        run = model.run(prompt, actions=[*first, *actions, *(tinymia.Replace(name, take) for name in names)])
    prob = softmax(run.logits[position:position + 1])[0]                                # [n_vocab]
    found.best = [[model.piece(int(i)), float(prob[i])] for i in best(prob, 5)]
    if out is not None:
        found.save(out)
    return found


def change(by: list[str], old: np.ndarray, new: np.ndarray, position: int) -> dict[str, Any]:
    """The change that the actions `by` made to a tensor: the rows that differ, and the row as it was computed."""
    differs = (old != new) & ~(np.isnan(old) & np.isnan(new))
    row = old[position]
    return {"by": by, "rows": np.flatnonzero(differs.reshape(len(old), -1).any(1)).tolist(),
            "first": row.reshape(-1)[:FIRST].tolist(), "norm": float(np.linalg.norm(row.astype(np.float64)))}


# ---------------------------------------------------------------------------------------- the text


def shape_text(shape: Sequence[Sequence[Any]]) -> str:
    """A shape with names, such as [n_tok 11, n_embd 128]."""
    return "[" + ", ".join(f"{name} {size}" for name, size in shape) + "]"


def op_text(op: dict[str, Any], position: int, colour: bool = False) -> str:
    """An op in a few lines of up to 100 columns."""
    name = f"\x1b[1m{op['name']}\x1b[0m" if colour else op["name"]
    sources = ["x = " * (part["role"] == "x") + f"{part['name']} {shape_text(part['shape'])}" for part in op["inputs"]]
    if op["weight"]:
        sources.append(f"{op['weight']['name']} {op['weight']['type']} {shape_text(op['weight']['shape'])}")
    sources += [op["bias"]] if op["bias"] else []
    more = " ..." * (op["size"] > len(op["first"]))
    values = " ".join(f"{v:.4g}" for v in op["first"]) + more
    row, norm = (f"row {position}", "norm") if op["head"] is None else (
        f"row {position}, head {op['head']}", "norm of all heads")
    return "\n".join([f"{name}  {shape_text(op['shape'])}  {op['op']}", *_lines(op["formula"]),
                      *_wrapped("from ", sources), *_changed(op, position, row, norm, more),
                      *_lines(f"{row}: {values}   {norm} {op['norm']:.4g}"),
                      *_lines(op["sentence"])])


def _changed(op: dict[str, Any], position: int, row: str, norm: str, more: str) -> list[str]:
    """The lines about actions that changed an op, with its row as it was computed; none if no action did."""
    if not (how := op["changed"]):
        return []
    rows, by = how["rows"], ", then ".join(how["by"])
    if not rows:
        return _lines(f"changed by {by}: every value is as it was computed")
    places = "every row" if len(rows) == dict(op["shape"])["n_tok"] else f"row{'s' * (len(rows) > 1)} {_runs(rows)}"
    if position not in rows:
        return _lines(f"changed by {by} at {places}; row {position} is as it was computed")
    values = " ".join(f"{v:.4g}" for v in how["first"]) + more
    return [*_lines(f"changed by {by} at {places}"),
            *_lines(f"as computed, {row}: {values}   {norm} {how['norm']:.4g}"), *_lines("as changed:")]


def _runs(numbers: Sequence[int]) -> str:
    """Numbers as ranges, such as 0-3, 5."""
    parts: list[list[int]] = []
    for i in numbers:
        if parts and i == parts[-1][-1] + 1:
            parts[-1][1:] = [i]
        else:
            parts.append([i])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _lines(words: str) -> list[str]:
    return [part for line in words.splitlines()
            for part in textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="    ")]


def _wrapped(start: str, parts: Sequence[str]) -> list[str]:
    """Parts with commas between, as many per line as fit."""
    lines = [f"    {start}{parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append(" " * (3 + len(start)) + f" {part}")
        else:
            lines[-1] += f", {part}"
    return lines


def text(found: Trace) -> str:
    """The text that the terminal shows."""
    colour, n_layer = screen()[1], found.n_layer
    tokens = [[str(i), str(t), visible(piece)] for i, (t, piece) in
              enumerate(zip(found.about["prompts"]["prompt"]["tokens"], found.pieces))]
    numerics = found.about["model"]["numerics"]
    parts = [f"{found.about['model']['name']}, numerics {numerics}:\n{NUMERICS[numerics]}",
             table([["position", "token", "piece"], *tokens])]
    before = -1
    for op in found.ops:
        il = n_layer if op["layer"] is None and op["name"] not in ("inp_embd", "inp_scaled") else op["layer"]
        if il is not None and il != before:
            if il > before + 1:
                parts.append(f"... {_layers(before + 1, il - 1)}: the same ops with other weights, not shown")
            if il < n_layer:
                parts.append(f"---- layer {il} of {n_layer}")
            else:
                parts.append("---- the end: logits")
            before = il
        parts.append(op_text(op, found.position, colour))
    best = [[visible(piece), f"{p:.1%}"] for piece, p in found.best]
    return "\n\n".join([*parts, f"after {visible(found.pieces[found.position])} comes\n{table(best)}"])


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


# ---------------------------------------------------------------------------------------- command line


EPILOG = """\
example: tinymia trace -p "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --layer 3
x is the residual stream, i and j are positions, h is a head; a matrix times a row is written W x."""


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, of the layers and the position that are shown, and actions."""
    prompt_flags(p)
    p.add_argument("--layer", metavar="LIST", help="layers to show: 0,3-5 (default 0)")
    p.add_argument("--all", action="store_true", help="every layer")
    p.add_argument("--position", type=int, default=-1, metavar="POS", help="of the values (default -1, the last)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))


def before(args: Namespace) -> None:
    """Raise Error for flags that do not go together."""
    if args.all and args.layer is not None:
        raise Error("--all shows every layer: it does not go with --layer")


def run(args: Namespace, model: Model, out: Path | None) -> Trace:
    """Run the trace that the flags describe."""
    layers = None if args.all else args.layer or (0,)
    return trace(model, prompt_ids(args, model), layers, args.position, read_actions(args, model), out)


command = Command("trace", "The forward pass explained op by op: formula, shapes, weights, values, a sentence.",
                  add_flags, run, text, epilog=EPILOG, before=before, drawn=())
