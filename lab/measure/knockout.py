"""Ablating several parts of a model together: heads, FFNs, and single edges of attention patterns.

A group is written as a text: parts, separated by commas, that are ablated at once.

    20.5,14.1           head 5 of layer 20 and head 1 of layer 14
    attn-20, ffn-3-5    all heads of layer 20; the FFNs of layers 3, 4 and 5
    23.4@-1:3           head 23.4 at the last position no longer sees position 3
    attn-10-20@4:0-2    the same for all heads of some layers, and several positions; @4:0-2 alone: in all layers

The output of heads and FFNs becomes zero, a mean, or their output on another prompt. An edge is cut before the softmax,
by -inf, so that the position's attention goes to the positions that it still sees.

Source: Geva, Bastings, Filippova, Globerson, Dissecting Recall of Factual Associations in Auto-Regressive Language
Models (2023), arXiv 2304.14767 (edges).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinymia import Ablate, Action, Context, Error, Model, Replace

from .prompt_sets import cut_prompts, pooled
from .selection import chosen, positions

RANGE = r"-?\d+(?:-\d+)?"
PART = re.compile(rf"(?:(?P<kind>attn|ffn)-(?P<layers>\d+(?:-\d+)?)|(?P<il>\d+(?:-\d+)?)\.(?P<heads>\d+(?:-\d+)?))?"
                  rf"(?:@(?P<query>{RANGE}):(?P<key>{RANGE}))?")
BASES = ("kqv_merged", "ffn_out")


class Group(NamedTuple):
    """The parts that are ablated at once."""

    heads: list[tuple[int, int]]        # (layer, head)
    ffns: list[int]
    edges: dict[int, np.ndarray]        # by layer: bool [n_head, n_tok, n_tok], True where a query loses a key


class Work(NamedTuple):
    """The input of run_group: everything that is needed to ablate one group."""

    ids: list[int]
    group: Group
    put: Mapping[str, np.ndarray]       # by base name: float32 [n_layer, n_row or 1, width], the values put there
    at: list[int]                       # positions where heads and FFNs are ablated


def read_group(model: Model, text: str, n_tok: int) -> Group:
    """Read a group from its text, for a prompt of n_tok tokens. Raises Error."""
    c, heads, ffns, edges = model.config, list[tuple[int, int]](), list[int](), dict[int, np.ndarray]()
    for part in text.split(","):
        found = PART.fullmatch(part.strip())
        if not part.strip() or found is None or (found["kind"] == "ffn" and found["query"]):
            raise Error(f"group {text!r}: {part.strip()!r} is not a part: write 20.5 (a head), attn-20, ffn-3, ffn-3-5 "
                        "(layers), 20.5@4:3 (head 20.5 at position 4 no longer sees position 3) or @4:3 (no head does)")
        layers = chosen(found["layers"] or found["il"], c.n_layer, "layer")
        which = chosen(found["heads"], c.n_head, "head")
        if found["query"] is not None:
            queries, keys = (_places(found[name], n_tok) for name in ("query", "key"))
            for il in layers:
                cut = edges.setdefault(il, np.zeros((c.n_head, n_tok, n_tok), bool))
                cut[np.ix_(which, queries, keys)] = True
            if min(keys) > max(queries):
                raise Error(f"group {text!r}: position {max(queries)} does not see later positions in any case")
        elif found["kind"] == "ffn":
            ffns += layers
        else:
            heads += [(il, head) for il in layers for head in which]
    ago = np.arange(n_tok)[:, None] - np.arange(n_tok)      # how long ago a query's key was
    for il, cut in edges.items():
        sees = (ago >= 0) & (ago < (c.layers[il].window or n_tok))
        blind = np.argwhere(~(sees & ~cut).any(-1))
        if len(blind):
            raise Error(f"group {text!r}: head {il}.{blind[0][0]} at position {blind[0][1]} would see nothing at all")
    return Group(list(dict.fromkeys(heads)), list(dict.fromkeys(ffns)), edges)


def _places(text: str, n_tok: int) -> list[int]:
    first, last = re.fullmatch(r"(-?\d+)(?:-(\d+))?", text).groups()    # type: ignore[union-attr]
    wanted = [int(first)] if last is None else list(range(int(first), int(last) + 1))
    return positions(wanted, n_tok, "the prompt").tolist()


def changes(model: Model, work: Work) -> list[Action]:
    """The actions that ablate a group."""
    actions = list[Action]()
    for il in sorted({il for il, _ in work.group.heads}):
        heads = [head for layer, head in work.group.heads if layer == il]
        value = work.put["kqv_merged"][il]
        actions.append(Ablate(f"kqv_merged-{il}", "value", value, at=work.at, heads=heads))
    actions += [Ablate(f"ffn_out-{il}", "value", work.put["ffn_out"][il], at=work.at) for il in work.group.ffns]

    scores = "kq" if model.config.attn_soft_cap is None else "kq_scaled_2"      # what goes into the softmax
    for il, cut in work.group.edges.items():

        def blind(x: np.ndarray, ctx: Context, cut: np.ndarray = cut) -> np.ndarray:
            x[cut[:, :, : x.shape[2]]] = -np.inf
            return x

        actions.append(Replace(f"{scores}-{il}", blind))
    return actions


def run_group(model: Model, work: Work) -> np.ndarray:
    """The logits of the last position with a group ablated: float32 [n_vocab]."""
    return model.run(work.ids, actions=changes(model, work), logits="last").logits[-1]


def instead(
    model: Model, mode: str, prompts: Sequence[str | Sequence[int]] | None, pool: str,
    other: str | Sequence[int] | None, at: int | Sequence[int] | None, n_tok: int,
) -> dict[str, np.ndarray]:
    """The values put in place of heads and FFNs: float32 [n_layer, n_row or 1, width] by base name. Raises Error."""
    c = model.config
    if mode == "mean" and prompts is not None:
        cut = cut_prompts(model, prompts, "mean's")
        return {base: np.mean([pooled(model, (base, pool, ids)) for ids in cut], axis=0)[:, None].astype(np.float32)
                for base in BASES}
    if mode == "resample" and other is not None:
        (ids,) = cut_prompts(model, [other], "resample's")
        if at is None and len(ids) != n_tok:
            raise Error(f"the other prompt has {len(ids)} tokens and the prompt {n_tok}: they do not align; take one "
                        "of the same length, or name positions (-1 is the last)")
        rows = positions(at, len(ids), "the other prompt")
        run = model.run(ids, keep=list(BASES), logits="last")
        return {base: np.array([run[f"{base}-{il}"][rows] for il in range(c.n_layer)]) for base in BASES}
    widths = {"kqv_merged": c.n_head * c.d_head_v, "ffn_out": c.n_embd}
    return {base: np.zeros((c.n_layer, 1, width), np.float32) for base, width in widths.items()}
