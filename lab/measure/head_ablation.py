"""Heads of one layer, each ablated alone, in one batch that begins at that layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinymia import Cache, Context, Error, Model, Replace

from .answers import kl, logit_difference, probability
from .branches import ROWS, Branches
from .prompt_sets import POOLS, cut_prompts
from .selection import positions

MODES = ("zero", "mean", "resample")
METRICS = ("logit-difference", "logit", "probability", "kl")    # in the order of measure()


class Layer(NamedTuple):
    """The input of ablate_layer: everything that is needed to ablate heads of one layer."""

    layer: int
    tokens: list[int]   # from the first ablated position on, [n_tail]
    cache: Cache        # holds the positions before
    start: int          # the first ablated position
    x: np.ndarray       # float32 [n_tail, n_embd]: the residual stream that the layer reads
    rows: np.ndarray    # intp [n_row]: the rows of the tail that are ablated
    heads: list[int]
    put: np.ndarray     # float32 [n_row or 1, n_head, d_head_v]: the values that replace them


def ablate_layer(model: Model, work: Layer) -> np.ndarray:
    """The logits of the last position with each head ablated: float32 [len(heads), n_vocab].

    Ablating a head changes nothing before kqv_merged of its layer, so all versions start at that layer, as one batch.
    """
    c, n_tail, found = model.config, len(work.tokens), []
    size = max(1, ROWS // n_tail)
    for heads in (work.heads[i : i + size] for i in range(0, len(work.heads), size)):

        def put(x: np.ndarray, ctx: Context, heads: list[int] = heads) -> np.ndarray:
            versions = x.reshape(len(heads), n_tail, c.n_head, c.d_head_v)
            for version, head in zip(versions, heads):
                version[work.rows, head] = work.put[:, head]
            return x

        branches = Branches(work.cache, [work.start] * len(heads), work.start + n_tail)
        change, x = Replace(f"kqv_merged-{work.layer}", put), np.tile(work.x, (len(heads), 1))
        found.append(model.run(work.tokens * len(heads), actions=[change], logits="last", cache=branches,
                               start=(work.layer, x)).logits)
    return np.concatenate(found)


def measure(row: np.ndarray, plain: np.ndarray, answer: int, against: int) -> list[float]:
    """The METRICS of a row of logits: logit difference, logit and probability of the answer, KL from `plain`."""
    return [logit_difference(row, answer, against), float(row[answer]), probability(row, answer), kl(plain, row)]


def head_outputs(model: Model, other: str | Sequence[int], at: int | Sequence[int] | None, n_tok: int) -> np.ndarray:
    """The head outputs at positions of another prompt: float32 [n_layer, n_row, n_head, d_head_v]. Raises Error."""
    c, (ids,) = model.config, cut_prompts(model, [other], "resample's")
    if at is None and len(ids) != n_tok:
        raise Error(f"the other prompt has {len(ids)} tokens and the prompt {n_tok}: they do not align; take one of "
                    "the same length, or name positions (-1 is the last)")
    rows, run = positions(at, len(ids), "the other prompt"), model.run(ids, keep=["kqv_merged"], logits="last")
    return np.array([run[f"kqv_merged-{il}"][rows].reshape(-1, c.n_head, c.d_head_v) for il in range(c.n_layer)])


def check_mode(mode: str, pool: str, prompts: Any, other: Any) -> None:
    """Raise Error for an unknown mode or pool, and for arguments that do not go with the mode."""
    if mode not in MODES:
        raise Error(f"ablation mode {mode!r}: it must be zero, mean or resample")
    if pool not in POOLS:
        raise Error(f"pool {pool!r}: it must be last or mean")
    if (mode == "mean") != (prompts is not None):
        raise Error("mode mean goes with a set of prompts to take the mean over, and no other mode does")
    if (mode == "resample") != (other is not None):
        raise Error("mode resample goes with another prompt to take the heads' outputs from, and no other mode does")
