"""The actions: they look at a named value (Lens, Log, Save) or change it (Replace, Patch, Ablate, Add, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tinymia_files import ActionError, short

from . import given, sources
from .action import Action, Context, Edit, NotHere, Positions, Source

if TYPE_CHECKING:
    from typing_extensions import Self


def _read(source: Source) -> np.ndarray:
    """A source after `bind`, which has read and checked it: an array of the right shape."""
    return cast(np.ndarray, source)


@dataclass(frozen=True, repr=False)
class Lens(Action):
    """Keep the k best tokens of each row under the logit lens, scored as in Model.lens, in the records."""

    k: int = 10
    score: str = "raw"

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Check that the tensor is as wide as the residual stream. Raises ActionError."""
        if op.dims != ("n_tok", "n_embd"):
            raise ActionError(f"{name} is [{', '.join(op.dims)}]; the lens sees tensors of [n_tok, n_embd]")
        return self

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Record the best tokens, and return x."""
        ctx.record(ctx.model.lens(x, self.k, self.score))
        return x


@dataclass(frozen=True, repr=False)
class Log(Action):
    """Keep a summary in the records: shape, mean, root mean square, least and greatest value, the first four values."""

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Record the summary, and return x."""
        rms = math.sqrt(np.mean(np.square(x, dtype=np.float64)))
        ctx.record({"shape": list(x.shape), "mean": float(x.mean()), "rms": rms, "min": float(x.min()),
                    "max": float(x.max()), "first": x.reshape(-1)[:4].tolist()})
        return x


@dataclass(frozen=True, repr=False)
class Save(Action):
    """Keep a copy in the records and, if a path is given, in a file that is written after the run."""

    path: str | Path | None = None

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Record a copy, and return x."""
        ctx.record(x.copy())
        return x


@dataclass(frozen=True, repr=False)
class Replace(Action):
    """Continue with fn(x, ctx), an array of the same shape, or None for no change. x is a copy that fn may write to.

    Gradients go through it only if `backward` is given: backward(d, x, ctx) turns d value / d fn(x) into d value / d x,
    both of x's shape. Model.gradients may call fn twice for a tensor; it must give the same both times.
    """

    fn: Callable[[np.ndarray, Context], np.ndarray | None]
    backward: Callable[[np.ndarray, np.ndarray, Context], np.ndarray] | None = field(default=None, kw_only=True)

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Return what fn returns, or x if that is None."""
        if not callable(self.fn):
            raise ActionError(f"replacement of {ctx.name}: {short(self.fn)} is not a function of (x, ctx)")
        y = self.fn(x.copy(), ctx)
        return x if y is None else y

    def vjp(self, d: np.ndarray, x: np.ndarray, ctx: Context) -> np.ndarray:
        """Return what `backward` makes of each gradient. Raises ActionError if there is none, or for another shape."""
        if self.backward is None:
            raise ActionError(f"no gradient goes through {self}: give Replace a function backward=, which turns "
                              "(d value / d fn(x), x, ctx) into d value / d x")
        found = [np.asarray(self.backward(one.copy(), x.copy(), ctx)) for one in d]
        for one in found:
            if one.shape != x.shape:
                raise ActionError(f"{self}: backward returned the shape {list(one.shape)}, not {list(x.shape)}")
        return np.stack(found).astype(d.dtype)


@dataclass(frozen=True, repr=False)
class Patch(Edit):
    """Replace the rows at positions `at` by the rows `src` of another run.

    Without `src`: by the only row of the source, or by its rows at the same positions. Without both: the whole tensor.
    """

    source: Source
    src: Positions = None

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Read the source, and choose its rows. Raises Error."""
        bound = super().bind(name, op, model)
        read = sources.read_sources(self.source, name, op.dims, model, self.name)
        return replace(bound, source=sources.mean([sources.rows_for(x, self.src, self.at, name) for x in read], name))

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """The source's rows for these rows. Raises ActionError if a whole tensor has another number of rows."""
        source = _read(self.source)
        if self.at is None and len(source) != len(x):
            raise ActionError(f"patch of {self.name}: {len(source)} rows for {len(x)} positions: say which row goes "
                              f"where: FROM TO, such as -1 -1 (in Python src= and at=)")
        return source if len(source) == 1 else source[which]

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """Nothing: the source's rows do not depend on x."""


@dataclass(frozen=True, repr=False)
class Ablate(Edit):
    """Remove information from a tensor, by one of four modes.

    "zero": zeros. "mean": the mean over the positions of the prompt. "resample": the same rows of `source`, another
    run. "value": a number, or an array that fits a row. Mode mean is an error for a pass over one row, and so while
    decoding, because the mean of one row is that row.
    """

    mode: str = "zero"
    value: Any = None
    source: Source = None

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Check the mode and what goes with it, and read the source. Raises Error."""
        bound = super().bind(name, op, model)
        if self.mode not in ("zero", "mean", "resample", "value"):
            raise ActionError(f"ablation mode {self.mode!r}: it must be zero, mean, resample or value")
        if (self.mode == "resample") != (self.source is not None):
            raise ActionError(f"ablation of {name}: a source goes with mode resample, and with no other")
        if (self.mode == "value") != (self.value is not None):
            raise ActionError(f"ablation of {name}: a value goes with mode value, and with no other")
        if self.mode == "mean" and self.when != "prompt":
            raise ActionError(f"ablation of {name}: mode mean goes with when=prompt, not {self.when}: a pass that "
                              "decodes has one row, and its mean is itself")
        if self.value is not None:
            given.numbers(self.value, "the value", f"ablation of {name}: ")
        if self.source is None:
            return bound
        read = sources.read_sources(self.source, name, op.dims, model, self.name)
        return replace(bound, source=sources.mean(read, name))

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """The values that the mode puts in place of x[rows]. Raises ActionError."""
        if self.mode == "mean":
            if len(x) == 1:
                raise ActionError(f"ablation of {self.name}: the pass has one row, and its mean is itself")
            return x.mean(0)
        if self.mode == "resample":
            source = _read(self.source)
            if len(source) != len(x):
                raise ActionError(f"ablation of {self.name}: the source has {len(source)} rows, this run {len(x)}")
            return source[rows]
        return self.value if self.mode == "value" else 0.0

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """A mean spreads its gradient evenly over all positions; the other modes put in what does not depend on x."""
        if self.mode == "mean":
            dx += d.sum(1, keepdims=True) / dx.dtype.type(dx.shape[1])


@dataclass(frozen=True, repr=False)
class Add(Edit):
    """Add coef * vector to each row; the vector is row `row` of the source, or its only row."""

    vector: Source
    coef: float = 1.0
    row: int | None = None

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Read the vector. Raises Error."""
        bound = super().bind(name, op, model)
        given.numbers(self.coef, "the coefficient", f"{name}: ")
        return replace(bound, vector=sources.read_row(self.vector, self.row, name, op.dims, model, self.name))

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """x[rows] + coef * vector."""
        return x[rows] + x.dtype.type(self.coef) * _read(self.vector)

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """d (x + v) / d x = 1."""
        dx[:, rows] += d


@dataclass(frozen=True, repr=False)
class ProjectOut(Edit):
    """Remove a direction d from each row: x - (x . d) d / (d . d)."""

    direction: Source

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Read the direction, and divide it by its length. Raises Error."""
        bound = super().bind(name, op, model)
        row = sources.read_row(self.direction, None, name, op.dims, model, self.name)
        length = float(np.linalg.norm(row))
        if not 0 < length < math.inf:
            raise ActionError(f"projection of {name}: the direction has length {length}")
        return replace(bound, direction=row / row.dtype.type(length))

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """x[rows] without their part along the direction."""
        direction = _read(self.direction)
        # Summed in float64: in float32 the last bit would depend on how many rows a product has.
        along = np.tensordot(x[rows].astype(np.float64), direction.astype(np.float64), direction.ndim)  # [n_rows]
        return x[rows] - np.multiply.outer(along.astype(x.dtype), direction)

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """The same projection of the gradient: it is symmetric."""
        direction = _read(self.direction)
        dx[:, rows] += d - np.multiply.outer(np.tensordot(d, direction, direction.ndim), direction)


@dataclass(frozen=True, repr=False)
class Scale(Edit):
    """Multiply each row by a factor."""

    factor: float

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Check the action for a model. Raises ActionError."""
        given.numbers(self.factor, "the factor", f"{name}: ")
        return super().bind(name, op, model)

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """factor * x[rows]."""
        return x.dtype.type(self.factor) * x[rows]

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """d (factor * x) / d x = factor."""
        dx[:, rows] += dx.dtype.type(self.factor) * d
