"""The comparison of both numerics with float64 on dequantised weights, without llama.cpp: `tinymia verify --self`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tinymia
from tinymia import Model

from .compare import Feed, Others, Progress, compare, divergence
from .llama import Item
from .llama_names import FLASH
from .reference import Reference


def verify_self(
    model: str | Path | Model,
    prompt: str | Sequence[int],
    *,
    tolerance: float | None = None,
    only: str | Sequence[str] = ("l_out", "result_output"),
    inject: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare both numerics with float64 on dequantised weights: the distance of each tensor from the exact model.

    tolerance (1e-6) is for numerics f32, which should equal the exact model. With inject, each op gets the reference's
    inputs, so that its error is its own. Raises Error.
    """
    tolerance = 1e-6 if tolerance is None else tolerance
    path, threads = (model.path, model.threads) if isinstance(model, Model) else (model, threads)
    patterns = [only] if isinstance(only, str) else list(only)
    out: dict[str, Any] = {
        "tinymia": tinymia.__version__, "model": str(path), "tolerance": tolerance, "inject": inject}
    rows: dict[str, dict[str, Any]] = {}
    for numerics in ("f32", "ggml"):
        engine = tinymia.load(path, threads, numerics)
        ids = engine.ids(prompt)
        shown = {name for pattern in patterns for name in tinymia.match(pattern, engine.table)}
        names = [n for n in engine.table if inject or n in shown or n == "result_output"]
        names = [n for n in names if n in shown or engine.table[n][0].base not in FLASH]
        tell = progress and partial(lambda numerics, name, n: progress(f"{numerics} {name}", n), numerics)
        feed = Feed(partial(reference, engine.path, ids, set(names)))
        try:
            found = compare(engine, ids, Others(iter(feed), engine), names, shown, (), inject, None, tell)
        finally:
            feed.close()
        for row in found.rows:
            both = rows.setdefault(row["name"], {"name": row["name"], "shape": row["shape"]})
            both[numerics] = {"nmse": row["nmse"], "max_abs": row["max_abs"]}
        assert found.ours is not None and found.theirs is not None      # result_output is always compared
        out[numerics] = divergence(found.ours, found.theirs) | {"worst": max(row["nmse"] for row in found.rows)}
    out |= {"tokens": ids, "prompt": prompt if isinstance(prompt, str) else None}
    out["rows"] = [row | {"over": not row["f32"]["nmse"] <= tolerance} for row in rows.values()]
    over = [row for row in out["rows"] if row["over"]]
    out["first"], out["ok"] = over[0]["name"] if over else None, not over
    kl, greedy = out["ggml"]["kl"], out["ggml"]["greedy"]
    what = (f"DIFFERENT: f32 is further than {tolerance:g} from float64, first at {over[0]['name']} "
            f"({over[0]['f32']['nmse']:.2g})" if over else
            f"equal: f32 is the model's own function (worst NMSE {out['f32']['worst']:.2g})")
    out["verdict"] = (f"{what}; ggml's rounding of activations moves the logits by KL {kl['mean']:.2g} nats per token, "
                      f"and the best token at {greedy['of'] - greedy['equal']} of {greedy['of']} positions")
    return out


def reference(path: Path, ids: Sequence[int], wanted: set[str], put: Callable[[Item], None]) -> None:
    """Run the pass in float64, and put each wanted tensor: the producer of a Feed."""
    Reference(path).forward(ids, lambda name, x: put(Item(name, name, x)) if name in wanted else None)
