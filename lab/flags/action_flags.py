"""Flags that act on a tensor, for every command that runs a model: --patch, --ablate, --add and the like.

Actions are done in the order of their flags; --at, --when and the like belong to the flag before them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import tinymia
from tinymia import Error, Model


class Input(str):
    """The path of a file to be read, as typed."""


class Output(str):
    """The path of a file to be written, as typed."""


FILES = {"save": (Output, slice(1, 2)), "patch": (Input, slice(1, 2)), "patch_avg": (Input, slice(1, 3)),
         "add": (Input, slice(1, 2))}   # which values of a flag are files


@dataclass
class Spec:
    """An action as typed; it becomes a tinymia.Action when the model is known."""

    flag: str
    args: list[str]
    at: list[int] | None = None
    when: str = "prompt"
    from_idx: int | None = None
    to_idx: int | None = None


class Act(argparse.Action):
    """A flag that acts on a tensor."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        lengths = {"patch": (2, 4), "add": (2, 3)}.get(self.dest)
        if lengths and len(values) not in lengths:
            names = tuple(self.metavar or ())
            all_, more = (f"{option_string} {' '.join(names[:n])}" for n in (1, 2))
            parser.error(f"{option_string} takes {lengths[0]} or {lengths[1]} values, {all_} or {more}, "
                         f"not {len(values)}")
        values = values if isinstance(values, list) else [values]
        if self.dest in FILES:
            kind, which = FILES[self.dest]
            values[which] = map(kind, values[which])
        namespace.specs.append(Spec(self.dest, values))


class Qualify(argparse.Action):
    """A flag that says more about the action flag before it; `after` names flags that may be there, for the error."""

    def __init__(self, *args: Any, after: str = "--scale, --add or --ablate", **how: Any):
        super().__init__(*args, **how)
        self.after = after

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not namespace.specs:
            parser.error(f"{option_string} says more of the action before it, and there is none: put it behind "
                         f"{self.after}")
        setattr(namespace.specs[-1], self.dest, values)


def integers(text: str) -> list[int]:
    """Read a list of whole numbers, such as 3 or 3,5 or -1."""
    return [int(part) for part in text.split(",")]


integers.kind = "a position or a list of them: write 3, -1 or 3,5"  # type: ignore[attr-defined]  # in messages


def patch_flags(g: Any) -> None:
    """Add the flags that patch."""
    act, qualify = partial(g.add_argument, action=Act), partial(g.add_argument, action=Qualify)
    act("--patch", nargs="+", metavar=("NAME FILE", "FROM TO"),
        help="put row FROM of a saved tensor in place of row TO; without them, all of it")
    act("--patch-avg", dest="patch_avg", nargs=5, metavar=("NAME", "FILE1", "FILE2", "FROM", "TO"),
        help="the mean of two saved rows")
    qualify("--from-token-idx", dest="from_idx", type=int, metavar="I", after="--patch",
            help="FROM of the patch before, or the row of the --add before")
    qualify("--to-token-idx", dest="to_idx", type=int, metavar="J", after="--patch", help="TO of the patch before")


def change_flags(g: Any) -> None:
    """Add the flags that change a tensor without another run."""
    act, qualify = partial(g.add_argument, action=Act), partial(g.add_argument, action=Qualify)
    act("-a", "--ablate", nargs=1, metavar="HEADS",
        help="heads to silence: 3,9 (layer * n_head + head) or 1.4,2.0 (layer.head)")
    g.add_argument("--ablate-mode", choices=("zero", "mean"),
                   help="by zeros (default) or by the head's mean over the prompt's positions")
    act("-s", "--select", nargs=2, metavar=("LAYER", "HEAD"), help="silence the layer's other heads")
    act("--add", nargs="+", metavar=("NAME FILE", "COEF"), help="add COEF (1) times a saved vector")
    act("--add-token", dest="add_token", nargs=3, metavar=("NAME", "TOKEN", "COEF"),
        help="add COEF times a token's embedding; TOKEN is a piece (' reverse') or #id")
    act("--project-out-token", dest="project_out_token", nargs=2, metavar=("NAME", "TOKEN"),
        help="remove the direction of a token's embedding")
    act("--scale", nargs=2, metavar=("NAME", "FACTOR"), help="multiply by FACTOR")
    qualify("--at", type=integers, metavar="POS", help="positions of the change before: 3 or 3,5 or -1 (default: all)")
    qualify("--when", choices=("prompt", "decode", "all"),
            help="passes of the action before: over the prompt (default), over generated tokens, or all")


def number(text: str, flag: str, kind: type = int) -> Any:
    """A number from one of several values of a flag. Raises Error, which names the flag."""
    try:
        return kind(text)
    except ValueError:
        raise Error(f"--{flag.replace('_', '-')}: {text!r} is not a {'whole ' if kind is int else ''}number") from None


def actions_of(spec: Spec, model: Model, args: argparse.Namespace) -> list[tinymia.Action]:
    """The actions that a flag stands for. Raises Error."""
    flag, (name, *rest), when = spec.flag, spec.args, spec.when
    where: dict[str, Any] = {"at": spec.at, "when": when}
    if (spec.from_idx is not None or spec.to_idx is not None) and flag not in ("patch", "patch_avg", "add"):
        raise Error(f"--from-token-idx and --to-token-idx qualify --patch, --patch-avg and --add, not --{flag}")
    if spec.at is not None and flag in ("lens", "log", "save", "patch", "patch_avg"):
        raise Error(f"--at does not apply to --{flag.replace('_', '-')}{'; FROM and TO do' if 'patch' in flag else ''}")
    if flag == "lens":
        return [tinymia.Lens(name, number(rest[0], "logit-lens"), args.lens_score or "raw", when=when)]
    if flag == "log":
        return [tinymia.Log(name, when=when)]
    if flag == "save":
        return [tinymia.Save(name, rest[0], when=when)]
    if flag in ("patch", "patch_avg"):
        files, idx = (rest[:1], rest[1:]) if flag == "patch" else (rest[:2], rest[2:])
        src, to = (number(i, flag) for i in idx) if idx else (spec.from_idx, spec.to_idx)
        return [tinymia.Patch(name, tuple(files) if len(files) > 1 else files[0], src, at=to, when=when)]
    if flag in ("ablate", "select"):
        return [tinymia.Ablate(f"kqv_merged-{layer}", args.ablate_mode or "zero", heads=heads, **where)
                for layer, heads in heads_of(spec, model).items()]
    if flag == "scale":
        return [tinymia.Scale(name, number(rest[0], flag, float), **where)]
    if flag == "add":
        coef = number(rest[1], flag, float) if len(rest) > 1 else 1.0
        return [tinymia.Add(name, rest[0], coef, row=spec.from_idx, **where)]
    embedding = model.rows(model.weights.token_embd, np.array([model.tokenizer.one(rest[0])]))
    if flag == "add_token":
        return [tinymia.Add(name, embedding, number(rest[1], flag, float), **where)]
    return [tinymia.ProjectOut(name, embedding, **where)]


def heads_of(spec: Spec, model: Model) -> dict[int, list[int]]:
    """The heads to silence, by layer: from `3,9` or `1.4,2.0`; for --select, from the layer and the head to keep."""
    c, heads = model.config, dict[int, list[int]]()
    if spec.flag == "select":
        pairs = [(number(spec.args[0], "select"), number(spec.args[1], "select"))]
    else:
        pairs = []
        for part in spec.args[0].split(","):
            layer, dot, head = part.partition(".")
            one = number(layer, "ablate")
            pairs.append((one, number(head, "ablate")) if dot else divmod(one, c.n_head))
    for layer, head in pairs:
        if not (0 <= layer < c.n_layer and 0 <= head < c.n_head):
            raise Error(f"--{spec.flag}: no head {layer}.{head}: the model has {c.n_layer} layers of {c.n_head} heads: "
                        f"layers 0 to {c.n_layer - 1}, heads 0 to {c.n_head - 1}")
        heads.setdefault(layer, []).append(head)
    if spec.flag == "select":
        return {layer: [h for h in range(c.n_head) if h not in kept] for layer, kept in heads.items()}
    return heads


def read_actions(args: argparse.Namespace, model: Model) -> list[tinymia.Action]:
    """The actions that the flags of a command stand for, in the order given. Raises Error."""
    if args.ablate_mode and not {spec.flag for spec in args.specs} & {"ablate", "select"}:
        raise Error("--ablate-mode goes with --ablate or --select")
    return [action for spec in args.specs for action in actions_of(spec, model, args)]
