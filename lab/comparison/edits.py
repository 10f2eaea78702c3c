"""The effect of actions on a tensor, written a second time, for llama.cpp's tensors: one row at a time.

verify changes tinymia's tensor by the action itself and llama.cpp's by these lines. If the two disagree on which row,
which head or which number is meant, everything after that tensor differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinymia import (
    Ablate,
    Action,
    Add,
    Context,
    Edit,
    Error,
    Lens,
    Log,
    Model,
    Patch,
    ProjectOut,
    Replace,
    Save,
    Scale,
    listed,
    match,
)
from tinymia_engine import indices, read_sources


class Edits:
    """A function of tensors: edits(name, x) is the tensor after the actions, or None if none matches its name."""

    def __init__(self, actions: Sequence[Action], model: Model, n_tok: int):
        self.model, self.n_tok = model, n_tok
        self.by_name: dict[str, list[Action]] = {}
        for action in listed(actions):
            if isinstance(action, (Lens, Log, Save)):
                raise Error(f"verify keeps nothing but what it compares: {type(action).__name__} does not go with it")
            if action.when != "prompt":
                raise Error(f"verify changes the pass over the prompt only: when={action.when} does not go with it")
            for name in match(action.name, model.table):
                self.by_name.setdefault(name, []).append(action)

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        if name not in self.by_name:
            return None
        op, il = self.model.table[name]
        for action in self.by_name[name]:
            if isinstance(action, Replace):
                ctx = Context(name, il, np.arange(self.n_tok), "prompt", op, self.model, lambda ctx, value: None)
                new = action.fn(x.copy(), ctx)
                x = x if new is None else np.asarray(new, np.float32)
            elif isinstance(action, Edit):
                x = self.edited(action, name, x)
            else:
                raise Error(f"verify cannot do {type(action).__name__} to llama.cpp's {name}; Replace it can")
        return x

    def edited(self, action: Edit, name: str, x: np.ndarray) -> np.ndarray:
        """The tensor x after one action: for each position of `at` the new row, or the chosen heads of it."""
        op = self.model.table[name][0]
        axis = op.dims.index("n_tok")
        given = next((s for s in ("source", "vector", "direction") if getattr(action, s, None) is not None), None)
        sources = [] if given is None else read_sources(getattr(action, given), name, op.dims, self.model, name)
        y = x.copy()
        old, new = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
        at = range(self.n_tok) if action.at is None else indices(action.at, "position", self.n_tok).tolist()
        c = self.model.config
        n_head = c.n_head_kv if "n_head_kv" in op.dims else c.n_head
        for place, position in enumerate(at):
            position = position % self.n_tok
            rows = [chosen(action, source, position, place) for source in sources]
            row = self.row(action, np.mean(rows, axis=0, dtype=np.float32) if rows else None, old, position, place)
            if action.heads is None:
                new[position] = row
                continue
            row = np.broadcast_to(np.asarray(row, np.float32), old[position].shape)
            for h in indices(action.heads, "head", n_head):
                d = c.d_head_v
                part = slice(h * d, h * d + d) if op.base == "kqv_merged" else h
                new[position][part] = row[part]
        return y

    def row(self, action: Edit, source: Any, old: np.ndarray, position: int, place: int) -> Any:
        """The new row of a position; `source` is the row that the action takes for it."""
        if isinstance(action, Patch):
            return source
        if isinstance(action, Ablate):
            if action.mode == "value":
                value = np.asarray(action.value, np.float32)
                return value[place] if value.ndim == old.ndim and len(value) > 1 else value
            return {"zero": 0.0, "mean": old.mean(0), "resample": source}[action.mode]
        if isinstance(action, Add):
            return old[position] + np.float32(action.coef) * source
        if isinstance(action, ProjectOut):
            d = source / np.float32(np.linalg.norm(source))
            return old[position] - np.float32(np.vdot(old[position].astype(np.float64), d.astype(np.float64))) * d
        if isinstance(action, Scale):
            return np.float32(action.factor) * old[position]
        raise Error(f"verify cannot do {type(action).__name__} to llama.cpp's {action.name}; Replace it can")


def chosen(action: Edit, source: np.ndarray, position: int, place: int) -> np.ndarray:
    """The row of one source for a position; `place` says which of the action's positions it is."""
    if isinstance(action, Patch) and action.src is not None:
        return source[indices(action.src, "row", len(source))[place]]
    if isinstance(action, Patch):
        return source[position if len(source) > 1 else 0]
    if isinstance(action, Ablate):
        return source[position]
    return source[getattr(action, "row", None) or 0]
