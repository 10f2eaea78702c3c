"""The results of `tinymia verify`, their text and their pictures: beside llama.cpp, and with --self beside float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinymia_files import short

from ..pictures.heatmap import Heatmap
from ..pictures.terminal import table, visible
from ..runs.result import Result

FLOOR = -16.0   # log10 of the NMSE that gets the first colour: equal bits, or float64's own rounding


@dataclass
class Verdict(Result):
    """The base of both results: the rows of the table, and whether all is well. found["ok"] is the same as found.ok;
    settings, model and prompt are found by their names as well, such as found["inject"]."""

    rows: list[dict[str, Any]]      # a line of the table per tensor
    tokens: list[int]               # of the prompt
    tolerance: float                # the NMSE that is allowed
    first: str | None               # the first tensor that is further apart
    ok: bool
    verdict: str                    # in a sentence

    def __getitem__(self, name: str) -> Any:
        run = self.about
        known = {**run["settings"], "model": run["model"]["path"], "prompt": run["prompts"]["prompt"]["text"],
                 "tinymia": run["versions"]["tinymia"]}
        return {**known, **vars(self)}[name]

    def __contains__(self, name: object) -> bool:
        return self.get(str(name), self) is not self

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a name, as found[name]; default where there is none."""
        try:
            return self[name]
        except KeyError:
            return default


@dataclass
class Verification(Verdict):
    """The comparison of every tensor with llama.cpp's. A row: name, theirs (llama.cpp's name), op, shape, nmse,
    max_abs, identical (to the bit), edited (by an action), over (the tolerance)."""

    decoding: list[dict[str, Any]]  # per tensor, over the later passes: passes, identical, nmse, max_abs, worst_pass
    llama_cpp: str                  # version of llama-cpp-python
    threads: int                    # of both engines
    passes: int
    tokens_equal: bool              # whether llama.cpp cuts the prompt into the same tokens
    lacking: dict[str, str]         # names that llama.cpp never has, and why
    absent: list[str]               # names that it should have had
    unknown: dict[str, int]         # tensors of llama.cpp that nobody expects, and how often they came
    steps: dict[str, int]           # what it computes besides
    kl: dict[str, Any] | None       # of the logits in nats: mean, max; None if they were not compared
    greedy: dict[str, Any] | None   # positions at which the best token is the same: equal, of
    output: dict[str, Any] | None   # with n_predict: ours, theirs (ids), equal, same, parts, texts, pieces
    recorded: str | None            # the file of record
    by_op: dict[str, Any] | None    # the verdict on each op by itself, where llama.cpp rounds differently
    identical: int                  # how many rows are
    identical_decoding: int
    of_decoding: int
    first_not_identical: str | None
    worst: dict[str, Any] | None    # the tensor that is furthest apart: name, nmse

    def __str__(self) -> str:
        return compared_text(self)


@dataclass
class SelfVerification(Verdict):
    """The comparison of both numerics with float64. A row: name, shape, f32 and ggml (nmse, max_abs), over."""

    f32: dict[str, Any]             # kl, greedy, and the worst NMSE
    ggml: dict[str, Any]

    def __str__(self) -> str:
        return self_text(self)


def number(x: float | None) -> str:
    """A distance as text; in a file NaN and infinity are null."""
    return "not finite" if x is None else f"{x:.2e}"


def shape(row: dict[str, Any]) -> str:
    """The shape of a tensor as text."""
    return "[" + ", ".join(map(str, row["shape"])) + "]"


def logits_line(kl: dict[str, Any], greedy: dict[str, Any]) -> str:
    """A sentence on the distance of two engines' logits."""
    return (f"logits: KL divergence {kl['mean']:.2g} nats per token (at most {kl['max']:.2g}); the best token is the "
            f"same at {greedy['equal']} of {greedy['of']} positions")


def compared_text(found: Verification) -> str:
    """The text of a comparison with llama.cpp."""
    rows = [["name", "llama.cpp", "shape", "NMSE", "max |diff|", ""]]
    for r in found.rows:
        marks = ["OVER"] * r["over"] + ["edited"] * r["edited"]
        far = ["=", "="] if r["identical"] else [number(r["nmse"]), number(r["max_abs"])]
        rows.append([r["name"], r["theirs"], shape(r), *far, " ".join(marks)])
    lines = [table(rows), ""]
    if found.decoding:
        lines += [*decoding_lines(found), ""]
    n, passes, threads = len(found.tokens), found.passes, found.threads
    lines.append(f"compared: {short(found.about['prompts']['prompt']['text'])}, {n} token{'s' * (n > 1)}, {passes} "
                 f"pass{'es' * (passes > 1)}, {threads} thread{'s' * (threads > 1)} each, llama-cpp-python "
                 f"{found.llama_cpp}")
    lines += [f"not in llama.cpp: {name}, {why}" for name, why in found.lacking.items()]
    lines += [f"not found in llama.cpp: {name}" for name in found.absent]
    lines += [f"unknown tensor of llama.cpp {found.llama_cpp}: {name} (x{n})" for name, n in found.unknown.items()]
    if found.steps:
        lines.append("without a name here: " + ", ".join(f"{what} x{n}" for what, n in sorted(found.steps.items())))
    if not found.tokens_equal:
        lines.append("llama.cpp cuts the prompt into other tokens; the table is about ours")
    if found.first or found.first_not_identical:
        lines.append(f"first over {found.tolerance:g}: {found.first or 'none'}; "
                     f"first that is not identical: {found.first_not_identical}")
    if found.kl and found.greedy:
        lines.append(logits_line(found.kl, found.greedy))
    if found.output:
        lines += output_lines(found.output)
    if found.recorded:
        lines.append(f"recorded: {found.recorded}")
    return "\n".join([*lines, found.verdict])


def output_lines(out: dict[str, Any]) -> list[str]:
    """The greedy continuations: how far they are the same, and where they part."""
    same, texts, parts = out["same"], out["texts"], out["parts"]
    lines = [f"greedy: the first {same} of {max(len(out['ours']), len(out['theirs']))} tokens are the same: "
             f"{texts['theirs']!r}"]
    if parts:
        lines.append(f"llama.cpp goes on with {texts['their_rest']!r}, we with {texts['our_rest']!r}")
    if parts and "ours" in parts:
        here, there = out["pieces"]
        lines.append(f"token {same + 1}: the logit of {there!r} leads by {parts['margin_theirs']:.3g} there, "
                     f"that of {here!r} by {parts['margin_ours']:.3g} here")
    return lines


def decoding_lines(found: Verification) -> list[str]:
    """A line for each tensor that was not the same in every pass of decoding."""
    differ = [r for r in found.decoding if r["identical"] < r["passes"]]
    lines = [f"decoding, {found.passes - 1} passes of a token: {found.identical_decoding} of {found.of_decoding} "
             "tensors bit-identical"]
    if differ:
        rows = [["name", "identical", "worst NMSE", "max |diff|", "in pass", ""]]
        rows += [[r["name"], f"{r['identical']} of {r['passes']}", number(r["nmse"]), number(r["max_abs"]),
                  str(r["worst_pass"]), "OVER" * r["over"]] for r in differ]
        lines.append(table(rows))
    return lines


def self_text(found: SelfVerification) -> str:
    """The text of a comparison with float64."""
    rows = [["name", "shape", "f32 NMSE", "ggml NMSE", "ggml off by", ""]]
    for r in found.rows:
        off = r["ggml"]["nmse"]
        rows.append([r["name"], shape(r), number(r["f32"]["nmse"]), number(off),
                     "" if off is None else f"{math.sqrt(off):.3%}", "OVER" * r["over"]])
    logits = [f"{name} {logits_line(one['kl'], one['greedy'])}" for name, one in
              (("f32", found.f32), ("ggml", found.ggml))]
    return "\n".join([table(rows), "", *logits, found.verdict])


# ---------------------------------------------------------------------------------------- pictures


def pictures(found: Verdict) -> list[Heatmap]:
    """A heatmap of the distances, layer by layer and name by name; with --self one for each of the numerics."""
    prompt = visible(found.about["prompts"]["prompt"]["text"])
    if isinstance(found, Verification):
        return [distances(f"distance from llama.cpp: {prompt}", found.rows, found.rows)]
    return [distances(f"distance of {numerics} from float64: {prompt}", found.rows, [r[numerics] for r in found.rows])
            for numerics in ("f32", "ggml")]


def distances(title: str, rows: Sequence[dict[str, Any]], far: Sequence[dict[str, Any]]) -> Heatmap:
    """The NMSE of every tensor. Those of no layer are in the row called model; equal bits are written =."""
    parts = [row["name"].rpartition("-") if row["name"][-1].isdigit() else (row["name"], "", "") for row in rows]
    layers = sorted({int(il) for _, dash, il in parts if dash})
    labels = ["model"] * any(not dash for _, dash, _ in parts) + [str(il) for il in layers]
    columns = list(dict.fromkeys(base for base, _, _ in parts))
    values = np.full((len(labels), len(columns)), np.nan)
    texts = [[""] * len(columns) for _ in labels]
    hovers = [[""] * len(columns) for _ in labels]
    for (base, _, il), row, one in zip(parts, rows, far):
        i, j, nmse = labels.index(il or "model"), columns.index(base), one["nmse"]
        values[i, j] = 0.0 if nmse is None else math.log10(min(max(nmse, 10**FLOOR), 1.0))
        texts[i][j] = "=" if one.get("identical") else number(nmse)
        hovers[i][j] = f"{row['name']}\nNMSE {number(nmse)}\nmax |diff| {number(one['max_abs'])}"
    return Heatmap(values, labels, columns, title, "name", "layer", "log10 of the NMSE", texts=texts, hovers=hovers,
                   limits=(FLOOR, 0.0), upward=True)
