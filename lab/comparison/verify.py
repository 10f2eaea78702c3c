"""Every tensor of tinymia beside llama.cpp's, computed in the same process: `tinymia verify -m MODEL -p PROMPT`.

llama.cpp runs in a thread of its own, a few tensors ahead; each pair is compared as it comes and let go, so that a long
prompt of a big model needs the memory of a layer and not of two passes. docs/verify.md explains the numbers.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tinymia
from tinymia import Action, Error, Model
from tinymia_files import check_target, short, write_atomic
from tinymia_models import DEFAULT

from ..flags.action_flags import Input, Output, change_flags, patch_flags, read_actions
from ..flags.arguments import load_model, read_prompt
from ..flags.parser import Parser
from ..flags.prompt_notes import tell_unknown
from ..pictures.terminal import table
from ..runs.result import dumps, files_in
from ..runs.streams import print_json
from .compare import Compared, Feed, Others, Progress, compare, divergence
from .edits import Edits
from .llama import FLASH, FUSED, Item, Outcome, compute
from .recording import Recorder, check_recorded, read_recording
from .reference import Reference

FLOATS = ("F32", "F16", "BF16", "F64")


def open_model(model: str | Path | Model, threads: int | None, numerics: str = "ggml") -> Model:
    return model if isinstance(model, Model) else tinymia.load(model, threads, numerics)


def default_tolerance(model: Model, inject: bool, flash: bool) -> float:
    """What two right engines stay within: 1e-6 with float weights, 1e-4 with quantised ones; op by op 1e-10 and 1e-6.

    llama.cpp's flash attention rounds otherwise: 1e-5 and 5e-3 then (measured: 3e-6 and 1e-3), and 1e-6 op by op.
    """
    floats = all(w.type_name in FLOATS for w in model.weights.values() if len(w.shape) > 1)
    if inject:
        return 1e-10 if floats and not flash else 1e-6
    return (1e-5 if floats else 5e-3) if flash else (1e-6 if floats else 1e-4)


def selection(model: Model, only: str | Sequence[str], flash: bool) -> tuple[list[str], set[str]]:
    """(names that llama.cpp can have, those of them to show)."""
    asked = [only] if isinstance(only, str) else list(only)
    shown = {name for pattern in asked or ["all"] for name in tinymia.match(pattern, model.table)}
    lacking = {**FUSED, **(FLASH if flash else {})}
    names = [name for name, (op, _) in model.table.items() if op.base not in lacking]
    if asked and not shown.intersection(names):
        raise Error(f"llama.cpp has no {', '.join(asked)}: " + "; ".join(
            f"{k} is {v}" for k, v in lacking.items() if any(model.table[n][0].base == k for n in shown)))
    return names, shown


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare every tensor of a prompt with llama.cpp's: the table and the verdict as plain data.

    tolerance: NMSE allowed (see default_tolerance). only: patterns of names. inject: each op is given llama.cpp's
    inputs. flash, repack: llama.cpp's other ways to compute. record: write llama.cpp's tensors to an .npz; against:
    read them from one. actions: done to both. n_predict: also go on greedily, and compare the tokens. Raises Error.
    """
    model = open_model(model, threads)
    tolerance = default_tolerance(model, inject, flash) if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf:
        raise Error(f"tolerance {tolerance}: it must be 0 or more")
    if record is not None and against is not None:
        raise Error("a recording is either made (record) or compared with (against)")
    if record is not None and Path(record).suffix != ".npz":
        raise Error(f"{record}: recordings are .npz files")
    if record is not None:
        check_target(record, inputs=files_in(list(actions)))
    text = prompt if isinstance(prompt, str) else None
    ids, actions = model.ids(prompt), tinymia.listed(actions)
    if not 0 < len(ids) + n_predict <= model.config.n_ctx:
        raise Error(f"{len(ids)} tokens and {n_predict} more: the context has room for {model.config.n_ctx}")
    how = {"flash": flash, "repack": repack, "actions": [repr(action) for action in actions]}
    given = None if against is None else read_recording(against, model, ids, how, n_predict)
    names, shown = selection(model, only, flash)
    lacking = {k: v for k, v in {**FUSED, **(FLASH if flash else {})}.items()
               if any(name.startswith(f"{k}-") for name in shown)}
    if given is not None and against is not None:
        shown = check_recorded(against, given[0], names, shown, bool(only), inject)
        names = [name for name in names if name in given[0]]
    edits = Edits(actions, model, len(ids))
    lost = sorted(set(edits.by_name) - set(names))
    if lost:
        base = model.table[lost[0]][0].base
        raise Error(f"{lost[0]} cannot be changed in llama.cpp: it is {(FUSED | FLASH)[base]}")
    # Only a name that is watched has its ops materialised: without kq and its like asked for, our fused attention runs.
    wanted = set(names) if inject else (set(names) & shown) | {"result_output"}
    watched = [n for n in names if n in wanted and (n in shown or model.table[n][0].base not in FLASH)]

    def run(recorder: Recorder | None) -> tuple[Compared, Outcome]:
        on_pair = None if recorder is None else recorder.add
        if given is not None:
            others = Others(iter(given[0].values()), model)
            return compare(model, ids, others, watched, shown, actions, inject, on_pair, progress), given[1]
        feed = Feed(lambda put: compute(
            model, ids, text, set(watched) | edits.by_name.keys(), edits, put,
            threads=model.threads, flash=flash, repack=repack, n=n_predict))
        try:
            found = compare(model, ids, Others(iter(feed), model), watched, shown, actions, inject, on_pair, progress)
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
    out: dict[str, Any] = {
        "tinymia": tinymia.__version__, "llama_cpp": outcome.version, "model": str(model.path), "prompt": text,
        "tokens": ids, "tokens_equal": outcome.tokens is None or outcome.tokens == ids, "tolerance": tolerance,
        "inject": inject, **how, "rows": [row | {"over": not row["nmse"] <= tolerance} for row in found.rows],
        "lacking": lacking, "absent": outcome.absent, "unknown": dict(outcome.unknown), "steps": dict(outcome.steps),
    }
    if found.ours is not None and found.theirs is not None:
        out |= divergence(found.ours, found.theirs)
    if n_predict:
        ours = model.generate(ids, n_predict, actions).tokens
        out["output"] = {"ours": ours, "theirs": outcome.output, "equal": ours == outcome.output}
    if record is not None:
        out["recorded"] = str(record)
    return judge(out)


def judge(out: dict[str, Any]) -> dict[str, Any]:
    """The verdict from the rows."""
    rows, faults = out["rows"], []
    over, same = [r for r in rows if r["over"]], sum(r["identical"] for r in rows)
    out["first"] = over[0]["name"] if over else None
    out["first_not_identical"] = next((r["name"] for r in rows if not r["identical"]), None)
    out["identical"], worst = same, max(rows, key=lambda r: r["nmse"], default=None)
    out["worst"] = worst and {"name": worst["name"], "nmse": worst["nmse"]}
    if not out["tokens_equal"]:
        faults.append("llama.cpp cuts the prompt into other tokens")
    if over:
        first = over[0]
        faults.append(f"{len(over)} of {len(rows)} tensors are further apart than {out['tolerance']:g}, first "
                      f"{first['name']} ({first['nmse']:.2g})")
    if out["absent"]:
        faults.append(f"llama.cpp has no {short(', '.join(out['absent']))}")
    if not out.get("output", {}).get("equal", True):
        faults.append("the greedy continuations differ")
    alike = f"{same} of {len(rows)} tensors bit-identical"
    if worst and not worst["identical"]:
        alike += f", the worst is {worst['name']} (NMSE {worst['nmse']:.2g})"
    out["ok"] = not faults
    out["verdict"] = f"DIFFERENT: {'; '.join(faults)}; {alike}" if faults else f"equal: {alike}"
    return out


# ---------------------------------------------------------------------------------------- verify --self


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
    """Both numerics against float64 on dequantised weights: how far each tensor is from the model's own function.

    tolerance (1e-6) holds for numerics f32, which claims to be that function. With inject, each op is given the
    reference's inputs, and its error is its own.
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
        ours, theirs = found.ours, found.theirs
        assert ours is not None and theirs is not None      # logits are in every selection
        out[numerics] = divergence(ours, theirs) | {"worst": max(row["nmse"] for row in found.rows)}
    out |= {"tokens": ids, "prompt": prompt if isinstance(prompt, str) else None}
    out["rows"] = [row | {"over": not row["f32"]["nmse"] <= tolerance} for row in rows.values()]
    over = [row for row in out["rows"] if row["over"]]
    out["first"], out["ok"] = over[0]["name"] if over else None, not over
    kl, greedy = out["ggml"]["kl"], out["ggml"]["greedy"]
    what = (f"DIFFERENT: f32 is further than {tolerance:g} from float64, first at {over[0]['name']} "
            f"({over[0]['f32']['nmse']:.2g})" if over else
            f"equal: f32 is the model's own function (worst NMSE {out['f32']['worst']:.2g})")
    out["verdict"] = (f"{what}; ggml's rounding of activations moves the logits by KL {kl['mean']:.2g} nats a token, "
                      f"and the best token at {greedy['of'] - greedy['equal']} of {greedy['of']} positions")
    return out


def reference(path: Path, ids: Sequence[int], wanted: set[str], put: Callable[[Item], None]) -> None:
    """The float64 pass, for a Feed."""
    Reference(path).forward(ids, lambda name, x: put(Item(name, name, x)) if name in wanted else None)


# ---------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    about = ("Compare every tensor with llama.cpp's, computed in the same process. Exit status: 0 equal, 1 different, "
             "2 for an error. docs/verify.md explains the numbers.")
    p = Parser("tinymia verify", description=about, allow_abbrev=False)
    p.set_defaults(specs=[], no_bos=False)
    p.add_argument("-m", "--model", type=Input, metavar="FILE",
                   help=f"GGUF file (default: {DEFAULT}, which is bundled)")
    p.add_argument("-p", "--prompt", metavar="TEXT")
    p.add_argument("-f", "--file", type=Input, metavar="FILE",
                   help="read the prompt from a file (its last line end is dropped)")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="of both; default: the physical cores")
    p.add_argument("--tolerance", type=float, metavar="NMSE",
                   help="default: 1e-6 for float weights, 1e-4 for quantised; with --inject 1e-10 and 1e-6; more with "
                   "--flash")
    p.add_argument("--only", action="append", default=[], metavar="NAME",
                   help="these tensors only (more than once)")
    p.add_argument("--inject", action="store_true", help="give each op llama.cpp's inputs: errors show where made")
    p.add_argument("--flash", action="store_true", help="llama.cpp by its flash attention, as it runs by default")
    p.add_argument("--repack", action="store_true", help="llama.cpp with weights laid out anew, as it runs by default")
    p.add_argument("-n", "--n-predict", type=int, default=0, metavar="N",
                   help="go on greedily by N tokens, and compare")
    p.add_argument("--record", type=Output, metavar="FILE.npz", help="write llama.cpp's tensors there as well")
    p.add_argument("--against", metavar="FILE.npz",  # never beside --record
                   help="compare with a recording; llama.cpp is not needed")
    p.add_argument("--self", action="store_true", help="compare both numerics with float64, without llama.cpp")
    p.add_argument("--json", action="store_true", help="one JSON object")
    p.add_argument("--debug", action="store_true", help="a traceback with errors")
    patch_flags(p.add_argument_group("patch both"))
    change_flags(p.add_argument_group("change both"))
    return p


class Ticker:
    """Progress on stderr: a line that renews itself on a terminal, else a line every two seconds."""

    def __init__(self, total: int):
        self.total, self.live, self.begun = total, sys.stderr.isatty(), time.perf_counter()
        self.last, self.every = self.begun, 0.1 if self.live else 2.0

    def __call__(self, name: str, done: int) -> None:
        now = time.perf_counter()
        if now - self.last >= self.every:
            self.last = now
            line = f"verify: {name}, {done} of {self.total}, {now - self.begun:.0f} s"
            print(f"\r{line:60s}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print(f"\r{'':60s}\r", end="", file=sys.stderr, flush=True)


def command(argv: Sequence[str]) -> int:
    """`tinymia verify`: 0 equal, 1 different."""
    args = parser().parse_args(argv)
    prompt = read_prompt(args)
    if prompt is None:
        raise Error("no prompt: give one with -p or -f")
    if args.n_predict < 0:
        raise Error(f"-n {args.n_predict}: it must be 0 or more")
    if args.self:
        alone = {"--flash": args.flash, "--repack": args.repack, "--record": args.record, "--against": args.against,
                 "-n": args.n_predict, "the actions": args.specs}
        for flag, given in alone.items():
            if given:
                raise Error(f"{flag} and --self do not go together: --self runs without llama.cpp")
    model = load_model(args)
    tell_unknown(model, [prompt])
    ticker = Ticker(len(model.table))
    common = {"tolerance": args.tolerance, "inject": args.inject, "progress": ticker}
    try:
        if args.self:
            out = verify_self(model, prompt, **common, **({"only": args.only} if args.only else {}))
        else:
            actions = read_actions(args, model)
            out = verify(model, prompt, only=args.only, flash=args.flash, repack=args.repack, record=args.record,
                         against=args.against, actions=actions, n_predict=args.n_predict, **common)
    finally:
        ticker.close()
    if args.json:
        print_json(dumps(out))
    else:
        print("\n".join(self_report(out) if args.self else report(out, model)))
    return 0 if out["ok"] else 1


def logits_line(out: dict[str, Any]) -> str:
    kl, greedy = out["kl"], out["greedy"]
    return (f"logits: KL divergence {kl['mean']:.2g} nats a token (at most {kl['max']:.2g}); the best token is the "
            f"same at {greedy['equal']} of {greedy['of']} positions")


def report(out: dict[str, Any], model: Model) -> list[str]:
    """The lines that people read."""
    rows = [["name", "llama.cpp", "shape", "NMSE", "max |diff|", ""]]
    for r in out["rows"]:
        marks = ["OVER"] * r["over"] + ["edited"] * r["edited"]
        far = ["=", "="] if r["identical"] else [f"{r['nmse']:.2e}", f"{r['max_abs']:.2e}"]
        rows.append([r["name"], r["theirs"], "[" + ", ".join(map(str, r["shape"])) + "]", *far, " ".join(marks)])
    lines = [table(rows), ""]
    lines += [f"not in llama.cpp: {name}, {why}" for name, why in out["lacking"].items()]
    lines += [f"not found in llama.cpp: {name}" for name in out["absent"]]
    lines += [f"unknown tensor of llama.cpp {out['llama_cpp']}: {name} (x{n})" for name, n in out["unknown"].items()]
    if out["steps"]:
        lines.append("without a name here: " + ", ".join(f"{what} x{n}" for what, n in sorted(out["steps"].items())))
    if not out["tokens_equal"]:
        lines.append("llama.cpp cuts the prompt into other tokens; the table is about ours")
    if out["first"] or out["first_not_identical"]:
        lines.append(f"first over {out['tolerance']:g}: {out['first'] or 'none'}; "
                     f"first that is not identical: {out['first_not_identical']}")
    if "kl" in out:
        lines.append(logits_line(out))
    if "output" in out:
        ours, theirs = out["output"]["ours"], out["output"]["theirs"]
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        lines.append(f"greedy: the first {same} of {max(len(ours), len(theirs))} tokens are the same: "
                     f"{model.detokenize(theirs)!r}")
    if "recorded" in out:
        lines.append(f"recorded: {out['recorded']}")
    return [*lines, out["verdict"]]


def self_report(out: dict[str, Any]) -> list[str]:
    rows = [["name", "shape", "f32 NMSE", "ggml NMSE", "ggml off by", ""]]
    for r in out["rows"]:
        rows.append([r["name"], "[" + ", ".join(map(str, r["shape"])) + "]", f"{r['f32']['nmse']:.2e}",
                     f"{r['ggml']['nmse']:.2e}", f"{math.sqrt(r['ggml']['nmse']):.3%}", "OVER" * r["over"]])
    return [table(rows), "", *(f"{n} {logits_line(out[n])}" for n in ("f32", "ggml")), out["verdict"]]
