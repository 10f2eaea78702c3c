"""tinymia: a Llama forward pass whose every op output has a name.

GGUF weights are used where they lie, in the mapped file. Every name can be logged, seen through the logit lens,
saved, patched, ablated, added to or replaced. Read from top to bottom:

    Config, Weights, Cache      what a model is, with the shape of every field
    named tensors               the table of names, in the order of computation
    actions                     Lens, Log, Save, Replace, Patch, Ablate, Add, ProjectOut, Scale
    forward                     the model: one op a line, name first, shape last
    Model                       load, run, generate, lens

Around it: kernels/ (the arithmetic, by weight format), files/ (GGUF, vocabulary, saved tensors) and lab/ (the command
line, pictures). Dimension names are ggml's: n_embd, n_head, n_head_kv, d_head, n_ff, n_vocab, n_tok, n_kv.
"""

from __future__ import annotations

import difflib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinymia_kernels as kernels
from tinymia_files import (
    Error,
    GGUFError,
    Tensor,
    Text,
    as_rows,
    check_target,
    decode_now,
    read_gguf,
    read_hparams,
    read_tensor,
    read_tokenizer,
    write_tensors,
)
from tinymia_kernels import Sampler, attention, rms_norm, rope, rope_angles, silu, softmax, store_keys, store_values

__version__ = "0.1.0"
__all__ = [
    "Ablate", "Action", "ActionError", "Add", "Cache", "Config", "Context", "Edit", "Error", "GGUFError", "Generation",
    "Lens", "Log", "Model", "Op", "Patch", "ProjectOut", "Record", "Replace", "Run", "Save", "Scale", "Tensor",
    "UnknownName", "Weights", "load", "main", "match", "name_table",
]  # fmt: skip


class UnknownName(Error, KeyError):
    """A name that matches no tensor; the message lists the closest ones."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class ActionError(Error):
    """An action that cannot be done: a source of another shape, a position out of range, one that never fired."""


# ---------------------------------------------------------------------------------------- Config, Weights, Cache


@dataclass(frozen=True)
class Config:
    """What the metadata says of the model's shape."""

    name: str           # general.name
    n_embd: int         # width of the residual stream
    n_layer: int
    n_head: int         # query heads
    n_head_kv: int      # key and value heads; n_head / n_head_kv queries share one
    d_head: int         # width of a query and of a key
    d_head_v: int       # width of a value
    n_ff: int           # width of the feed-forward block
    n_vocab: int
    n_ctx: int          # context the model was trained for, the most positions a run may have
    n_rot: int          # leading elements of each head that RoPE turns
    eps: float          # RMS norm
    rope_base: float
    rope_scale: float   # positions are multiplied by it: 1 / factor of linear scaling and yarn
    rope_gain: float    # cos and sin are multiplied by it: 1 where neither yarn nor the metadata say otherwise
    yarn: tuple[float, float] | None    # pairs up to the first are not scaled, from the second on wholly

    def sizes(self) -> dict[str, int]:
        """Size of each dimension in the table of names that a prompt does not decide."""
        return {**vars(self), "n_head*d_head_v": self.n_head * self.d_head_v}


class Linear(NamedTuple):
    """A matrix and, in some models, a bias."""

    weight: Tensor              # [n_out, n_in]
    bias: np.ndarray | None     # float32 [n_out]


@dataclass(frozen=True)
class Block:
    """The weights of one layer, by their GGUF names."""

    attn_norm: np.ndarray       # [n_embd]
    attn_q: Linear              # n_embd -> n_head * d_head
    attn_k: Linear              # n_embd -> n_head_kv * d_head
    attn_v: Linear              # n_embd -> n_head_kv * d_head_v
    attn_output: Linear         # n_head * d_head_v -> n_embd
    ffn_norm: np.ndarray        # [n_embd]
    ffn_gate: Linear            # n_embd -> n_ff
    ffn_up: Linear              # n_embd -> n_ff
    ffn_down: Linear            # n_ff -> n_embd


class Weights(Mapping[str, Tensor]):
    """All weights: by GGUF name as a mapping, and as attributes for the forward pass.

    Every shape is checked against the config here, so that no kernel ever sees one that was not.
    """

    def __init__(self, tensors: dict[str, Tensor], c: Config, path: Path):
        self._tensors, self._path = tensors, path
        q, k, v = c.n_head * c.d_head, c.n_head_kv * c.d_head, c.n_head_kv * c.d_head_v
        block = {
            "attn_norm": (c.n_embd,), "attn_q": (q, c.n_embd), "attn_k": (k, c.n_embd), "attn_v": (v, c.n_embd),
            "attn_output": (c.n_embd, c.n_head * c.d_head_v),
            "ffn_norm": (c.n_embd,), "ffn_gate": (c.n_ff, c.n_embd), "ffn_up": (c.n_ff, c.n_embd),
            "ffn_down": (c.n_embd, c.n_ff),
        }  # fmt: skip
        self.token_embd = self._tensor("token_embd.weight", (c.n_vocab, c.n_embd))
        self.blk = [Block(**{name: self._part(f"blk.{il}.{name}", shape) for name, shape in block.items()})
                    for il in range(c.n_layer)]
        self.output_norm = self._part("output_norm", (c.n_embd,))                   # [n_embd]
        self.output = Linear(self.token_embd, None)                                 # n_embd -> n_vocab
        if "output.weight" in tensors:
            self.output = self._part("output", (c.n_vocab, c.n_embd))
        self.rope_freqs = None                                                      # [n_rot / 2]
        if "rope_freqs.weight" in tensors:
            self.rope_freqs = self._part("rope_freqs", (c.n_rot // 2,))
        decode_now(path, [self.token_embd, self.output.weight] + [w.weight for b in self.blk for w in vars(b).values()
                                                                  if isinstance(w, Linear)])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self._path}: tensor {name} {list(shape)} is missing")
        if tensor.shape != shape:
            raise GGUFError(f"{self._path}: tensor {name} is {list(tensor.shape)}; the metadata ask for {list(shape)}")
        return tensor

    def _part(self, name: str, shape: tuple[int, ...]) -> Any:
        """A vector as float32, a matrix where it lies with the bias that may go with it."""
        weight, bias = self._tensor(f"{name}.weight", shape), f"{name}.bias"
        if len(shape) == 1:
            return weight.numpy()
        return Linear(weight, self._tensor(bias, shape[:1]).numpy() if bias in self._tensors else None)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        raise UnknownName(f"no weight is called {name!r}{_closest(name, self._tensors)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Cache:
    """Keys and values of the positions seen so far, a pair of arrays a layer.

    k[il] is [n_head_kv, capacity, d_head] and v[il] is [n_head_kv, d_head_v, capacity]: float16 with ggml's numerics,
    float32 otherwise. Capacity doubles as needed. The tokens of a pass are one sequence here, which goes on after the
    first n positions; a subclass may know better (lab/branches.py: several sequences with a common beginning).
    """

    def __init__(self, c: Config, numerics: str):
        dtype = np.float16 if numerics == "ggml" else np.float32
        self.n = 0  # positions that hold something
        self.of = c, numerics
        self.k = [np.zeros((c.n_head_kv, 0, c.d_head), dtype) for _ in range(c.n_layer)]
        self.v = [np.zeros((c.n_head_kv, c.d_head_v, 0), dtype) for _ in range(c.n_layer)]

    def reserve(self, n: int) -> None:
        """Make room for n positions in all."""
        if n > self.k[0].shape[1]:
            more = -(-max(n, 2 * self.k[0].shape[1]) // 64) * 64 - self.k[0].shape[1]
            self.k = [np.pad(k, ((0, 0), (0, more), (0, 0))) for k in self.k]
            self.v = [np.pad(v, ((0, 0), (0, 0), (0, more))) for v in self.v]

    def truncate(self, n: int) -> None:
        """Forget the positions from n on: to zeros, since products read whole vectors of 16 positions."""
        self.n = n
        for v in self.v:
            v[:, :, n:] = 0

    def positions(self, n_tok: int) -> np.ndarray:
        """Of the n_tok rows of the next pass, intp [n_tok]."""
        return np.arange(self.n, self.n + n_tok)

    def last(self, x: np.ndarray) -> np.ndarray:
        """Of rows [n_tok, ...] the one whose logits tell the next token."""
        return x[-1:]

    def store(self, il: int, k: np.ndarray, v: np.ndarray) -> None:
        """Keep the keys [n_tok, n_head_kv, d_head] and values [n_tok, n_head_kv, d_head_v] of a pass."""
        store_keys(self.k[il], k, self.n)
        store_values(self.v[il], v, self.n)

    def kq(self, il: int, q: np.ndarray) -> np.ndarray:
        """Scores of queries [n_tok, n_head, d_head] with the keys: [n_head, n_tok, n_kv]."""
        return kernels.kq(q, self.k[il], self.n + len(q))

    def soft_max(self, kq: np.ndarray, scale: np.float32) -> np.ndarray:
        """The attention pattern: scaled, masked, normalised; [n_head, n_tok, n_kv]."""
        return kernels.soft_max(kq, scale, self.n)

    def kqv(self, il: int, pattern: np.ndarray) -> np.ndarray:
        """Values weighed by the pattern: [n_head, n_tok, d_head_v]."""
        return kernels.kqv(pattern, self.v[il])

    def attention(self, il: int, q: np.ndarray, scale: np.float32, pool: kernels.Pool) -> np.ndarray:
        """The three in one, heads side by side: [n_tok, n_head * d_head_v]."""
        return attention(q, self.k[il], self.v[il], self.n, scale, pool)


# ---------------------------------------------------------------------------------------- named tensors


class Op(NamedTuple):
    """One line of the table below."""

    base: str                   # name without its layer
    op: str                     # ggml's name of the operation
    dims: tuple[str, ...]       # shape in NumPy's order
    inputs: tuple[str, ...]     # x is the residual stream: inp_embd, or l_out of the layer before
    weight: str | None          # GGUF name without blk.L. and .weight


def _ops(table: str) -> list[Op]:
    rows = [line.split() for line in table.strip().splitlines()]
    return [Op(b, op, tuple(d.split(",")), tuple(i.split(",")), w if w != "-" else None) for b, op, d, i, w in rows]


BEFORE = _ops("inp_embd get_rows n_tok,n_embd tokens token_embd")
LAYER = _ops("""
    norm         rms_norm  n_tok,n_embd            x                     -
    attn_norm    mul       n_tok,n_embd            norm                  attn_norm
    Qcur_pre     mul_mat   n_tok,n_head,d_head     attn_norm             attn_q
    Kcur_pre     mul_mat   n_tok,n_head_kv,d_head  attn_norm             attn_k
    Vcur         mul_mat   n_tok,n_head_kv,d_head_v  attn_norm           attn_v
    Qcur         rope      n_tok,n_head,d_head     Qcur_pre              -
    Kcur         rope      n_tok,n_head_kv,d_head  Kcur_pre              -
    kq           mul_mat   n_head,n_tok,n_kv       Qcur,Kcur             -
    kq_soft_max  soft_max  n_head,n_tok,n_kv       kq                    -
    kqv          mul_mat   n_head,n_tok,d_head_v   kq_soft_max,Vcur      -
    kqv_merged   cont      n_tok,n_head*d_head_v   kqv                   -
    kqv_out      mul_mat   n_tok,n_embd            kqv_merged            attn_output
    ffn_inp      add       n_tok,n_embd            kqv_out,x             -
    norm_ffn     rms_norm  n_tok,n_embd            ffn_inp               -
    ffn_norm     mul       n_tok,n_embd            norm_ffn              ffn_norm
    ffn_gate     mul_mat   n_tok,n_ff              ffn_norm              ffn_gate
    ffn_up       mul_mat   n_tok,n_ff              ffn_norm              ffn_up
    ffn_silu     silu      n_tok,n_ff              ffn_gate              -
    ffn_gate_par mul       n_tok,n_ff              ffn_silu,ffn_up       -
    ffn_out      mul_mat   n_tok,n_embd            ffn_gate_par          ffn_down
    l_out        add       n_tok,n_embd            ffn_out,ffn_inp       -
""")
AFTER = _ops("""
    norm           rms_norm  n_tok,n_embd            x                     -
    result_norm    mul       n_tok,n_embd            norm                  output_norm
    result_output  mul_mat   n_tok,n_vocab           result_norm           output
""")
ALIASES = {"kq_soft_max_ext": "kq_soft_max", "kqv_merged_cont": "kqv_merged"}  # mia's names of December 2023


def name_table(n_layer: int) -> dict[str, tuple[Op, int | None]]:
    """Every exact name of a model, in the order of computation, with its op and layer."""
    names: dict[str, tuple[Op, int | None]] = {op.base: (op, None) for op in BEFORE}
    names.update({f"{op.base}-{il}": (op, il) for il in range(n_layer) for op in LAYER})
    return names | {op.base: (op, None) for op in AFTER}


def match(pattern: str, names: Mapping[str, Any]) -> list[str]:
    """Exact names for an exact name, a base name (every layer), a glob or `all`; never a substring.

    `norm` is an exact name, the final norm's: the layers' are `norm-*`. Raises UnknownName with the closest names.
    """
    base, dash, layer = pattern.partition("-")
    pattern = ALIASES.get(base, base) + dash + layer
    if pattern in names:
        return [pattern]
    hits = [n for n in names if pattern == "all" or fnmatchcase(n, pattern) or n.startswith(f"{pattern}-")]
    if not hits:
        bases = dict.fromkeys(n.rpartition("-")[0] or n for n in names)
        raise UnknownName(f"no tensor is called {pattern!r}{_closest(pattern, [*bases, *names])}")
    return hits


def _closest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 3, 0.5)
    return f"; closest: {', '.join(close)}" if close else ""


# ---------------------------------------------------------------------------------------- actions

Positions = int | Sequence[int] | None
Source = Any  # a saved file, an array, a Run, or a tuple of these, whose mean is taken


@dataclass(frozen=True)
class Context:
    """What an action is told about the tensor it is called with."""

    name: str                   # exact name
    layer: int | None
    positions: np.ndarray       # intp [n_tok]: place of each row in the sequence
    phase: str                  # "prompt" or "decode"
    op: Op                      # its line in the table of names
    model: Model = field(repr=False)
    keep: Callable[[Context, Any], None] = field(repr=False)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """View of x with the token axis first."""
        return np.moveaxis(x, self.op.dims.index("n_tok"), 0)

    def record(self, value: Any) -> None:
        """Keep a value in the run's records."""
        self.keep(self, value)

    def at(self, at: Positions, must: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(rows of this pass, their places in `at`); negative positions count from the end of the sequence.

        Raises ActionError for positions that a prompt does not have, unless they need not be there.
        """
        if at is None:
            return np.arange(len(self.positions)), np.arange(len(self.positions))
        n = int(self.positions[-1]) + 1
        wanted = np.atleast_1d(np.asarray(at, np.intp))
        wanted = np.where(wanted < 0, wanted + n, wanted)
        if must and self.phase == "prompt" and ((wanted < 0) | (wanted >= n)).any():
            raise ActionError(f"{self.name}: position {at} is out of range: the prompt has {n} tokens, 0 to {n - 1}")
        rows, places = np.nonzero(self.positions[:, None] == wanted)
        return rows, places


@dataclass(frozen=True)
class Action:
    """What to do with the tensors that `name` matches.

    `when` is "prompt" (the pass over the prompt, as mia), "decode" (the passes over generated tokens) or "all". The KV
    cache keeps what a pass left in it: a change of Kcur or Vcur, or of anything before them, that was made during the
    prompt is still seen by every later token; one made while decoding is seen from that token on.
    """

    name: str
    when: str = field(default="prompt", kw_only=True)

    def bind(self, name: str, op: Op, model: Model) -> Action:
        """This action for one exact name, with what it needs loaded and checked before the run starts."""
        return self

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        """The array to go on with: x itself, never written to, or a new one; None where no row of the pass is meant."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lens(Action):
    """See each row through the logit lens: its k best tokens, scored as in Model.lens, kept in the records."""

    k: int = 10
    score: str = "raw"

    def bind(self, name: str, op: Op, model: Model) -> Action:
        if op.dims != ("n_tok", "n_embd"):
            raise ActionError(f"{name} is [{', '.join(op.dims)}]; the lens sees tensors of [n_tok, n_embd]")
        return self

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        ctx.record(ctx.model.lens(x, self.k, self.score))
        return x


@dataclass(frozen=True)
class Log(Action):
    """Keep a summary in the records: shape, mean, root mean square, least and greatest value, the first few."""

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        rms = math.sqrt(np.mean(np.square(x, dtype=np.float64)))
        ctx.record({"shape": list(x.shape), "mean": float(x.mean()), "rms": rms, "min": float(x.min()),
                    "max": float(x.max()), "first": x.reshape(-1)[:4].tolist()})
        return x


@dataclass(frozen=True)
class Save(Action):
    """Keep a copy, in the records and, when a path is given, in a file that is written after the run."""

    path: str | Path | None = None

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        ctx.record(x.copy())
        return x


@dataclass(frozen=True)
class Replace(Action):
    """fn(x, ctx): an array of the same shape to go on with, or None for no change; x is a copy that fn may write to."""

    fn: Callable[[np.ndarray, Context], np.ndarray | None]

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        y = self.fn(x.copy(), ctx)
        return x if y is None else y


@dataclass(frozen=True)
class Edit(Action):
    """Base of the actions that change a part: the rows at positions `at`, of `heads`; all where None."""

    at: Positions = field(default=None, kw_only=True)
    heads: Positions = field(default=None, kw_only=True)

    def bind(self, name: str, op: Op, model: Model) -> Action:
        if self.heads is not None:
            n = model.config.n_head_kv if "n_head_kv" in op.dims else model.config.n_head
            if not {"n_head", "n_head_kv", "n_head*d_head_v"} & set(op.dims):
                raise ActionError(f"{name} has no heads; kqv_merged, kqv, kq_soft_max, kq, Qcur, Kcur and Vcur have")
            if not all(0 <= h < n for h in np.atleast_1d(self.heads)):
                raise ActionError(f"{name}: head {self.heads} is out of range: there are {n} heads, 0 to {n - 1}")
        return self

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | None:
        rows, places = ctx.at(self.at, self.when == "prompt")
        if not len(rows):
            return None
        y = x.copy()
        part = ctx.rows(y)  # [n_tok, ...], a view of y
        old = part[rows]
        try:
            new = np.broadcast_to(np.asarray(self.edit(part, rows, places), np.float32), old.shape)
        except ValueError as e:
            kind = type(self).__name__
            raise ActionError(f"{kind} of {ctx.name} does not fit rows of {list(old.shape[1:])}: {e}") from e
        if self.heads is not None:
            c = ctx.model.config
            mask = np.isin(np.arange(c.n_head_kv if "n_head_kv" in ctx.op.dims else c.n_head), self.heads)
            mask = np.repeat(mask, c.d_head_v) if ctx.op.base == "kqv_merged" else mask[:, None]
            new = np.where(mask, new, old)
        part[rows] = new
        return y

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        """New values of x[rows]; x is [n_tok, ...], and places says which of `at` each row is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Patch(Edit):
    """Put row `src` of another run in place of the row `at`.

    Without `src`, the source's only row or the same positions; without both, the whole tensor.
    """

    source: Source = field(repr=False)
    src: Positions = None

    def bind(self, name: str, op: Op, model: Model) -> Action:
        super().bind(name, op, model)
        source = read_source(self.source, name, op, model)
        if self.src is not None and (self.at is None or np.size(self.src) != np.size(self.at)):
            raise ActionError(f"patch of {name}: from {self.src} to {self.at}: say as many positions to as from")
        if self.src is not None or (self.at is not None and len(source) > 1):
            src = np.atleast_1d(np.asarray(self.at if self.src is None else self.src, np.intp))
            if (src < -len(source)).any() or (src >= len(source)).any():
                raise ActionError(f"patch of {name}: no row {src.tolist()} in the source, which has {len(source)} rows")
            source = source[src]
        return replace(self, source=source)

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        if self.at is None and len(self.source) != len(x):
            raise ActionError(f"patch of {self.name}: {len(self.source)} rows for {len(x)} positions: say from and to")
        return self.source if len(self.source) == 1 else self.source[places]


@dataclass(frozen=True)
class Ablate(Edit):
    """Take information away, by mode: "zero"; "mean", over the positions of this pass; "resample", the same rows of
    `source`, another run; or "value", a number or an array that fits a row."""

    mode: str = "zero"
    value: Any = field(default=0.0, repr=False)
    source: Source = field(default=None, repr=False)

    def bind(self, name: str, op: Op, model: Model) -> Action:
        super().bind(name, op, model)
        if self.mode not in ("zero", "mean", "resample", "value"):
            raise ActionError(f"ablation mode {self.mode!r}: it must be zero, mean, resample or value")
        if (self.mode == "resample") != (self.source is not None):
            raise ActionError(f"ablation of {name}: a source goes with mode resample, and with no other")
        return self if self.source is None else replace(self, source=read_source(self.source, name, op, model))

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        if self.mode == "mean":
            return x.mean(0)
        if self.mode == "resample":
            if len(self.source) != len(x):
                raise ActionError(f"ablation of {self.name}: the source has {len(self.source)} rows, this run {len(x)}")
            return self.source[rows]
        return self.value if self.mode == "value" else 0.0


@dataclass(frozen=True)
class Add(Edit):
    """x + coef * vector; the vector is the source's row `row`, or its only one."""

    vector: Source = field(repr=False)
    coef: float = 1.0
    row: int | None = None

    def bind(self, name: str, op: Op, model: Model) -> Action:
        super().bind(name, op, model)
        return replace(self, vector=read_row(self.vector, self.row, name, op, model))

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        return x[rows] + np.float32(self.coef) * self.vector


@dataclass(frozen=True)
class ProjectOut(Edit):
    """Remove a direction d from each row: x - (x . d) d / (d . d)."""

    direction: Source = field(repr=False)

    def bind(self, name: str, op: Op, model: Model) -> Action:
        super().bind(name, op, model)
        row = read_row(self.direction, None, name, op, model)
        length = float(np.linalg.norm(row))
        if not 0 < length < math.inf:
            raise ActionError(f"projection of {name}: the direction has length {length}")
        return replace(self, direction=row / np.float32(length))

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        along = np.tensordot(x[rows], self.direction, self.direction.ndim)  # [n_rows]
        return x[rows] - np.multiply.outer(along, self.direction)


@dataclass(frozen=True)
class Scale(Edit):
    """factor * x."""

    factor: float

    def edit(self, x: np.ndarray, rows: np.ndarray, places: np.ndarray) -> Any:
        return np.float32(self.factor) * x[rows]


def read_source(source: Source, name: str, op: Op, model: Model) -> np.ndarray:
    """Rows of the tensor `name` that was saved, kept or made: float32, the token axis first."""
    if isinstance(source, tuple):
        parts = [read_source(s, name, op, model) for s in source]
        if len({p.shape for p in parts}) != 1:
            raise ActionError(f"{name}: sources of {' and '.join(str(list(p.shape)) for p in parts)} have no mean")
        return np.mean(parts, axis=0, dtype=np.float32)
    if isinstance(source, (str, Path)):
        source = read_tensor(source, name, model.about)
    elif isinstance(source, Run):
        source = source[name]
    return as_rows(np.asarray(source, np.float32), name, op.dims, model.config.sizes())


def read_row(source: Source, row: int | None, name: str, op: Op, model: Model) -> np.ndarray:
    """One row of a source: the one asked for, or the only one."""
    rows = read_source(source, name, op, model)
    if row is None and len(rows) == 1:
        row = 0
    if row is None or not -len(rows) <= row < len(rows):
        raise ActionError(f"{name}: one vector is needed and the source has {len(rows)} rows: which? (not {row})")
    return rows[row]


class Record(NamedTuple):
    """What an action kept: the best tokens of a Lens, the summary of a Log, the array of a Save."""

    action: Action
    name: str
    layer: int | None
    positions: np.ndarray       # intp [n_tok]
    phase: str
    value: Any


class Tap:
    """The `t` of forward: hands each named tensor to the actions that want it, and counts that every one fired."""

    def __init__(self, model: Model, actions: Sequence[Action], on_record: Callable[[Record], None] | None = None):
        self.model, self.actions, self.on_record = model, actions, on_record
        self.records: list[Record] = []
        self.fired = [False] * len(actions)
        self.phase, self.positions = "prompt", np.arange(0)
        self.by_name: dict[tuple[str, int | None], list[tuple[int, Action]]] = {}
        files: dict[str | Path, list[str]] = {}
        for i, action in enumerate(actions):
            if not isinstance(action, Action):
                raise ActionError(f"{action!r} is no action; Lens, Log, Save, Patch, Ablate, ... are")
            if action.when not in ("prompt", "decode", "all"):
                raise ActionError(f"{action}: when must be prompt, decode or all")
            for name in match(action.name, model.table):
                op, il = model.table[name]
                self.by_name.setdefault((op.base, il), []).append((i, action.bind(name, op, model)))
                if isinstance(action, Save) and action.path is not None:
                    files.setdefault(action.path, []).append(name)
        for path, names in files.items():
            check_target(path, names)

    def begin(self, phase: str, positions: np.ndarray) -> None:
        """Before each pass: the positions of its rows, intp [n_tok]."""
        self.phase, self.positions = phase, positions

    def wants(self, il: int | None, *bases: str) -> bool:
        """Whether an action of this phase is on one of these names."""
        return any(a.when in ("all", self.phase) for base in bases for _, a in self.by_name.get((base, il), ()))

    def __call__(self, base: str, il: int | None, x: np.ndarray) -> np.ndarray:
        """The value to go on with: x itself unless an action changes it."""
        for i, action in self.by_name.get((base, il), ()):
            if action.when in ("all", self.phase):
                name = base if il is None else f"{base}-{il}"
                op = self.model.table[name][0]
                keep = partial(self._keep, action)
                with np.errstate(all="ignore"):  # what is no number shows in the logits, and is told of there
                    y = action.apply(x, Context(name, il, self.positions, self.phase, op, self.model, keep))
                self.fired[i] |= y is not None
                if y is not None and y is not x:
                    if np.shape(y) != x.shape:
                        raise ActionError(f"{action} of {name} gave shape {list(np.shape(y))}, not {list(x.shape)}")
                    x = np.ascontiguousarray(y, np.float32)
        return x

    def _keep(self, action: Action, ctx: Context, value: Any) -> None:
        self.records.append(Record(action, ctx.name, ctx.layer, ctx.positions, ctx.phase, value))
        if self.on_record:
            self.on_record(self.records[-1])

    def finish(self, **about: Any) -> None:
        """After the run: write the files of Save, then complain of actions that never fired."""
        files: dict[str | Path, dict[str, dict[int, np.ndarray]]] = {}  # path, name, first position
        for r in self.records:
            if isinstance(r.action, Save) and r.action.path is not None:
                files.setdefault(r.action.path, {}).setdefault(r.name, {})[int(r.positions[0])] = r.value
        for path, tensors in files.items():
            joined = {name: self._join(name, list(passes.values())) for name, passes in tensors.items()}
            write_tensors(path, joined, {"model": self.model.about, **about})
        for action, fired in zip(self.actions, self.fired):
            if not fired:
                kind = type(action).__name__
                raise ActionError(f"{kind} of {action.name} (when={action.when}) never fired: no such pass or position")

    def _join(self, name: str, passes: list[np.ndarray]) -> np.ndarray:
        """The passes of a run after one another along the token axis."""
        op = self.model.table[name][0]
        if len(passes) > 1 and "n_kv" in op.dims:
            raise ActionError(f"{name} grows with each token: save it with when=prompt")
        return np.concatenate(passes, op.dims.index("n_tok"))


# ---------------------------------------------------------------------------------------- forward


def forward(
    m: Model, tokens: np.ndarray, cache: Cache, t: Tap, start: tuple[int, np.ndarray] | None = None, last: bool = False
) -> np.ndarray:
    """Logits of n_tok tokens that follow what the cache holds; float32 [n_tok, n_vocab], [1, n_vocab] with `last`.

    t(name, layer, value) names a value and gives the one to go on with. start = (il, x) begins at layer il on a given
    residual x [n_tok, n_embd] (the cache then gets keys and values of the layers from il on only).
    """
    c, w, n_tok, positions = m.config, m.weights, len(tokens), t.positions
    n_kv = int(positions[-1]) + 1
    cache.reserve(n_kv)
    angles = c.n_rot, c.rope_base, c.rope_scale, c.rope_gain, c.yarn, w.rope_freqs, m.numerics
    cos, sin = rope_angles(positions, *angles)                                      # [n_tok, n_rot / 2]
    scale = 1 / np.sqrt(np.float32(c.d_head))
    first, x = start or (0, t("inp_embd", None, m.rows(w.token_embd, tokens)))      # [n_tok, n_embd]
    for il in range(first, c.n_layer):
        blk = w.blk[il]

        cur = t("norm", il, rms_norm(x, c.eps, m.pool))                             # [n_tok, n_embd]
        cur = t("attn_norm", il, cur * blk.attn_norm)                               # [n_tok, n_embd]
        forms: dict[Any, Any] = {}                                                  # of cur, shared by its products
        q = t("Qcur_pre", il, m.linear(cur, blk.attn_q, c.n_head, forms))           # [n_tok, n_head, d_head]
        k = t("Kcur_pre", il, m.linear(cur, blk.attn_k, c.n_head_kv, forms))        # [n_tok, n_head_kv, d_head]
        v = t("Vcur", il, m.linear(cur, blk.attn_v, c.n_head_kv, forms))            # [n_tok, n_head_kv, d_head_v]
        q = t("Qcur", il, rope(q, cos, sin, m.pool))                                # [n_tok, n_head, d_head]
        k = t("Kcur", il, rope(k, cos, sin, m.pool))                                # [n_tok, n_head_kv, d_head]
        cache.store(il, k, v)
        if t.wants(il, "kq", "kq_soft_max", "kqv"):
            kq = t("kq", il, cache.kq(il, q))                                       # [n_head, n_tok, n_kv]
            kq = t("kq_soft_max", il, cache.soft_max(kq, scale))                    # [n_head, n_tok, n_kv]
            cur = t("kqv", il, cache.kqv(il, kq))                                   # [n_head, n_tok, d_head_v]
            cur = cur.swapaxes(0, 1).reshape(n_tok, -1)                             # [n_tok, n_head * d_head_v]
        else:
            cur = cache.attention(il, q, scale, m.pool)                             # [n_tok, n_head * d_head_v]
        cur = t("kqv_merged", il, cur)                                              # [n_tok, n_head * d_head_v]
        cur = t("kqv_out", il, m.linear(cur, blk.attn_output))                      # [n_tok, n_embd]
        x = t("ffn_inp", il, cur + x)                                               # [n_tok, n_embd]

        cur = t("norm_ffn", il, rms_norm(x, c.eps, m.pool))                         # [n_tok, n_embd]
        cur = t("ffn_norm", il, cur * blk.ffn_norm)                                 # [n_tok, n_embd]
        forms = {}
        gate = t("ffn_gate", il, m.linear(cur, blk.ffn_gate, forms=forms))          # [n_tok, n_ff]
        up = t("ffn_up", il, m.linear(cur, blk.ffn_up, forms=forms))                # [n_tok, n_ff]
        gate = t("ffn_silu", il, silu(gate, m.pool))                                # [n_tok, n_ff]
        cur = t("ffn_gate_par", il, gate * up)                                      # [n_tok, n_ff]
        cur = t("ffn_out", il, m.linear(cur, blk.ffn_down))                         # [n_tok, n_embd]
        x = t("l_out", il, cur + x)                                                 # [n_tok, n_embd]
    cache.n = n_kv
    if last:
        x, t.positions = cache.last(x), cache.last(positions)                       # [1, n_embd]
    cur = t("norm", None, rms_norm(x, c.eps))                                       # [n_tok, n_embd]
    cur = t("result_norm", None, cur * w.output_norm)                               # [n_tok, n_embd]
    return t("result_output", None, m.linear(cur, w.output))                        # [n_tok, n_vocab]


# ---------------------------------------------------------------------------------------- Model


@dataclass
class Run:
    """What a pass over a prompt gave."""

    logits: np.ndarray = field(repr=False)          # float32 [n_tok, n_vocab], [1, n_vocab] for logits="last"
    tokens: list[int]
    records: list[Record] = field(repr=False)       # what the actions kept, in the order of computation

    @property
    def names(self) -> list[str]:
        """Exact names of the tensors that were kept."""
        return list(dict.fromkeys(r.name for r in self.records if isinstance(r.action, Save)))

    def __getitem__(self, name: str) -> np.ndarray:
        """The copy of a tensor that keep= or Save made, float32, of the shape in the table of names."""
        found = [r.value for r in self.records if isinstance(r.action, Save) and r.name == name]
        if not found:
            raise UnknownName(f"{name!r} was not kept: ask with keep=[{name!r}]{_closest(name, self.names)}")
        return found[-1]


@dataclass
class Generation:
    """What a model went on with."""

    text: str                   # new text only
    tokens: list[int]           # new ids, an end token included
    prompt_tokens: list[int]
    stop_reason: str            # "eos", "stop" (a stop text), "length" (n reached), "context" (full), "interrupted"
    records: list[Record] = field(repr=False)
    seconds: tuple[float, float]    # of the prompt pass, of decoding


class Model:
    """A loaded model. Weights stay in the mapped file; several models may run in several threads."""

    def __init__(self, path: str | Path, threads: int | None = None, numerics: str = "ggml"):
        if numerics not in ("ggml", "f32"):
            raise Error(f"numerics {numerics!r}: it must be ggml (as llama.cpp computes) or f32 (float32 throughout)")
        if threads is not None and not 1 <= threads <= 1024:
            raise Error(f"{threads} threads: it must be 1 to 1024")
        self.path, self.numerics = Path(path), numerics
        meta, tensors = read_gguf(self.path)
        self.config = Config(**read_hparams(meta, tensors, self.path))
        self.weights = Weights(tensors, self.config, self.path)
        self.tokenizer = read_tokenizer(meta, self.path)
        self.template = meta.get("tokenizer.chat_template")
        self.pool = kernels.Pool(threads or kernels.physical_cores())
        self.table = name_table(self.config.n_layer)
        self.about = {k: getattr(self.config, k) for k in ("name", "n_embd", "n_layer", "n_head", "n_vocab")}

    def names(self) -> list[str]:
        """Every exact name, in the order of computation."""
        return list(self.table)

    def tokenize(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text. BOS comes first as the file, or `bos`, says; `special` recognises <s> and the like."""
        return self.tokenizer.encode(text, bos, special)

    def chat(self, messages: str | Sequence[Mapping[str, str]], system: str | None = None) -> list[int]:
        """Ids of a chat, ready for the assistant's answer, in the form that the template in the file gives it.

        messages: what the user says, or [{"role": "user", "content": text}, {"role": "assistant", ...}, ...]; system: a
        system message in front. Special tokens are only those of the template. Raises Error.
        """
        from tinymia_files.chat import format_chat

        return format_chat(self.template, self.tokenizer, messages, system).ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids)

    def piece(self, i: int) -> str:
        """One token as people read it."""
        return self.tokenizer.piece(i)

    def rows(self, weight: Tensor, ids: np.ndarray) -> np.ndarray:
        """Dequantised rows of a matrix, float32 [len(ids), n_in]."""
        return kernels.get_rows(weight.raw, weight.format, *weight.shape, ids)

    def linear(
        self, x: np.ndarray, layer: Linear, n_head: int | None = None, forms: dict[Any, Any] | None = None
    ) -> np.ndarray:
        """x W^T + b: float32 [n_tok, n_in] -> [n_tok, n_out], or [n_tok, n_head, n_out / n_head].

        Calls with the same x may share a dict `forms`, so that x is quantised once.
        """
        w, b = layer
        y = kernels.matmul(x, w.raw, w.format, w.shape[0], self.numerics, self.pool, forms)
        y = y if b is None else y + b
        return y if n_head is None else y.reshape(len(y), n_head, -1)

    def cache(self) -> Cache:
        """An empty cache of this model's shape."""
        return Cache(self.config, self.numerics)

    def run(
        self,
        prompt: str | Sequence[int],
        keep: Sequence[str] = (),
        actions: Sequence[Action] = (),
        logits: str = "all",
        cache: Cache | None = None,
        start: tuple[int, np.ndarray] | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> Run:
        """One pass over a prompt, text or ids, after what `cache` holds.

        keep: names whose tensors, as the actions left them, are copied into the run. logits: "all", or "last" row only
        (then norm, result_norm and result_output have one row). start = (il, x) begins at layer il on the residual x
        [n_tok, n_embd]. Raises Error for a prompt that does not fit and for logits that are no numbers.
        """
        if logits not in ("all", "last"):
            raise Error(f"logits={logits!r}: it must be all or last")
        ids = self._ids(prompt)
        cache = cache or self.cache()
        tap = Tap(self, [*actions, *map(Save, [keep] if isinstance(keep, str) else keep)], on_record)
        if start is not None:
            il, x = start[0], np.ascontiguousarray(start[1], np.float32)
            if not 0 <= il <= self.config.n_layer or x.shape != (len(ids), self.config.n_embd):
                raise Error(f"start=({il}, {list(x.shape)}): it takes a layer up to {self.config.n_layer} and "
                            f"[{len(ids)}, {self.config.n_embd}]")
            start = (il, x)
        out = self._pass(ids, cache, tap, "prompt", start, logits == "last")
        tap.finish(tokens=ids, prompt=self._text(prompt))
        return Run(out, ids, tap.records)

    def generate(
        self,
        prompt: str | Sequence[int],
        n: int = 32,
        actions: Sequence[Action] = (),
        *,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_record: Callable[[Record], None] | None = None,
        bos: bool | None = None,
        special: bool = True,
        **sampling: Any,
    ) -> Generation:
        """Go on with a prompt, text or ids, for up to n tokens: greedily, or as Sampler's fields say (temp=0.8, ...).

        Ends at an end-of-text token, at one of the `stop` texts (which is not part of the result), when the context is
        full, or at Ctrl-C. on_text gets the text piece by piece, whole characters only.
        """
        try:
            sampler = Sampler(**sampling)
        except ValueError as e:
            raise Error(str(e)) from e
        ids, clock = self._ids(prompt, bos, special), time.perf_counter()
        tap, cache, out = Tap(self, actions, on_record), self.cache(), Text(stop, on_text)
        seen, new = [*ids], list[int]()
        reason, prompt_seconds = "length", 0.0
        try:
            last = not tap.wants(None, "norm", "result_norm", "result_output")
            rows = self._pass(ids, cache, tap, "prompt", None, last)
            prompt_seconds = time.perf_counter() - clock
            while len(new) < n:
                new.append(sampler.sample(rows[-1], seen))
                seen.append(new[-1])
                if new[-1] in self.tokenizer.end:
                    reason = "eos"
                    break
                if out.add(self.tokenizer.bytes(new[-1])):
                    reason = "stop"
                    break
                if len(new) < n and cache.n == self.config.n_ctx:
                    reason = "context"
                    break
                if len(new) < n:
                    rows = self._pass(new[-1:], cache, tap, "decode", None, True)
        except KeyboardInterrupt:
            reason = "interrupted"
        text, seconds = out.close(), (prompt_seconds, time.perf_counter() - clock - prompt_seconds)
        tap.finish(tokens=seen, prompt=self._text(prompt), output=text)
        return Generation(text, new, ids, reason, tap.records, seconds)

    def lens(self, x: np.ndarray, k: int = 5, score: str = "raw") -> list[list[tuple[str, float]]]:
        """The logit lens: for each row of x [n_tok, n_embd] its k best (piece, score), best first.

        "raw" is (x * norm weight) W^T, as the post's program printed; "logit" divides by the RMS first, as the model
        itself does before its output; "prob" is the softmax of that. All three put the tokens in the same order.
        Source: nostalgebraist, interpreting GPT: the logit lens (2020).
        """
        x = np.ascontiguousarray(np.atleast_2d(x), np.float32)
        if x.ndim != 2 or x.shape[1] != self.config.n_embd:
            raise Error(f"the lens sees rows of n_embd = {self.config.n_embd} numbers, not {list(x.shape)}")
        if score not in ("raw", "logit", "prob"):
            raise Error(f"lens score {score!r}: it must be raw, logit or prob")
        k = min(k, self.config.n_vocab)
        if k < 1:
            raise Error(f"the lens shows {k} tokens a row: it must be at least 1")
        normed = x if score == "raw" else rms_norm(x, self.config.eps)
        scores = self.linear(normed * self.weights.output_norm, self.weights.output)
        if score == "prob":
            scores = softmax(scores)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [[(self.piece(int(i)), float(row[i])) for i in ids] for row, ids in zip(scores, best)]

    def _text(self, prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else self.detokenize(prompt)

    def _ids(self, prompt: str | Sequence[int], bos: bool | None = None, special: bool = True) -> list[int]:
        if isinstance(prompt, bytes):
            raise Error("a prompt is text or token ids, not bytes")
        ids = self.tokenize(prompt, bos, special) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise Error("the prompt has no tokens: give some text, or let BOS stand for an empty one")
        bad = [i for i in ids if not 0 <= i < self.config.n_vocab]
        if bad:
            raise Error(f"token id {bad[0]} is out of range: the model has {self.config.n_vocab} tokens")
        return ids

    def _pass(
        self, ids: Sequence[int], cache: Cache, tap: Tap, phase: str, start: tuple[int, np.ndarray] | None, last: bool
    ) -> np.ndarray:
        positions = cache.positions(len(ids))
        if positions[-1] >= self.config.n_ctx:
            before = f" after {cache.n} in the cache" if cache.n else ""
            raise Error(f"the prompt has {len(ids)} tokens{before}; the context has room for {self.config.n_ctx}")
        if cache.of != (self.config, self.numerics):
            raise Error("this cache was made by another model, or for other numerics")
        tap.begin(phase, positions)
        n = cache.n
        try:
            logits = forward(self, np.asarray(ids, np.intp), cache, tap, start, last)
            kernels.announce_done()
            if not np.isfinite(logits.max(axis=1)).all():
                raise Error("the logits are not finite: a weight or an action brought NaN or infinity (see --log all)")
            return logits
        except BaseException:
            cache.truncate(n)
            raise


def load(path: str | Path | None = None, threads: int | None = None, numerics: str = "ggml") -> Model:
    """Map a GGUF file, by its path or a name such as "smollm2" (tinymia_models.stores), by default the bundled one, and
    check it; threads: the physical cores. Raises Error."""
    from tinymia_models import DEFAULT
    from tinymia_models.stores import find

    return Model(find(DEFAULT if path is None else path), threads, numerics)


# ---------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tinymia`; what it takes and prints stands in lab/cli.py."""
    from tinymia_lab.cli import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
