"""The base of all actions: what an action learns about a tensor, what it may return, and how it changes a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinymia_files import ActionError, short

from . import given

if TYPE_CHECKING:
    from typing_extensions import Self

Positions = int | Sequence[int] | Sequence[bool] | np.ndarray | None  # numbers, or a mask with one bool per position
# A saved file, an array, a Run, or a tuple of these: rows are chosen in each, then their mean is taken.
Source = str | Path | np.ndarray | Sequence[float] | Mapping[str, np.ndarray] | tuple[Any, ...] | None


class NotHere(Enum):
    """The type of NOT_HERE, which `apply` returns if no row of the pass is meant: the action has then not fired."""

    NOT_HERE = "not here"


NOT_HERE = NotHere.NOT_HERE


@dataclass(frozen=True)
class Context:
    """Everything that an action learns about the tensor it is called with."""

    name: str                   # exact name
    layer: int | None
    positions: np.ndarray       # intp [n_tok]: the position of each row in the sequence
    phase: str                  # "prompt" or "decode"
    op: Any                     # its line in the table of names
    model: Any = field(repr=False)
    keep: Callable[[Context, Any], None] = field(repr=False)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """View of x with the token axis first."""
        return np.moveaxis(x, self.op.dims.index("n_tok"), 0)

    def record(self, value: Any) -> None:
        """Keep a value in the run's records."""
        self.keep(self, value)

    def select(self, at: Positions, must: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The rows of this pass at the positions `at`, and for each row its index in `at`: intp [n_row] both.

        Negative positions count from the end of the sequence; a mask has one value per position of the prompt. With
        `must`, raises ActionError for positions that the prompt does not have.
        """
        if at is None:
            return np.arange(len(self.positions)), np.arange(len(self.positions))
        n = int(self.positions[-1]) + 1
        wanted = given.indices(at, "position", n if self.phase == "prompt" else None, f"{self.name}: ")
        wanted = np.where(wanted < 0, wanted + n, wanted)
        if must and self.phase == "prompt" and ((wanted < 0) | (wanted >= n)).any():
            raise ActionError(f"{self.name}: {given.out_of_range('position', at, n, 'tokens', 'the prompt has')}")
        rows, which = np.nonzero(self.positions[:, None] == wanted)
        return rows, which


def listed(actions: Action | Sequence[Action]) -> list[Action]:
    """Actions as a list; a single action becomes a list of one. Raises ActionError for what is not an action."""
    one = isinstance(actions, Action) or not hasattr(actions, "__iter__")
    found: list[Any] = [actions] if one else list(actions)  # type: ignore[arg-type]
    for action in found:
        if not isinstance(action, Action):
            raise ActionError(f"{short(action)} is not an action; Lens, Log, Save, Patch, Ablate, ... are")
    return found


@dataclass(frozen=True, repr=False)
class Action:
    """Something to do with the tensors whose names match `name`.

    when: "prompt" (the pass over the prompt, as in mia), "decode" (the passes over generated tokens) or "all". The KV
    cache keeps what a pass has stored in it. So if an action changes Kcur or Vcur, or anything before them, during the
    prompt, all later tokens still see the change; if it does so while decoding, they see it from that token on.
    """

    name: str
    when: str = field(default="prompt", kw_only=True)

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Raise ArgumentError for an argument that this kind of action does not have."""
        if named:
            given.check_arguments(cls.__name__, named, given.arguments_of(cls.__init__))
        return super().__new__(cls)

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Return this action for one exact name, with its sources loaded and checked, before the run. Raises Error."""
        return self

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Return the value that the pass continues with: `x` unchanged, or a new array of its shape. `x` is read-only.

        Return NOT_HERE if this action does not apply to any row of this pass.
        """
        raise NotImplementedError

    def vjp(self, d: np.ndarray, x: np.ndarray, ctx: Context) -> np.ndarray:
        """Take a gradient back through `apply`: d value / d (what apply returned) -> d value / d x.

        d is [n_of, *x.shape], one gradient per metric, and is not to be changed; x is what `apply` got. It is called
        only if `apply` returned another array than x. Raises ActionError, here because nothing is known of `apply`.
        """
        raise ActionError(f"no gradient goes through {self}: a class of actions needs a method vjp(d, x, ctx) for that")

    def __repr__(self) -> str:
        """Patch('l_out-3', row -1 of Run('Egypt -> Cairo,', 5 tokens), at=-1): the arguments, shortened."""
        parts, src = [repr(self.name)], getattr(self, "src", None)
        for f in sorted(fields(self)[1:], key=lambda f: bool(f.kw_only)):
            value = getattr(self, f.name)
            if f.name == "source" and src is not None:
                parts.append(f"row {given.told(src)} of {given.told(value)}")
            elif f.name != "src" and given.told(value) != given.told(f.default):
                parts.append(f"{f.name}={given.told(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Edit(Action):
    """The base of actions that change a part of a tensor: the rows at positions `at`, and there `heads`. None: all."""

    at: Positions = field(default=None, kw_only=True)
    heads: Positions = field(default=None, kw_only=True)

    def bind(self, name: str, op: Any, model: Any) -> Self:
        """Check the positions, and that the tensor has the heads. Raises ActionError."""
        if self.at is not None:
            given.indices(self.at, "position", where=f"{name}: ")
            if self.when == "decode" and given.is_mask(self.at):
                raise ActionError(f"{name}: a mask is of the prompt's tokens, and when=decode leaves them as they are")
        if self.heads is None:
            return self
        n = model.config.n_head_kv if "n_head_kv" in op.dims else model.config.n_head
        if not {"n_head", "n_head_kv", "n_head*d_head_v"} & set(op.dims):
            raise ActionError(f"{name} has no heads; kqv_merged, kqv, kq_soft_max, kq, Qcur, Kcur and Vcur have")
        heads = given.indices(self.heads, "head", n, f"{name}: ").tolist()
        if not all(0 <= h < n for h in heads):
            raise ActionError(f"{name}: {given.out_of_range('head', heads, n, 'heads')}")
        return replace(self, heads=heads)

    def apply(self, x: np.ndarray, ctx: Context) -> np.ndarray | NotHere:
        """Put the new values of `edit` into a copy of x, at the chosen rows and heads. Raises ActionError."""
        rows, which = ctx.select(self.at, self.when == "prompt")
        if not len(rows):
            return NOT_HERE
        y = x.copy()
        part = ctx.rows(y)  # [n_tok, ...], a view of y
        old = part[rows]
        try:
            new = np.broadcast_to(np.asarray(self.edit(part, rows, which), x.dtype), old.shape)
        except ValueError as e:
            raise ActionError(f"{self}: its numbers do not fit {ctx.name}, here {list(old.shape)}") from e
        mask = self._mask(ctx)
        if mask is not None:
            new = np.where(mask, new, old)
        part[rows] = new
        return y

    def edit(self, x: np.ndarray, rows: np.ndarray, which: np.ndarray) -> Any:
        """Return new values for x[rows]; x is [n_tok, ...], and which[i] is the index in `at` of rows[i]."""
        raise NotImplementedError

    def _mask(self, ctx: Context) -> np.ndarray | None:
        """Which part of a row is changed, to be broadcast with rows; None for all of it."""
        if self.heads is None:
            return None
        c = ctx.model.config
        mask = np.isin(np.arange(c.n_head_kv if "n_head_kv" in ctx.op.dims else c.n_head), self.heads)
        return np.repeat(mask, c.d_head_v) if ctx.op.base == "kqv_merged" else mask[:, None]

    def vjp(self, d: np.ndarray, x: np.ndarray, ctx: Context) -> np.ndarray:
        """Take a gradient back through the edit: a changed part gets what `edit_vjp` says, the rest keeps its own."""
        rows, mask = np.unique(ctx.select(self.at, self.when == "prompt")[0]), self._mask(ctx)
        y = d.copy()
        part = np.moveaxis(y, 1 + ctx.op.dims.index("n_tok"), 1)    # [n_of, n_tok, ...], a view of y
        new = part[:, rows]
        part[:, rows] = 0 if mask is None else np.where(mask, 0, new)
        self.edit_vjp(new if mask is None else np.where(mask, new, 0), part, rows)
        return y

    def edit_vjp(self, d: np.ndarray, dx: np.ndarray, rows: np.ndarray) -> None:
        """Add to dx [n_of, n_tok, ...] what x gets from d [n_of, n_row, ...], the gradient by what `edit` returned."""
        raise ActionError(f"no gradient goes through {self}: a class of edits needs a method edit_vjp(d, dx, rows)")


class Record(NamedTuple):
    """A value that an action kept: the best tokens of a Lens, the summary of a Log, the array of a Save."""

    action: Action
    name: str
    layer: int | None
    positions: np.ndarray       # intp [n_tok]
    phase: str
    value: Any


def files_read(action: Action) -> list[str | Path]:
    """The files that an action reads."""
    found = [getattr(action, f.name) for f in fields(action) if f.type == "Source"]
    parts = [part for one in found for part in (one if isinstance(one, tuple) else [one])]
    return [part for part in parts if isinstance(part, (str, Path))]
