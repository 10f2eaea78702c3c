"""The comparison of every tensor of tinymia with llama.cpp's, in the same process, pass after pass.

llama.cpp runs in a second thread, a few tensors ahead. Each pair is compared at once and then dropped, so that a long
prompt of a big model needs the memory of one layer, not of two passes. docs/verify.md explains the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tinymia
from tinymia import Action, Error, Model
from tinymia_files import check_apart, check_target, short, write_atomic

from ..runs.progress import Progress
from ..runs.result import about, describe, files_in, resume
from .compare import Compared, Feed, Others, compare, divergence
from .edits import Edits
from .llama import Outcome, compute
from .llama_names import FLASH, FUSED
from .recording import Recorder, check_recorded, read_recording
from .verify_result import Verification

FLOATS = ("F32", "F16", "BF16", "F64")


def open_model(model: str | Path | Model, threads: int | None, numerics: str = "ggml") -> Model:
    """The model itself, or the one at a path. Raises Error."""
    return model if isinstance(model, Model) else tinymia.load(model, threads, numerics)


def default_tolerance(model: Model, inject: bool, flash: bool) -> float:
    """The NMSE that two correct engines stay within: 1e-6 with float weights, 1e-4 with quantised ones.

    Op by op (inject) it is 1e-10 and 1e-6. llama.cpp's flash attention rounds differently: then it is 1e-5 and 5e-3
    (measured: 3e-6 and 1e-3), and 1e-6 op by op.
    """
    floats = all(w.type_name in FLOATS for w in model.weights.values() if len(w.shape) > 1)
    if inject:
        return 1e-10 if floats and not flash else 1e-6
    return (1e-5 if floats else 5e-3) if flash else (1e-6 if floats else 1e-4)


def selection(model: Model, asked: Sequence[str], flash: bool) -> tuple[list[str], set[str]]:
    """The names of tensors that llama.cpp can have, and the set of names to show. Raises Error."""
    shown = {name for pattern in asked or ["all"] for name in tinymia.match(pattern, model.table)}
    lacking = {**FUSED, **(FLASH if flash else {})}
    names = [name for name, (op, _) in model.table.items() if op.base not in lacking]
    if asked and not shown.intersection(names):
        raise Error(f"llama.cpp has no {', '.join(asked)}: " + "; ".join(
            f"{k} is {v}" for k, v in lacking.items() if any(model.table[n][0].base == k for n in shown)))
    return names, shown


def ahead(model: Model, n_tok: int) -> int:
    """The number of tensors that llama.cpp may be ahead: 16 MB of them, so that both engines seldom wait."""
    c = model.config
    largest = 4 * n_tok * max(c.n_ff, c.n_vocab, c.n_head * n_tok, c.n_embd)
    return min(max(2**24 // largest, 1), 64)


def verify(
    model: str | Path | Model,
    prompt: str | Sequence[int],
    *,
    tolerance: float | None = None,
    only: str | Sequence[str] = (),
    inject: bool = False,
    flash: bool = False,
    repack: bool = False,
    threads: int | None = None,
    record: str | Path | None = None,
    against: str | Path | None = None,
    actions: Sequence[Action] = (),
    n_predict: int = 0,
    out: str | Path | None = None,
) -> Verification:
    """Compare every tensor of a prompt with llama.cpp's.

    tolerance: the NMSE that is allowed (see default_tolerance). only: patterns of names. inject: each op gets
    llama.cpp's inputs. flash, repack: let llama.cpp use its flash attention, or repacked weights, which round
    differently: unless a tolerance is given, the verdict is then that of each op by itself. record: write llama.cpp's
    tensors to an .npz file; against: read them from one. actions: done in both engines. n_predict: generate this many
    tokens greedily, one pass each, and compare these passes and the text. out: an .npz or .json file that keeps the
    result; an earlier one of the same run is made anew, since it is about the programs of its day. Raises Error.
    """
    model = open_model(model, threads)
    by_op = (flash or repack) and not inject and tolerance is None
    tolerance = default_tolerance(model, inject, flash) if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf:
        raise Error(f"tolerance {tolerance}: it must be 0 or more")
    if record is not None and against is not None:
        raise Error("a recording is either made (record) or compared with (against)")
    if record is not None and Path(record).suffix != ".npz":
        raise Error(f"{record}: recordings are .npz files")
    if record is not None:
        check_target(record, inputs=files_in(list(actions)))
        check_apart([record, *files_in(out)])
    text = prompt if isinstance(prompt, str) else None
    ids, actions = model.ids(prompt), tinymia.listed(actions)
    only = [only] if isinstance(only, str) else list(only)
    settings = {"only": only, "tolerance": tolerance, "inject": inject, "flash": flash, "repack": repack,
                "actions": describe(actions), "n_predict": n_predict,
                "against": None if against is None else str(against)}
    info = about(model, "verify", settings, prompt=prompt)
    resume(out, info, Verification, [*actions, *files_in(against)])     # raises Error for a file that holds another run
    if not 0 < len(ids) + n_predict <= model.config.n_ctx:
        raise Error(f"{len(ids)} tokens and {n_predict} more: the context has room for {model.config.n_ctx}")
    how = {"flash": flash, "repack": repack, "actions": [repr(action) for action in actions]}
    given = None if against is None else read_recording(against, model, ids, how, n_predict)
    names, shown = selection(model, only, flash)
    lacking = {k: v for k, v in {**FUSED, **(FLASH if flash else {})}.items()
               if any(name.startswith(f"{k}-") for name in shown)}
    if given is not None and against is not None:
        recorded = {item.name for item in given[0] if item.step == 0}
        shown = check_recorded(against, recorded, names, shown, bool(only), inject)
        by_op = by_op and recorded.issuperset(names)
        names = [name for name in names if name in recorded]
    edits = Edits(actions, model, len(ids))
    lost = sorted(set(edits.by_name) - set(names))
    if lost:
        base = model.table[lost[0]][0].base
        raise Error(f"{lost[0]} cannot be changed in llama.cpp: it is {(FUSED | FLASH)[base]}")
    # Attention runs step by step only if a name such as kq is watched; otherwise our fused attention runs, as usual.
    wanted = set(names) if inject else (set(names) & shown) | {"result_output"}
    watched = [n for n in names if n in wanted and (n in shown or model.table[n][0].base not in FLASH)]

    def run(recorder: Recorder | None) -> tuple[Compared, Outcome]:
        with Progress(len(watched) * (1 + n_predict), "verify op by op" if inject else "verify") as bar:
            return both(bar, recorder)

    def both(bar: Progress, recorder: Recorder | None) -> tuple[Compared, Outcome]:
        on_pair = None if recorder is None else recorder.add
        how_many = (actions, inject, on_pair, bar.step, n_predict)
        if given is not None:
            return compare(model, ids, Others(iter(given[0]), model), watched, shown, *how_many), given[1]
        feed = Feed(lambda put: compute(
            model, ids, text, set(watched) | edits.by_name.keys(), edits, put,
            threads=model.threads, flash=flash, repack=repack, n=n_predict), ahead(model, len(ids)))
        try:
            found = compare(model, ids, Others(iter(feed), model), watched, shown, *how_many)
            outcome = feed.finish()
        finally:
            feed.close()
        outcome.absent = found.absent
        if recorder:
            recorder.finish(model, text, ids, how, outcome)
        return found, outcome

    if record is None:
        found, outcome = run(None)
    else:
        done: list[tuple[Compared, Outcome]] = []
        write_atomic(record, lambda f: done.append(run(Recorder(f))))
        found, outcome = done[0]
    rows, later = ([row | {"over": not row["nmse"] <= tolerance} for row in these]
                   for these in (found.rows, found.later.values()))
    logits: dict[str, Any] = {"kl": None, "greedy": None}
    if found.ours is not None and found.theirs is not None:
        logits = divergence(found.ours, found.theirs)
    inner: Verification | None = None
    if by_op:
        inner = verify(model, prompt, only=only, inject=True, flash=flash, repack=repack, against=against,
                       actions=actions, n_predict=n_predict)
    whole = Verification(
        about=info, rows=rows, decoding=later, tokens=ids, tolerance=tolerance, llama_cpp=outcome.version,
        threads=model.threads, passes=1 + found.steps, tokens_equal=outcome.tokens is None or outcome.tokens == ids,
        lacking=lacking, absent=outcome.absent, unknown=dict(outcome.unknown), steps=dict(outcome.steps), **logits,
        output=output(model, model.generate(ids, n_predict, actions).tokens, outcome.output or [], found)
        if n_predict else None, recorded=None if record is None else str(record),
        by_op=None if inner is None else {name: inner[name] for name in BY_OP}, **counts(rows, later),
        ok=False, verdict="")
    whole.ok, whole.verdict = judge(whole)
    if out is not None:
        whole.save(out)
    return whole


BY_OP = ("tolerance", "rows", "decoding", "first", "worst", "ok", "verdict")    # what is kept of the ops by themselves


def counts(rows: list[dict[str, Any]], later: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tensors are identical, and which is the first that is not, the first over, and the worst."""
    every = [*rows, *later]
    worst = max(every, key=lambda r: r["nmse"], default=None)
    return {
        "identical": sum(r["identical"] for r in rows), "identical_decoding": sum(r["identical"] for r in later),
        "of_decoding": sum(r["passes"] for r in later), "first": next((r["name"] for r in every if r["over"]), None),
        "first_not_identical": next((r["name"] for r in every if r["identical"] < r.get("passes", 1)), None),
        "worst": worst and {"name": worst["name"], "nmse": worst["nmse"]}}


def output(model: Model, ours: list[int], theirs: list[int], found: Compared) -> dict[str, Any]:
    """Both continuations and, if they differ, the first token that does and the margins of the two best logits."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    equal = ours == theirs
    parts = None if equal else {"token": same}
    if parts and found.parts and found.parts["token"] == same:
        parts = found.parts
    texts = {"theirs": model.detokenize(theirs), "their_rest": model.detokenize(theirs[same:]),
             "our_rest": model.detokenize(ours[same:])}
    pieces = [model.piece(parts[who]) for who in ("ours", "theirs")] if parts and "ours" in parts else []
    return {"ours": ours, "theirs": theirs, "equal": equal, "same": same, "parts": parts, "texts": texts,
            "pieces": pieces}


def judge(found: Verification) -> tuple[bool, str]:
    """The verdict: from the rows or, if llama.cpp rounds differently, from the rows of each op by itself."""
    every, faults = [*found.rows, *found.decoding], []
    over = [r for r in every if r["over"]]
    worst, by_op, parts = found.worst, found.by_op, parted(found.output)
    if not found.tokens_equal:
        faults.append("llama.cpp cuts the prompt into other tokens")
    if found.absent:
        faults.append(f"llama.cpp has no {short(', '.join(found.absent))}")
    far = f"{len(over)} of {len(every)} tensors are further apart than {found.tolerance:g}, first " + (
        f"{over[0]['name']} ({over[0]['nmse']:.2g})" if over else "")
    if over and by_op is None:
        faults.append(far)
    if parts and by_op is None:
        faults.append(parts)
    if by_op and not by_op["ok"]:
        faults.append(f"op by op {by_op['verdict'].removeprefix('DIFFERENT: ')}")
    alike = f"{found.identical} of {len(found.rows)} tensors bit-identical"
    if found.decoding:
        alike += (f", and {found.identical_decoding} of {found.of_decoding} in {found.passes - 1} passes of decoding")
    if worst and found.first_not_identical:
        alike += f", the worst is {worst['name']} (NMSE {worst['nmse']:.2g})"
    if by_op and by_op["ok"] and by_op["worst"]:
        alike = f"each op by itself is within {by_op['tolerance']:g} (worst {by_op['worst']['nmse']:.2g}); {alike}"
        alike += "".join(f"; by rounding {what}" for what in ([far] if over else []) + ([parts] if parts else []))
    return not faults, f"DIFFERENT: {'; '.join(faults)}; {alike}" if faults else f"equal: {alike}"


def parted(output: dict[str, Any] | None) -> str:
    """A sentence on where the continuations differ; "" if they are the same."""
    parts = output and output["parts"]
    if not parts:
        return ""
    at = f"the greedy continuations differ from token {parts['token'] + 1} on"
    if "ours" not in parts:
        return at
    return (f"{at}, where the two best logits are {parts['margin_theirs']:.2g} apart in llama.cpp and "
            f"{parts['margin_ours']:.2g} the other way round in tinymia")
