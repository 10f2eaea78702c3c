"""Two engines side by side: the other's tensors as they come, ours as they are computed, and how far apart they are."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tinymia
from tinymia import Action, Model

from ..measure.answers import kl as kl_of
from .llama import Item

END = object()
Progress = Callable[[str, int], None]  # (what is at hand, how many are done)


class Closed(Exception):
    """Nobody takes any more."""


class Feed:
    """What `produce(put)` puts, to be iterated: it runs in a thread, at most `ahead` items beyond the one in hand.

    After the last item `result` is what produce returned; an error of produce is raised from the iteration.
    """

    def __init__(self, produce: Callable[[Callable[[Any], None]], Any], ahead: int = 1):
        self.queue: queue.Queue[Any] = queue.Queue(ahead)
        self.produce, self.closed, self.ended, self.error, self.result = produce, False, False, None, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.produce(self._put)
        except Closed:
            return
        except BaseException as e:
            self.error = e
        try:
            self._put(END)
        except Closed:
            pass

    def _put(self, item: Any) -> None:
        while not self.closed:
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                pass
        raise Closed

    def __iter__(self) -> Iterator[Any]:
        while not self.ended:
            item = self.queue.get()
            self.ended = item is END
            if not self.ended:
                yield item
        if self.error is not None:
            raise self.error

    def finish(self) -> Any:
        """Take the rest, and what produce returned."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop: produce gets Closed at its next put."""
        self.closed = True
        self.thread.join()


class Others:
    """Tensors of another engine, asked for in our order; what comes before its turn waits, at most a layer of it."""

    def __init__(self, items: Iterator[Item], model: Model):
        self.items, self.model, self.waiting = items, model, dict[str, Item]()
        self.reached = -2  # how far the other engine has come: twice the layer, and one more when the layer is complete

    def rank(self, name: str) -> int:
        op, il = self.model.table[name]
        if il is None:
            return -2 if op.base == "inp_embd" else 2 * self.model.config.n_layer
        return 2 * il + (op.base == "l_out")

    def take(self, name: str) -> Item | None:
        """The tensor of this name; None if the other engine has gone past its layer without it."""
        while name not in self.waiting:
            if self.reached > self.rank(name) | 1:
                return None
            item = next(self.items, None)
            if item is None:
                return None
            self.waiting[item.name] = item
            self.reached = max(self.reached, self.rank(item.name) + (self.rank(item.name) & 1))
        return self.waiting.pop(name)


def distance(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """nmse = sum (a-b)^2 / sum b^2 with b theirs, the largest |a-b|, and whether every bit is the same."""
    a, b = ours.reshape(-1), theirs.reshape(-1)
    if b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32)):
        return {"nmse": 0.0, "max_abs": 0.0, "identical": True}
    error, power, worst = 0.0, 0.0, 0.0
    for i in range(0, a.size, 1 << 20):  # float64 of a part at a time
        part = b[i : i + (1 << 20)].astype(np.float64)
        difference = np.abs(a[i : i + (1 << 20)] - part)
        error, power = error + float(difference @ difference), power + float(part @ part)
        worst = float(np.maximum(worst, difference.max()))  # which keeps NaN
    nmse = error / power if power else (math.inf if error else 0.0)
    return {"nmse": nmse, "max_abs": worst, "identical": False}


@dataclass
class Compared:
    """What a comparison found."""

    rows: list[dict[str, Any]] = field(default_factory=list)    # a line of the table each
    absent: list[str] = field(default_factory=list)             # names that the other engine does not have
    ours: np.ndarray | None = None                              # logits
    theirs: np.ndarray | None = None


def compare(
    model: Model,
    ids: Sequence[int],
    others: Others,
    names: Sequence[str],
    shown: set[str],
    actions: Sequence[Action] = (),
    inject: bool = False,
    on_pair: Callable[[Item], None] | None = None,
    progress: Progress | None = None,
) -> Compared:
    """One pass of ours; each of `names` is compared as it is computed and, with inject, replaced by the other's.

    Only those in `shown` get a row. `on_pair` is called with each tensor of the other's that was taken.
    """
    out = Compared()
    edited = {name for action in actions for name in tinymia.match(action.name, model.table)}

    def pair(x: np.ndarray, ctx: tinymia.Context) -> np.ndarray | None:
        item = others.take(ctx.name)
        if progress:
            progress(ctx.name, len(out.rows))
        if item is None:
            out.absent.append(ctx.name)
            return None
        if on_pair:
            on_pair(item)
        if ctx.name in shown:
            out.rows.append({"name": ctx.name, "theirs": item.theirs, "op": ctx.op.op, "shape": list(x.shape),
                         **distance(x, item.value), "edited": ctx.name in edited})
        if ctx.name == "result_output":
            out.ours, out.theirs = x, item.value
            return None
        return item.value.astype(np.float32) if inject else None

    model.run(list(ids), actions=[*actions, *(tinymia.Replace(name, pair) for name in names)])
    return out


def divergence(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """KL(theirs || ours) of the logits in nats, mean and largest; at how many positions the best token is the same."""
    kl = [max(kl_of(b, a), 0.0) for a, b in zip(ours, theirs)]
    equal = int((ours.argmax(1) == theirs.argmax(1)).sum())
    return {"kl": {"mean": float(np.mean(kl)), "max": max(kl)}, "greedy": {"equal": equal, "of": len(kl)}}
