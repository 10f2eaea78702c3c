"""`tinymia verify`: the comparison of every tensor with llama.cpp's; its flags, its result and its text.

The comparison itself is in llama_comparison.py, the one with float64 (--self) in self_comparison.py.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from tinymia import Error, Model
from tinymia_files import short
from tinymia_models import DEFAULT

from ..flags.action_flags import Input, Output, change_flags, patch_flags, read_actions
from ..flags.arguments import read_prompt
from ..flags.command import Command
from ..flags.parser import Parser
from ..flags.prompt_notes import tell_unknown
from ..pictures.terminal import table
from ..runs.result import dumps
from ..runs.streams import print_json
from .llama_comparison import verify
from .self_comparison import verify_self

__all__ = ["command", "verify", "verify_self"]


class Verified(NamedTuple):
    """A comparison: as an object for --json, and as the lines that people read."""

    out: dict[str, Any]
    lines: list[str]


class Comparison(Command):
    """The command whose result is a verdict, with an exit status of its own; nothing of it is kept or drawn by -o."""

    def parser(self) -> Parser:
        p = Parser(f"tinymia {self.name}", description=self.about, allow_abbrev=False)
        p.set_defaults(specs=[], no_bos=False, out=[], kinds=())
        self.add_flags(p)
        return p

    def show(self, args: Namespace, found: Any, out: Path | None) -> int:
        if args.json:
            print_json(dumps(found.out))
        else:
            print(self.text(found))
        return 0 if found.out["ok"] else 1


def add_flags(p: Parser) -> None:
    """The model and the prompt, what is compared with what and how closely, and actions."""
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
                   help="go on greedily by N tokens, a pass each; compare those passes and the text")
    p.add_argument("--record", type=Output, metavar="FILE.npz", help="write llama.cpp's tensors there as well")
    p.add_argument("--against", metavar="FILE.npz",  # never beside --record
                   help="compare with a recording; llama.cpp is not needed")
    p.add_argument("--self", action="store_true", help="compare both numerics with float64, without llama.cpp")
    p.add_argument("--json", action="store_true", help="one JSON object")
    p.add_argument("--debug", action="store_true", help="a traceback with errors")
    patch_flags(p.add_argument_group("patch both"))
    change_flags(p.add_argument_group("change both"))


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


def before(args: Namespace) -> None:
    """Read the prompt, and raise Error for flags that do not go together."""
    args.text = read_prompt(args)
    if args.text is None:
        raise Error("no prompt: give one with -p or -f")
    if args.n_predict < 0:
        raise Error(f"-n {args.n_predict}: it must be 0 or more")
    if args.self:
        alone = {"--flash": args.flash, "--repack": args.repack, "--record": args.record, "--against": args.against,
                 "-n": args.n_predict, "the actions": args.specs}
        for flag, given in alone.items():
            if given:
                raise Error(f"{flag} and --self do not go together: --self runs without llama.cpp")


def run(args: Namespace, model: Model, out: Path | None) -> Verified:
    """The comparison that the flags ask for."""
    tell_unknown(model, [args.text])
    ticker = Ticker(len(model.table))
    common = {"tolerance": args.tolerance, "inject": args.inject, "progress": ticker}
    try:
        if args.self:
            found = verify_self(model, args.text, **common, **({"only": args.only} if args.only else {}))
        else:
            actions = read_actions(args, model)
            found = verify(model, args.text, only=args.only, flash=args.flash, repack=args.repack, record=args.record,
                           against=args.against, actions=actions, n_predict=args.n_predict, **common)
    finally:
        ticker.close()
    return Verified(found, self_report(found) if args.self else report(found, model))


def text(found: Verified) -> str:
    """What the terminal shows."""
    return "\n".join(found.lines)


def logits_line(out: dict[str, Any]) -> str:
    kl, greedy = out["kl"], out["greedy"]
    return (f"logits: KL divergence {kl['mean']:.2g} nats per token (at most {kl['max']:.2g}); the best token is the "
            f"same at {greedy['equal']} of {greedy['of']} positions")


def report(out: dict[str, Any], model: Model) -> list[str]:
    """The lines that people read."""
    rows = [["name", "llama.cpp", "shape", "NMSE", "max |diff|", ""]]
    for r in out["rows"]:
        marks = ["OVER"] * r["over"] + ["edited"] * r["edited"]
        far = ["=", "="] if r["identical"] else [f"{r['nmse']:.2e}", f"{r['max_abs']:.2e}"]
        rows.append([r["name"], r["theirs"], "[" + ", ".join(map(str, r["shape"])) + "]", *far, " ".join(marks)])
    lines = [table(rows), ""]
    if out["decoding"]:
        lines += [*decoding_lines(out), ""]
    text = f"{short(out['prompt'])}, " if out["prompt"] is not None else ""
    n, threads = len(out["tokens"]), out["threads"]
    lines.append(f"compared: {text}{n} token{'s' * (n > 1)}, {out['passes']} pass{'es' * (out['passes'] > 1)}, "
                 f"{threads} thread{'s' * (threads > 1)} each, llama-cpp-python {out['llama_cpp']}")
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
        ours, theirs, same = (out["output"][key] for key in ("ours", "theirs", "same"))
        lines.append(f"greedy: the first {same} of {max(len(ours), len(theirs))} tokens are the same: "
                     f"{model.detokenize(theirs)!r}")
        parts = out["output"]["parts"]
        if parts:
            lines.append(f"llama.cpp goes on with {model.detokenize(theirs[same:])!r}, we with "
                         f"{model.detokenize(ours[same:])!r}")
        if parts and "ours" in parts:
            here, there = model.piece(parts["ours"]), model.piece(parts["theirs"])
            lines.append(f"token {same + 1}: the logit of {there!r} leads by {parts['margin_theirs']:.3g} there, "
                         f"that of {here!r} by {parts['margin_ours']:.3g} here")
    if "recorded" in out:
        lines.append(f"recorded: {out['recorded']}")
    return [*lines, out["verdict"]]


def decoding_lines(out: dict[str, Any]) -> list[str]:
    """A line for each tensor that was not the same in every pass of decoding."""
    differ = [r for r in out["decoding"] if r["identical"] < r["passes"]]
    lines = [f"decoding, {out['passes'] - 1} passes of a token: {out['identical_decoding']} of {out['of_decoding']} "
             "tensors bit-identical"]
    if differ:
        rows = [["name", "identical", "worst NMSE", "max |diff|", "in pass", ""]]
        rows += [[r["name"], f"{r['identical']} of {r['passes']}", f"{r['nmse']:.2e}", f"{r['max_abs']:.2e}",
                  str(r["worst_pass"]), "OVER" * r["over"]] for r in differ]
        lines.append(table(rows))
    return lines


def self_report(out: dict[str, Any]) -> list[str]:
    rows = [["name", "shape", "f32 NMSE", "ggml NMSE", "ggml off by", ""]]
    for r in out["rows"]:
        rows.append([r["name"], "[" + ", ".join(map(str, r["shape"])) + "]", f"{r['f32']['nmse']:.2e}",
                     f"{r['ggml']['nmse']:.2e}", f"{math.sqrt(r['ggml']['nmse']):.3%}", "OVER" * r["over"]])
    return [table(rows), "", *(f"{n} {logits_line(out[n])}" for n in ("f32", "ggml")), out["verdict"]]


command = Comparison(
    "verify", "Compare every tensor with llama.cpp's, computed in the same process. Exit status: 0 equal, 1 different, "
    "2 for an error. docs/verify.md explains the numbers.", add_flags, run, text, before=before)
