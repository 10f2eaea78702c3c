"""The comparison of two engines: the other's tensors as they come, ours as they are computed, and the distances."""

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


class Closed(Exception):
    """The exception that ends a producer: nothing more is taken from its Feed."""


class Feed:
    """An iterator over the items that `produce(put)` puts; it runs in a thread, at most `ahead` items in advance.

    After the last item, `result` is what produce returned. An error in produce is raised by the iteration.
    """

    def __init__(self, produce: Callable[[Callable[[Any], None]], Any], ahead: int = 1):
        self.queue: queue.Queue[Any] = queue.Queue(ahead)
        self.produce, self.closed, self.ended, self.result = produce, False, False, None
        self.error: BaseException | None = None
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
        """Take the remaining items, and return what produce returned."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop the producer: its next put raises Closed."""
        self.closed = True
        self.thread.join()


class Others:
    """The tensors of another engine, taken in our order. A tensor that comes too early waits; at most a layer waits."""

    def __init__(self, items: Iterator[Item], model: Model):
        self.items, self.model = items, model
        self.next: Item | None = None
        self.begin(0)

    def begin(self, step: int) -> bool:
        """Go to pass number `step`, and drop those before it. Returns whether the other engine has such a pass."""
        self.step, self.waiting = step, dict[str, Item]()
        self.reached = -2  # the other engine's progress: twice the layer, plus one when the layer is complete
        while (item := self._peek()) is not None and item.step < step:
            self.next = None
        return item is not None and item.step == step

    def _peek(self) -> Item | None:
        if self.next is None:
            self.next = next(self.items, None)
        return self.next

    def rank(self, name: str) -> int:
        """The place of a tensor in the order of computation, on the scale of `reached`."""
        op, il = self.model.table[name]
        if il is None:
            return -2 if op.base in ("inp_embd", "inp_scaled") else 2 * self.model.config.n_layer
        return 2 * il + (op.base == "l_out")

    def take(self, name: str) -> Item | None:
        """The other engine's tensor of this name; None if it has completed the layer, or the pass, without it."""
        while name not in self.waiting:
            if self.reached > self.rank(name) | 1:
                return None
            item = self._peek()
            if item is None or item.step != self.step:
                return None
            self.next = None
            self.waiting[item.name] = item
            self.reached = max(self.reached, self.rank(item.name) + (self.rank(item.name) & 1))
        return self.waiting.pop(name)


def distance(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The distance of two tensors: nmse = sum (a-b)^2 / sum b^2 with b theirs, the largest |a-b|, and bit equality."""
    a, b = ours.reshape(-1), theirs.reshape(-1)
    if b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32)):
        return {"nmse": 0.0, "max_abs": 0.0, "identical": True}
    error, power, worst = 0.0, 0.0, 0.0
    for i in range(0, a.size, 1 << 20):  # part by part, to save memory
        part = b[i : i + (1 << 20)].astype(np.float64)
        difference = np.abs(a[i : i + (1 << 20)] - part)
        error, power = error + float(difference @ difference), power + float(part @ part)
        worst = float(np.maximum(worst, difference.max()))  # np.maximum keeps NaN
    nmse = error / power if power else (math.inf if error else 0.0)
    return {"nmse": nmse, "max_abs": worst, "identical": False}


@dataclass
class Compared:
    """The result of a comparison, as numbers."""

    rows: list[dict[str, Any]] = field(default_factory=list)    # the lines of the table, for the pass over the prompt
    later: dict[str, dict[str, Any]] = field(default_factory=dict)      # by name, for all later passes together
    steps: int = 0                                              # the number of passes after the prompt's
    absent: list[str] = field(default_factory=list)             # names that the other engine does not have
    ours: np.ndarray | None = None                              # logits of the prompt
    theirs: np.ndarray | None = None
    best: list[int] = field(default_factory=list)               # our best token after each pass
    parts: dict[str, Any] | None = None                         # the first place where the best tokens differ

    def add_later(self, name: str, step: int, found: dict[str, Any]) -> None:
        """Count a tensor of a later pass: how often it is identical, and which pass is the worst."""
        row = self.later.setdefault(name, {"name": name, "passes": 0, "identical": 0, "nmse": -1.0})
        row["passes"], row["identical"] = row["passes"] + 1, row["identical"] + found["identical"]
        if not found["nmse"] <= row["nmse"]:  # also true for NaN
            row |= {"nmse": found["nmse"], "max_abs": found["max_abs"], "worst_pass": step}

    def add_logits(self, step: int, ours: np.ndarray, theirs: np.ndarray) -> int:
        """Count the last rows of logits of both, [n_vocab]. Returns the other engine's best token."""
        a, b = int(ours.argmax()), int(theirs.argmax())
        self.best.append(a)
        if a != b and self.parts is None:
            self.parts = {"token": step, "ours": a, "theirs": b, "margin_ours": float(ours[a] - ours[b]),
                          "margin_theirs": float(theirs[b] - theirs[a])}
        return b


def compare(
    model: Model,
    ids: Sequence[int],
    others: Others,
    names: Sequence[str],
    shown: set[str],
    actions: Sequence[Action] = (),
    inject: bool = False,
    on_pair: Callable[[Item], None] | None = None,
    on_step: Callable[[], object] = lambda: None,
    steps: int = 0,
) -> Compared:
    """Run our pass over the prompt, and compare each tensor of `names` with the other engine's as it is computed.

    With inject, it is then replaced by the other engine's. Only tensors in `shown` get a row. on_pair is called with
    each tensor of the other engine, on_step for each of ours. Up to `steps` passes follow, each over the other engine's
    best token.
    """
    out = Compared()
    edited = {name for action in actions for name in tinymia.match(action.name, model.table)}

    def pair(x: np.ndarray, ctx: tinymia.Context) -> np.ndarray | None:
        item = others.take(ctx.name)
        on_step()
        if item is None:
            if ctx.name not in out.absent:
                out.absent.append(ctx.name)
            return None
        if on_pair:
            on_pair(item)
        if ctx.name in shown:
            found = distance(x, item.value)
            if others.step:
                out.add_later(ctx.name, others.step, found)
            else:
                out.rows.append({"name": ctx.name, "theirs": item.theirs, "op": ctx.op.op, "shape": list(x.shape),
                                 **found, "edited": ctx.name in edited})
        if ctx.name == "result_output":
            logits[:] = [x, item.value]
            return None
        return item.value.astype(np.float32) if inject else None

    logits: list[np.ndarray] = []
    pairs, cache = [tinymia.Replace(name, pair) for name in names], model.cache()
    model.run(list(ids), actions=[*actions, *pairs], cache=cache)
    if logits:
        out.ours, out.theirs = logits
    while steps and logits:
        token = out.add_logits(out.steps, logits[0][-1], logits[1][-1])
        if out.steps == steps or not others.begin(out.steps + 1):
            break
        out.steps += 1
        model.run([token], actions=pairs, cache=cache)
    return out


def divergence(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """KL(theirs || ours) of the logits in nats, mean and largest, and at how many positions the best tokens agree."""
    kl = [max(kl_of(b, a), 0.0) for a, b in zip(ours, theirs)]
    equal = int((ours.argmax(1) == theirs.argmax(1)).sum())
    return {"kl": {"mean": float(np.mean(kl)), "max": max(kl)}, "greedy": {"equal": equal, "of": len(kl)}}
