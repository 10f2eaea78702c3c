"""Metrics, which are the numbers that a gradient is of, made from the logits; and the gradients by name, the result.

A metric reads some rows of the logits. It gives its value, and by how much the value changes with each logit: the
cotangent of the logits, with which the backward pass begins (tinymia_backward.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymia_files import Error, UnknownName, short

from . import given
from .action import Positions
from .names import exact

if TYPE_CHECKING:
    from typing_extensions import Self

Token = str | int   # the text of one token, such as " Paris", its id, or its id written "#123"
Value = tuple[float, np.ndarray]    # a number, and d number / d logits


@dataclass(frozen=True)
class Metric:
    """A number made from the logits at one position, by default the last one. Negative positions count from the end."""

    at: Positions = field(default=-1, kw_only=True)

    def bind(self, model: Any, ids: Sequence[int]) -> Self:
        """Return this metric for one prompt: token ids instead of texts, positions from 0 on. Raises Error."""
        n = len(ids)
        at = given.indices(self.at, "position", n, f"{type(self).__name__}: ")
        at = np.where(at < 0, at + n, at)
        if ((at < 0) | (at >= n)).any():
            raise Error(f"{self}: {given.out_of_range('position', self.at, n, 'tokens', 'the prompt has')}")
        return replace(self, at=at)

    def rows(self, n_tok: int) -> np.ndarray:
        """The positions whose logits it reads, intp [n_row]."""
        return np.asarray(self.at)

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """The value, and its derivative by logits [n_row, n_vocab]; ids: the whole prompt."""
        raise NotImplementedError


@dataclass(frozen=True)
class _OfTokens(Metric):
    def bind(self, model: Any, ids: Sequence[int]) -> Self:
        bound = super().bind(model, ids)
        if len(bound.rows(len(ids))) != 1:
            raise Error(f"{self}: it is of one position; for several of them, give a list of metrics")
        names = [name for name in ("token", "a", "b") if hasattr(self, name)]
        found = {name: _token(model, getattr(self, name), type(self).__name__) for name in names}
        if len(set(found.values())) < len(found):
            raise Error(f"{self}: both tokens are {model.piece(found['a'])!r}, and their difference is always 0")
        return replace(bound, **found)


@dataclass(frozen=True)
class Logit(_OfTokens):
    """The logit of a token."""

    token: Token

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """logits[token]."""
        token, d = int(self.token), np.zeros_like(logits)
        d[0, token] = 1
        return float(logits[0, token]), d


@dataclass(frozen=True)
class LogitDifference(_OfTokens):
    """The logit of token a minus the logit of token b."""

    a: Token
    b: Token

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """logits[a] - logits[b]."""
        a, b, d = int(self.a), int(self.b), np.zeros_like(logits)
        d[0, a], d[0, b] = 1, -1
        return float(logits[0, a]) - float(logits[0, b]), d


@dataclass(frozen=True)
class LogProb(_OfTokens):
    """The logarithm of the probability of a token, in nats."""

    token: Token

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """log softmax(logits)[token]; its derivative is 1 at the token, minus softmax(logits)."""
        value, d = _cross_entropy(logits, [self.token])
        return -value, -d


@dataclass(frozen=True)
class Loss(Metric):
    """The mean cross-entropy of the prompt's next tokens, in nats: of all of them, or of those after positions `at`."""

    at: Positions = field(default=None, kw_only=True)

    def bind(self, model: Any, ids: Sequence[int]) -> Self:
        """Check that each position has a next token. Raises Error."""
        if len(ids) < 2:
            raise Error("Loss: the prompt has one token, and none that comes next")
        bound = replace(self, at=np.arange(len(ids) - 1)) if self.at is None else super().bind(model, ids)
        if len(ids) - 1 in bound.rows(len(ids)):
            raise Error(f"{self}: no token of the prompt comes after its last position, {len(ids) - 1}")
        return bound

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """The mean of -log softmax(logits)[next token]."""
        return _cross_entropy(logits, [ids[i + 1] for i in self.rows(len(ids))])


@dataclass(frozen=True)
class Function(Metric):
    """A function from all logits [n_tok, n_vocab] to (value, d value / d logits)."""

    fn: Callable[[np.ndarray], Value]

    def bind(self, model: Any, ids: Sequence[int]) -> Self:
        """The function reads the logits at every position."""
        return replace(self, at=np.arange(len(ids)))

    def measure(self, logits: np.ndarray, ids: Sequence[int]) -> Value:
        """Call the function, and check what it returns. Raises Error."""
        name, returned = given.told(self.fn), self.fn(logits.copy())
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise Error(f"of={name} returned {short(returned)}; it must return (value, d value / d logits)")
        value, d = (given.numbers(part, what, f"of={name}: ") for part, what in zip(returned, ("the value", "d")))
        if value.size != 1 or d.shape != logits.shape:
            raise Error(f"of={name} returned a value of shape {list(value.shape)} and a derivative of {list(d.shape)}; "
                        f"they must be one number and {list(logits.shape)}, the shape of the logits")
        return float(value.reshape(())), d.astype(logits.dtype)


def metrics(of: Any, model: Any, ids: Sequence[int]) -> list[Metric]:
    """The metrics that are asked for, one or a list, each bound to a prompt. Raises Error for anything else."""
    found = list(of) if isinstance(of, (list, tuple)) else [of]
    if not found:
        raise Error("of is an empty list: a gradient needs something that it is the gradient of")
    for one in found:
        if isinstance(one, type) or not (isinstance(one, Metric) or callable(one)):
            raise Error(f"of is {short(one)}; it must be Logit(token), LogitDifference(a, b), LogProb(token), Loss(), "
                        "or a function from logits to (value, d value / d logits)")
    return [(one if isinstance(one, Metric) else Function(one)).bind(model, ids) for one in found]


def _token(model: Any, token: Token, where: str) -> int:
    i = model.tokenizer.one(token) if isinstance(token, str) else given.whole(token, f"{where}: the token")
    if not 0 <= i < model.config.n_vocab:
        raise Error(f"{where}: {given.out_of_range('token id', i, model.config.n_vocab, 'tokens', 'the model has')}")
    return i


def _cross_entropy(logits: np.ndarray, targets: Sequence[Any]) -> Value:
    """The mean of -log softmax(logits)[target], summed in float64, and its derivative (softmax - 1 at target) / n."""
    x, rows = logits.astype(np.float64), np.arange(len(logits))
    x -= x.max(1, keepdims=True)
    d = np.exp(x)
    total = d.sum(1, keepdims=True)
    value = float((np.log(total[:, 0]) - x[rows, targets]).mean())
    d /= total
    d[rows, targets] -= 1
    return value, (d / len(logits)).astype(logits.dtype)


@dataclass(repr=False)
class Gradients(Mapping[str, np.ndarray]):
    """d value / d tensor by name, in the shape of the table of names.

    For a list of metrics `value` is a list too, and each array has one more axis in front: one gradient per metric.
    """

    value: Any                      # float, or a list of them
    run: Any                        # the Run that this is the gradient of, with what keep= asked for
    arrays: dict[str, np.ndarray]   # by exact name, in the order of computation
    table: Mapping[str, Any]        # the model's names

    def __getitem__(self, name: str) -> np.ndarray:
        meant = exact(name, self.table)
        if meant not in self.arrays:
            asked = f"{', '.join(list(self.arrays)[:9])}{', ...' * (len(self.arrays) > 9)}"
            raise UnknownName(f"the gradient by {name!r} was not asked for: ask with wrt=[{name!r}]; asked: {asked}")
        return self.arrays[meant]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        first, more = next(iter(self.arrays)), " ..." * (len(self.arrays) > 1)
        return f"Gradients(value {short(self.value)}, by {first}{more}, of {self.run!r})"


def finite(value: float, what: str) -> float:
    """The value itself, if it is a finite number. Raises Error for NaN and infinity."""
    if not math.isfinite(value):
        raise Error(f"the value of {what} is {value}: its gradient says nothing")
    return value
