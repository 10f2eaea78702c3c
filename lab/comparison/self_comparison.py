"""The comparison of both numerics with float64 on dequantised weights, without llama.cpp: `tinymia verify --self`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tinymia
from tinymia import Context, Model, Replace

from ..runs.progress import Progress
from ..runs.result import about, resume
from .compare import Feed, Others, compare, divergence
from .llama import Item
from .llama_names import FLASH
from .reference import Reference
from .verify_result import SelfVerification


def verify_self(
    model: str | Path | Model,
    prompt: str | Sequence[int],
    *,
    tolerance: float | None = None,
    only: str | Sequence[str] = ("l_out", "result_output"),
    inject: bool = False,
    threads: int | None = None,
    out: str | Path | None = None,
) -> SelfVerification:
    """Compare both numerics with float64 on dequantised weights: the distance of each tensor from the exact model.

    tolerance (1e-6) is for numerics f32, which should equal the exact model. With inject, each op gets the reference's
    inputs, so that its error is its own. out: an .npz or .json file that keeps the result. Raises Error.
    """
    tolerance = 1e-6 if tolerance is None else tolerance
    path, threads = (model.path, model.threads) if isinstance(model, Model) else (model, threads)
    patterns = [only] if isinstance(only, str) else list(only)
    engines = {numerics: tinymia.load(path, threads, numerics) for numerics in ("f32", "ggml")}
    settings = {"self": True, "only": patterns, "tolerance": tolerance, "inject": inject}
    info, table = about(engines["ggml"], "verify", settings, prompt=prompt), engines["ggml"].table
    resume(out, info, SelfVerification)     # raises Error for a file that holds another run
    ids = engines["ggml"].ids(prompt)
    shown = {name for pattern in patterns for name in tinymia.match(pattern, table)}
    names = [n for n in table if inject or n in shown or n == "result_output"]
    names = [n for n in names if n in shown or table[n][0].base not in FLASH]
    both: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with Progress(len(names) * len(engines), "verify --self") as bar:
        for numerics, engine in engines.items():
            feed = Feed(partial(reference, engine.path, ids, set(names)))
            try:
                found = compare(engine, ids, Others(iter(feed), engine), names, shown, (), inject, None, bar.step)
            finally:
                feed.close()
            for row in found.rows:
                line = rows.setdefault(row["name"], {"name": row["name"], "shape": row["shape"]})
                line[numerics] = {"nmse": row["nmse"], "max_abs": row["max_abs"]}
            assert found.ours is not None and found.theirs is not None      # result_output is always compared
            both[numerics] = {**divergence(found.ours, found.theirs), "worst": max(row["nmse"] for row in found.rows)}
    lines = [row | {"over": not row["f32"]["nmse"] <= tolerance} for row in rows.values()]
    over = [row for row in lines if row["over"]]
    kl, greedy = both["ggml"]["kl"], both["ggml"]["greedy"]
    what = (f"DIFFERENT: f32 is further than {tolerance:g} from float64, first at {over[0]['name']} "
            f"({over[0]['f32']['nmse']:.2g})" if over else
            f"equal: f32 is the model's own function (worst NMSE {both['f32']['worst']:.2g})")
    verdict = (f"{what}; ggml's rounding of activations moves the logits by KL {kl['mean']:.2g} nats per token, "
               f"and the best token at {greedy['of'] - greedy['equal']} of {greedy['of']} positions")
    whole = SelfVerification(info, lines, ids, tolerance, over[0]["name"] if over else None, not over, verdict, **both)
    if out is not None:
        whole.save(out)
    return whole


def reference(path: Path, ids: Sequence[int], wanted: set[str], put: Callable[[Item], None]) -> None:
    """Run the pass in float64, and put each wanted tensor: the producer of a Feed.

    The Reference is written apart, and computes a Llama; the other architectures are computed by tinymia.py's own
    arithmetic, in float64.
    """
    exact = tinymia.load(path, numerics="plain", dtype="float64")
    if exact.config.arch == "llama":
        Reference(path).forward(ids, lambda name, x: put(Item(name, name, x)) if name in wanted else None)
        return

    def take(x: np.ndarray, ctx: Context) -> None:
        put(Item(ctx.name, ctx.name, x.copy()))

    exact.run(ids, actions=[Replace(name, take) for name in exact.table if name in wanted])
