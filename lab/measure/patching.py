"""The measurement of `tinymia sweep`: how the last logits change if one run gets a piece of another.

The pass of a cell starts at its layer and at the first row that differs, on the keys and values of the base run; the
cells of one layer continue as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from tinymia import Cache, Context, Error, Model, Replace
from tinymia_engine import stream

from .answers import log_softmax, rank
from .branches import ROWS, Branches

BY_POSITION, BY_HEAD = ("l_out", "kqv_out", "ffn_out"), ("kqv", "kq_soft_max")
METRICS = ("logit-difference", "probability", "kl", "rank")


@dataclass(frozen=True)
class Setting:
    """The settings of a sweep: what is patched, from which run into which, and the tokens whose logits are measured."""

    clean: tuple[int, ...]      # token ids
    corrupt: tuple[int, ...]
    tensor: str                 # base name
    noising: bool               # True: patch corrupt into the clean run; False: clean into the corrupt run
    last: bool                  # True: patch only the last position of a head
    answer: int
    against: int

    @property
    def n_tok(self) -> int:
        """The number of tokens, which is the same in both prompts."""
        return len(self.clean)

    @property
    def base(self) -> tuple[int, ...]:
        """The prompt whose run is patched with pieces of the other one's."""
        return self.clean if self.noising else self.corrupt


class Batch(NamedTuple):
    """Cells of one layer that are run together, later starts first."""

    setting: Setting
    layer: int
    columns: list[int]          # positions or heads
    starts: list[int]           # first row that the patch changes


class Runs(NamedTuple):
    """The two unpatched runs."""

    cache: Cache                # keys and values of the base run
    x: list[np.ndarray]         # its residual stream before each layer and after the last: n_layer + 1 arrays
    own: list[np.ndarray]       # the tensor in the base run, by layer, token axis first
    source: list[np.ndarray]    # the same in the other run
    clean: np.ndarray           # logits at the last position, float32 [n_vocab]
    corrupt: np.ndarray


def make_runs(model: Model, setting: Setting) -> Runs:
    """Run both prompts. Raises Error if one does not fit the context."""
    c, cache, name = model.config, model.cache(), setting.tensor
    other = setting.corrupt if setting.noising else setting.clean
    base = model.run(setting.base, list(dict.fromkeys([stream(c, 0), "l_out", name])), logits="last", cache=cache)
    source = model.run(other, [name], logits="last")
    axis = model.table[f"{name}-0"][0].dims.index("n_tok")
    own, given = ([np.moveaxis(run[f"{name}-{il}"], axis, 0) for il in range(c.n_layer)] for run in (base, source))
    x = [base[stream(c, il)] for il in range(c.n_layer + 1)]
    rows = base.logits[0], source.logits[0]
    clean, corrupt = rows if setting.noising else rows[::-1]
    return Runs(cache, x, own, given, clean, corrupt)


Key = TypeVar("Key")
Made = TypeVar("Made")


def once(make: Callable[[Model, Key], Made]) -> Callable[[Model, Key], Made]:
    """Return `make`, but with its last result of each model kept, for the next batch in this process."""
    last: WeakKeyDictionary[Model, tuple[Key, Made]] = WeakKeyDictionary()
    making = Lock()

    def made(model: Model, key: Key) -> Made:
        with making:
            if model not in last or last[model][0] != key:
                last[model] = key, make(model, key)
            return last[model][1]

    return made


_runs = once(make_runs)


def runs_of(model: Model, setting: Setting) -> Runs:
    """The result of make_runs, computed once for all batches of a sweep in this process."""
    return _runs(model, replace(setting, answer=0, against=0))


def first_change(setting: Setting, runs: Runs, layer: int, column: int) -> int | None:
    """The first row through which a patch can change the last logits; None if it changes nothing.

    Rows before it are equal in both runs, bit for bit. In the last layer, only the last row matters.
    """
    last = setting.n_tok - 1
    first = last if layer == len(runs.own) - 1 else 0
    if setting.tensor in BY_POSITION:
        rows = np.array([column] if column >= first else [], np.intp)
        differs = runs.own[layer][rows] != runs.source[layer][rows]
    else:
        rows = np.arange(last if setting.last else first, last + 1)
        differs = runs.own[layer][rows, column] != runs.source[layer][rows, column]
    changed = rows[differs.any(axis=1)]
    return int(changed[0]) if len(changed) else None


def batches(setting: Setting, runs: Runs, layer: int, columns: Sequence[int]) -> tuple[list[int], list[Batch]]:
    """Split columns into those whose patch changes nothing, and batches of the others, of up to ROWS rows each."""
    found = [(first_change(setting, runs, layer, column), column) for column in columns]
    made: list[Batch] = []
    rows = ROWS
    for start, column in sorted(((s, c) for s, c in found if s is not None), reverse=True):
        rows += setting.n_tok - start
        if rows > ROWS:
            made.append(Batch(setting, layer, [], []))
            rows = setting.n_tok - start
        made[-1].columns.append(column)
        made[-1].starts.append(start)
    return [column for start, column in found if start is None], made


def run_batch(model: Model, batch: Batch) -> np.ndarray:
    """The metrics of each cell of a batch: float64 [n_cell, 4], in the order of METRICS."""
    runs = runs_of(model, batch.setting)
    return measure(patched(model, batch, runs), runs.clean, batch.setting.answer, batch.setting.against)


def patched(model: Model, batch: Batch, runs: Runs) -> np.ndarray:
    """The logits at the last position of each cell: float32 [n_cell, n_vocab]."""
    setting, il, starts, _ = batch.setting, batch.layer, batch.starts, batch.columns
    branches, source = Branches(runs.cache, starts, setting.n_tok), runs.source[il]

    def put(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        for (part, start), column in zip(branches.parts, batch.columns):
            if setting.tensor in BY_POSITION:
                rows[part.start] = source[start]
            else:
                rows[part, column] = source[start:, column]
        return x

    def put_in(x: np.ndarray, ctx: Context) -> np.ndarray:
        return put(x, ctx.rows(x))

    tokens = [token for start in starts for token in setting.base[start:]]
    if setting.tensor == "l_out":
        x = np.concatenate([runs.x[il + 1][start:] for start in starts])
        return model.run(tokens, cache=branches, start=(il + 1, put(x, x)), logits="last").logits
    x = np.concatenate([runs.x[il][start:] for start in starts])
    change = Replace(f"{setting.tensor}-{il}", put_in)
    return model.run(tokens, actions=[change], cache=branches, start=(il, x), logits="last").logits


def measure(rows: np.ndarray, clean: np.ndarray, answer: int, against: int) -> np.ndarray:
    """The METRICS of rows of logits [n, n_vocab]: float64 [n, 4].

    They are the logit of `answer` minus that of `against`, the probability of the answer, the KL divergence from the
    clean run in nats, and the rank of the answer.
    """
    before, after = log_softmax(clean), log_softmax(rows)
    difference = rows[:, answer].astype(np.float64) - rows[:, against]
    divergence = (np.exp(before) * (before - after)).sum(1)
    ranks = [rank(row, answer) for row in rows]
    return np.stack([difference, np.exp(after[:, answer]), divergence, ranks], axis=1)


def check_ends(model: Model, clean: Sequence[int], corrupt: Sequence[int], answer: int, against: int,
               ends: np.ndarray) -> None:
    """Raise Error if both runs, whose METRICS are ends [2, 4], have the same logit difference."""
    if ends[0, 0] == ends[1, 0]:
        same = "the prompts are the same, and so " * (tuple(clean) == tuple(corrupt))
        tokens = f"{model.piece(answer)!r} and {model.piece(against)!r}"
        raise Error(f"{same}the logit difference of {tokens} is the same in both runs: choose other tokens (--answer, "
                    "--against) or another metric (--metric)")


def check_aligned(model: Model, clean: Sequence[int], corrupt: Sequence[int]) -> None:
    """Raise Error, with the place, unless each position means the same in both prompts.

    They must have equally many tokens. And where they differ, no word of one may stand a token earlier or later in the
    other, as in "▁Ro me ▁is ▁big" and "▁Paris ▁is ▁very ▁big".
    """
    n = min(len(clean), len(corrupt))
    same = [a == b for a, b in zip(clean, corrupt)]
    if len(clean) != len(corrupt):
        first = next((i for i in range(n) if not same[i]), n)
        raise Error(f"the prompts do not align: the clean one has {len(clean)} tokens, the corrupt one {len(corrupt)}; "
                    f"they part at position {first}: {_shown(model, clean[first:])} and "
                    f"{_shown(model, corrupt[first:])}")
    border = np.flatnonzero(np.diff([True, *same, True]))           # where the differing parts begin and end
    for i, end in border.reshape(-1, 2).tolist():
        a, b = clean[i:end], corrupt[i:end]
        moved = [token for token in a if token in b and a.index(token) != b.index(token)]
        begins = [[model.piece(token)[:1].isspace() for token in part] for part in (a, b)]
        if moved and begins[0] != begins[1]:
            raise Error(f"the prompts do not align: at positions {i} to {end - 1} stand {_shown(model, a)} and "
                        f"{_shown(model, b)}: {model.piece(moved[0])!r} has moved; words must take as many tokens in "
                        "both")


def _shown(model: Model, ids: Sequence[int]) -> str:
    """The first six tokens, for a message."""
    return f"'{'|'.join(model.piece(i) for i in ids[:6])}{'|...' * (len(ids) > 6)}'" if ids else "the end"
