"""The measurement of `tinymia path`: how the last logits change if one part's change reaches another part directly.

The sender writes into the residual stream, and the receiver reads the stream later. The receiver is given the stream of
the clean run plus the sender's change, which is what the sender wrote in the corrupt run minus what it wrote in the
clean one. Nothing between the two is computed again. What the receiver makes of it replaces its own values in the clean
run, and everything after the receiver is computed as usual. So the pass begins at the receiver's layer; several senders
go as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from tinymia import Cache, Context, Model, Replace
from tinymia_engine import stream

from .branches import ROWS, Branches
from .passage import passed
from .patching import measure, once
from .path_parts import Part, reached, shared_by


@dataclass(frozen=True)
class Setting:
    """The settings of a run: the prompts, the receivers, and the tokens whose logits are measured."""

    clean: tuple[int, ...]          # token ids of the base run
    corrupt: tuple[int, ...]
    receivers: tuple[Part, ...]
    at: tuple[int, ...] | None      # positions where the sender changes; None: all
    answer: int
    against: int


class Batch(NamedTuple):
    """Senders that are run together, later starts first; all of them reach the same receivers."""

    setting: Setting
    reached: tuple[Part, ...]
    senders: list[Part]
    starts: list[int]               # the first row that changes


class Runs(NamedTuple):
    """The two unpatched runs. Lists are by layer."""

    cache: Cache                    # keys and values of the clean run
    x: list[np.ndarray]             # its stream before each layer and after the last: n_layer + 1 arrays
    inside: list[np.ndarray]        # its stream between attention and FFN
    heads: list[list[np.ndarray]]   # kqv_merged of the clean run, and of the corrupt one
    ffn: list[list[np.ndarray]]     # ffn_out of both
    embedding: list[np.ndarray]     # the stream before the first layer, of both
    clean: np.ndarray               # logits at the last position, float32 [n_vocab]
    corrupt: np.ndarray


def make_runs(model: Model, prompts: tuple[Sequence[int], Sequence[int]]) -> Runs:
    """Run both prompts, clean and corrupt. Raises Error if one does not fit the context."""
    c, cache, first = model.config, model.cache(), stream(model.config, 0)
    names = ["kqv_merged", "ffn_out"]
    base = model.run(prompts[0], [first, "l_out", "ffn_inp", *names], logits="last", cache=cache)
    source = model.run(prompts[1], [first, *names], logits="last")
    heads, ffn = ([[run[f"{name}-{il}"] for il in range(c.n_layer)] for run in (base, source)] for name in names)
    return Runs(cache, [base[stream(c, il)] for il in range(c.n_layer + 1)],
                [base[f"ffn_inp-{il}"] for il in range(c.n_layer)], heads, ffn, [base[first], source[first]],
                base.logits[0], source.logits[0])


_runs = once(make_runs)


def runs_of(model: Model, setting: Setting) -> Runs:
    """The two unpatched runs, computed once for all batches in this process."""
    return _runs(model, (setting.clean, setting.corrupt))


# ---------------------------------------------------------------------------------------- passes


def outputs(model: Model, runs: Runs, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The output of a sender in the clean and in the corrupt run, before the matrix that follows: [n_tok, n] each."""
    if part.kind == "embedding":
        own, source = runs.embedding
        return own, source
    own, source = (found[part.layer] for found in (runs.ffn if part.kind == "ffn" else runs.heads))
    d = model.config.d_head_v
    columns = slice(None) if part.kind == "ffn" else slice(part.head * d, (part.head + 1) * d)
    return own[:, columns], source[:, columns]


def batches(model: Model, setting: Setting, runs: Runs, senders: Sequence[Part]) -> tuple[list[Part], list[Batch]]:
    """Split senders into those whose change changes nothing, and batches of the others, of up to ROWS rows each."""
    n_tok, last_layer, same, work = len(setting.clean), model.config.n_layer - 1, list[Part](), list[Batch]()
    by_target: dict[tuple[Part, ...], list[tuple[int, Part]]] = {}
    for sender in senders:
        own, source = outputs(model, runs, sender)
        rows, targets = (own != source).any(1), reached(sender, setting.receivers)
        if setting.at is not None:
            rows[np.setdiff1d(np.arange(n_tok), setting.at)] = False
        if all(part.layer > last_layer or (part.layer == last_layer and part.read not in ("k", "v"))
               for part in targets):
            rows[:-1] = False           # a query, or an FFN, of the last layer: of other rows, nothing is read
        if rows.any():
            by_target.setdefault(targets, []).append((int(rows.argmax()), sender))
        else:
            same.append(sender)
    for targets, found in by_target.items():
        size = ROWS
        for start, sender in sorted(found, key=lambda pair: -pair[0]):
            size += n_tok - start
            if size > ROWS:
                work.append(Batch(setting, targets, [], []))
                size = n_tok - start
            work[-1].senders.append(sender)
            work[-1].starts.append(start)
    return same, work


def sent(model: Model, setting: Setting, runs: Runs, sender: Part, start: int) -> np.ndarray:
    """The change of the stream by a sender alone, in the rows from `start` on: [n_row, n_embd]."""
    own, source = (x[start:] for x in outputs(model, runs, sender))
    if sender.kind == "head":
        both = np.concatenate([runs.heads[0][sender.layer][start:]] * 2)        # [2 * n_row, n_head * d_head_v]
        first = sender.head * own.shape[1]
        both[len(own) :, first : first + own.shape[1]] = source
        out = model.ops.several().linear(both, model.weights.blk[sender.layer].attn_output)
        own, source = passed(model, f"kqv_out-{sender.layer}", out).reshape(2, len(own), -1)
    elif sender.kind == "ffn":
        own, source = (passed(model, f"ffn_out-{sender.layer}", x) for x in (own, source))
    change = source - own
    if setting.at is not None:
        change[np.setdiff1d(np.arange(start, len(setting.clean)), setting.at) - start] = 0
    return change


def received(model: Model, part: Part, x: np.ndarray) -> dict[str, np.ndarray]:
    """The first products that a receiver makes of the rows x of the stream, by the names of `forward`."""
    c, blk, ops = model.config, model.weights.blk[part.layer], model.ops.several()
    weight = blk.ffn_norm if part.kind == "ffn" else blk.attn_norm
    cur = x if weight is None else ops.rms_norm(x, c.eps, 1) * weight                       # [n_row, n_embd]
    if part.kind == "ffn":
        return {f"{name}-{part.layer}": ops.linear(cur, getattr(blk, name)) for name in ("ffn_gate", "ffn_up")}
    name = {"q": "Qcur_pre", "k": "Kcur_pre", "v": "Vcur"}[part.read]
    heads = c.n_head if part.read == "q" else c.n_head_kv
    made = ops.linear(cur, getattr(blk, f"attn_{part.read}"))
    return {f"{name}-{part.layer}": made.reshape(len(x), heads, -1)}                        # [n_row, n_head(_kv), ...]


def run_batch(model: Model, batch: Batch) -> np.ndarray:
    """The metrics of each sender of a batch, as patching.measure gives them: float64 [n_sender, 4]."""
    setting, starts, c = batch.setting, batch.starts, model.config
    runs = runs_of(model, setting)
    change = np.concatenate([sent(model, setting, runs, *pair) for pair in zip(batch.senders, starts)])

    def rows(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[start:] for start in starts])

    first, actions = min(part.layer for part in batch.reached), list[Replace]()
    x = rows(runs.x[first])
    if first == c.n_layer:                          # the logits read
        x = x + change
    else:
        for part in batch.reached:
            read = rows((runs.inside if part.kind == "ffn" else runs.x)[part.layer]) + change
            columns = slice(None) if part.kind == "ffn" else shared_by(model, part)
            actions += [Replace(name, partial(put, made, columns))
                        for name, made in received(model, part, read).items()]
    tokens = [token for start in starts for token in setting.clean[start:]]
    branches = Branches(runs.cache, starts, len(setting.clean))
    logits = model.run(tokens, actions=actions, cache=branches, start=(first, x), logits="last").logits
    return measure(logits, runs.clean, setting.answer, setting.against)


def put(made: np.ndarray, columns: int | slice, x: np.ndarray, ctx: Context) -> np.ndarray:
    """Put in some columns of the rows that a receiver made: what Replace calls."""
    x = x.copy()
    x[:, columns] = made[:, columns]
    return x
