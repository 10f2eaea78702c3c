"""The command `tinymia`: what the post's program took, and more.

Results go to stdout and end with `output: "..."`; the token table, progress and errors go to stderr. Flags that act on
a tensor are kept in the order given, and --at, --when and the like qualify the one before them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import tinymia
from tinymia import Error, Model, Record
from tinymia_files import check_target, read_gguf
from tinymia_kernels import compiling
from tinymia_models import DEFAULT, bundled

EXAMPLES = """\
the post's commands (https://grgv.xyz/blog; any Llama in GGUF will do for llama2.gguf):
  tinymia -m llama2.gguf --prompt "0 1 2 to 2 1 0, 1 2 3 to 3 2 1, 4 5 6 to" -n 5 --logit-lens kqv_out 5
  tinymia --model llama2.gguf --prompt "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --save l_out-14 ~/tmp/l_out-14
  tinymia --model llama2.gguf --prompt "France ->" --patch l_out-14 ~/tmp/l_out-14 --from-token-idx 13 --to-token-idx 2
more:
  tinymia -m llama2.gguf -p "France ->" -n 8 --add-token l_out-15 " reverse" -1 --at -1 --when all
  tinymia -m llama2.gguf -p "France ->" --ablate 14.3,14.7 --draw attention.png
  tinymia -m llama2.gguf --print-cgraph
  tinymia verify -m llama2.gguf -p "France ->"        every tensor beside llama.cpp's; tinymia verify --help

NAME is exact (l_out-14), a base name (l_out: every layer), a glob (l_out-1?) or all. Positions count from 0, which is
BOS; negative ones from the end.
"""


@dataclass
class Spec:
    """An action as typed; it becomes a tinymia.Action when the model is known."""

    flag: str
    args: list[str]
    at: list[int] | None = None
    when: str = "prompt"
    from_idx: int | None = None
    to_idx: int | None = None


SUBCOMMANDS: tuple[str, ...] = ("verify",)  # modules of the lab whose command(argv) gives an exit status


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise Error(f"{message} ({self.prog} --help shows the flags)")


class Act(argparse.Action):
    """A flag that acts on a tensor."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        lengths = {"patch": (2, 4), "add": (2, 3)}.get(self.dest)
        if lengths and len(values) not in lengths:
            parser.error(f"{option_string} takes {lengths[0]} or {lengths[1]} values, not {len(values)}")
        namespace.specs.append(Spec(self.dest, values if isinstance(values, list) else [values]))


class Qualify(argparse.Action):
    """A flag that says more of the action before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not namespace.specs:
            parser.error(f"{option_string} qualifies the action before it, and none was given")
        setattr(namespace.specs[-1], self.dest, values)


def integers(text: str) -> list[int]:
    """3 or 3,5 or -1."""
    return [int(part) for part in text.split(",")]


integers.__name__ = "position"  # argparse names it in its messages


def patch_flags(g: Any) -> None:
    """The flags that patch, for this command and for the lab's."""
    act, qualify = partial(g.add_argument, action=Act), partial(g.add_argument, action=Qualify)
    act("--patch", nargs="+", metavar=("NAME FILE", "FROM TO"),
        help="put row FROM of a saved tensor in place of row TO; without them, all of it")
    act("--patch-avg", dest="patch_avg", nargs=5, metavar=("NAME", "FILE1", "FILE2", "FROM", "TO"),
        help="the mean of two saved rows")
    qualify("--from-token-idx", dest="from_idx", type=int, metavar="I",
            help="FROM of the patch before, or the row of the --add before")
    qualify("--to-token-idx", dest="to_idx", type=int, metavar="J", help="TO of the patch before")


def change_flags(g: Any) -> None:
    """The flags that change a tensor by itself, for this command and for the lab's."""
    act, qualify = partial(g.add_argument, action=Act), partial(g.add_argument, action=Qualify)
    act("-a", "--ablate", nargs=1, metavar="HEADS",
        help="heads to silence: 3,9 (layer * n_head + head) or 1.4,2.0 (layer.head)")
    g.add_argument("--ablate-mode", choices=("zero", "mean"),
                   help="by zeros (default) or by the head's mean over the prompt's positions")
    act("-s", "--select", nargs=2, metavar=("LAYER", "HEAD"), help="silence the layer's other heads")
    act("--add", nargs="+", metavar=("NAME FILE", "COEF"), help="add COEF (1) times a saved vector")
    act("--add-token", dest="add_token", nargs=3, metavar=("NAME", "TOKEN", "COEF"),
        help="add COEF times a token's embedding; TOKEN is a piece (' reverse') or #id")
    act("--project-out-token", dest="project_out_token", nargs=2, metavar=("NAME", "TOKEN"),
        help="remove the direction of a token's embedding")
    act("--scale", nargs=2, metavar=("NAME", "FACTOR"), help="multiply by FACTOR")
    qualify("--at", type=integers, metavar="POS", help="positions of the change before: 3 or 3,5 or -1 (default: all)")
    qualify("--when", choices=("prompt", "decode", "all"),
            help="passes of the action before: over the prompt (default), over generated tokens, or all")


def parser() -> Parser:
    """All flags, in groups."""
    p = Parser("tinymia", description="Run a Llama from a GGUF file and look at, save or change any tensor on the way.",
               epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.set_defaults(specs=[])

    g = p.add_argument_group("model and prompt")
    g.add_argument("-m", "--model", metavar="FILE", help=f"GGUF file (default: {DEFAULT}, which is bundled)")
    g.add_argument("--list-models", action="store_true", help="the bundled models: name, bytes, what it is, path")
    g.add_argument("-p", "--prompt", metavar="TEXT")
    g.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file (its last line end is dropped)")
    g.add_argument("--no-bos", action="store_true", help="no BOS token before the prompt")
    g.add_argument("--no-special", action="store_true", help="take <s> and the like in the prompt as plain text")
    g.add_argument("-t", "--threads", type=int, metavar="N", help="default: the physical cores")
    g.add_argument("--numerics", choices=("ggml", "f32"), default="ggml",
                   help="ggml: activations quantised as llama.cpp does (default); f32: float32 throughout")

    g = p.add_argument_group("generation")
    g.add_argument("-n", "--n-predict", type=int, default=32, metavar="N", help="tokens at most (default 32)")
    g.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature; 0, the default, is greedy")
    g.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K best tokens")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="... from the best that together have P")
    g.add_argument("--min-p", type=float, default=0.0, metavar="P", help="... from those P times as likely as the best")
    g.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="weaken the last 64 tokens; 1: not")
    g.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    g.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")

    g = p.add_argument_group("look")
    act = partial(g.add_argument, action=Act)
    act("--logit-lens", "--ll", dest="lens", nargs=2, metavar=("NAME", "K"),
        help="the K best tokens for each row of each matching tensor")
    g.add_argument("--lens-score", choices=("raw", "logit", "prob"),
                   help="raw: norm weight only, as the post (default); logit: the whole final norm; prob: its softmax")
    act("--log", nargs=1, metavar="NAME", help="shape, mean, rms, range and first values")
    g.add_argument("-d", "--draw", metavar="FILE.png", help="attention patterns, a row of panels a layer")
    g.add_argument("--print-cgraph", action="store_true", help="every op in order: name, op, shape, inputs, weight")
    g.add_argument("--list-tensors", action="store_true", help="the weights: name, type, shape, bytes")

    g = p.add_argument_group("save and patch")
    g.add_argument("--save", action=Act, nargs=2, metavar=("NAME", "FILE"),
                   help="raw float32, as mia; .npy and .npz keep shape, name, prompt, tokens and model")
    patch_flags(g)

    g = p.add_argument_group("change")
    change_flags(g)

    g = p.add_argument_group("output")
    g.add_argument("--json", action="store_true", help="all that would be printed, as one JSON object")
    g.add_argument("-v", "--verbose", action="store_true", help="the model's shape and the speed, on stderr")
    g.add_argument("--debug", action="store_true", help="a traceback with errors")
    g.add_argument("--version", action="version", version=f"tinymia {tinymia.__version__}")
    return p


def number(text: str, flag: str, kind: type = int) -> Any:
    """A number out of a flag of several values."""
    try:
        return kind(text)
    except ValueError:
        raise Error(f"--{flag.replace('_', '-')}: {text!r} is no {'whole ' if kind is int else ''}number") from None


def actions_of(spec: Spec, model: Model, args: argparse.Namespace) -> list[tinymia.Action]:
    """The actions that a flag stands for."""
    flag, (name, *rest), when = spec.flag, spec.args, spec.when
    where: dict[str, Any] = {"at": spec.at, "when": when}
    if (spec.from_idx is not None or spec.to_idx is not None) and flag not in ("patch", "patch_avg", "add"):
        raise Error(f"--from-token-idx and --to-token-idx qualify --patch, --patch-avg and --add, not --{flag}")
    if spec.at is not None and flag in ("lens", "log", "save", "patch", "patch_avg"):
        raise Error(f"--at does not apply to --{flag.replace('_', '-')}{'; FROM and TO do' if 'patch' in flag else ''}")
    if flag == "lens":
        return [tinymia.Lens(name, number(rest[0], "logit-lens"), args.lens_score or "raw", when=when)]
    if flag == "log":
        return [tinymia.Log(name, when=when)]
    if flag == "save":
        return [tinymia.Save(name, rest[0], when=when)]
    if flag in ("patch", "patch_avg"):
        files, idx = (rest[:1], rest[1:]) if flag == "patch" else (rest[:2], rest[2:])
        src, to = (number(i, flag) for i in idx) if idx else (spec.from_idx, spec.to_idx)
        return [tinymia.Patch(name, tuple(files) if len(files) > 1 else files[0], src, at=to, when=when)]
    if flag in ("ablate", "select"):
        return [tinymia.Ablate(f"kqv_merged-{layer}", args.ablate_mode or "zero", heads=heads, **where)
                for layer, heads in heads_of(spec, model).items()]
    if flag == "scale":
        return [tinymia.Scale(name, number(rest[0], flag, float), **where)]
    if flag == "add":
        coef = number(rest[1], flag, float) if len(rest) > 1 else 1.0
        return [tinymia.Add(name, rest[0], coef, row=spec.from_idx, **where)]
    embedding = model.rows(model.weights.token_embd, np.array([model.tokenizer.one(rest[0])]))
    if flag == "add_token":
        return [tinymia.Add(name, embedding, number(rest[1], flag, float), **where)]
    return [tinymia.ProjectOut(name, embedding, **where)]


def heads_of(spec: Spec, model: Model) -> dict[int, list[int]]:
    """Heads to silence by layer, from `3,9`, `1.4,2.0` or, to keep, a layer and a head."""
    c, heads = model.config, {}
    if spec.flag == "select":
        pairs = [(number(spec.args[0], "select"), number(spec.args[1], "select"))]
    else:
        pairs = []
        for part in spec.args[0].split(","):
            layer, dot, head = part.partition(".")
            one = number(layer, "ablate")
            pairs.append((one, number(head, "ablate")) if dot else divmod(one, c.n_head))
    for layer, head in pairs:
        if not (0 <= layer < c.n_layer and 0 <= head < c.n_head):
            raise Error(f"--{spec.flag}: no head {layer}.{head}: the model has {c.n_layer} layers of {c.n_head} heads")
        heads.setdefault(layer, []).append(head)
    if spec.flag == "select":
        return {layer: [h for h in range(c.n_head) if h not in kept] for layer, kept in heads.items()}
    return heads


def cgraph(model: Model, n_tok: int | None) -> list[dict[str, Any]]:
    """Every op in the order of computation: name, op, shape, inputs, weight and its type."""
    sizes = {**model.config.sizes(), "n_tok": n_tok or "n_tok", "n_kv": n_tok or "n_kv"}
    rows = []
    for name, (op, il) in model.table.items():
        below = (model.config.n_layer if il is None else il) - 1
        before = f"l_out-{below}" if below >= 0 else "inp_embd"
        inputs = [before if i == "x" else i if il is None else f"{i}-{il}" for i in op.inputs]
        weight = op.weight and f"{op.weight}.weight" if il is None else op.weight and f"blk.{il}.{op.weight}.weight"
        if weight and weight not in model.weights:  # output tied to the embedding
            weight = "token_embd.weight"
        tensor = model.weights[weight] if weight else None
        rows.append({
            "name": name, "op": op.op, "shape": [sizes[d] for d in op.dims], "inputs": inputs, "weight": weight,
            "type": tensor and tensor.type_name, "weight_shape": tensor and list(tensor.shape),
        })
    return rows


def table(rows: list[list[Any]]) -> str:
    """Columns, left-aligned."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in text)


class Printer:
    """Prints what the actions found as it comes, or gathers it for --json."""

    def __init__(self, args: argparse.Namespace, model: Model):
        self.args, self.model = args, model
        self.out: dict[str, Any] = {
            "tinymia": tinymia.__version__, "model": str(model.path), "numerics": model.numerics,
            "lens": [], "log": [], "saved": [],
        }
        self.patterns: dict[int, np.ndarray] = {}

    def line(self, text: str) -> None:
        if not self.args.json:
            print(text)

    def record(self, r: Record) -> None:
        """Called for each thing that an action kept."""
        about = {"tensor": r.name, "layer": r.layer, "phase": r.phase}
        if isinstance(r.action, tinymia.Lens):
            self.line(f"Layer #{r.layer} {r.name}:" if r.layer is not None else f"{r.name}:")
            for position, best in zip(r.positions.tolist(), r.value):
                self.line(f"{position}: " + "".join(f"{piece} {score:.2g}|" for piece, score in best))
            rows = [{"position": p, "best": best} for p, best in zip(r.positions.tolist(), r.value)]
            self.out["lens"].append({**about, "rows": rows})
        elif isinstance(r.action, tinymia.Log):
            first = " ".join(f"{v:.4g}" for v in r.value["first"])
            numbers = " ".join(f"{k} {r.value[k]:.4g}" for k in ("mean", "rms", "min", "max"))
            self.line(f"{r.name} {r.value['shape']} {numbers} first {first}")
            self.out["log"].append({**about, **r.value})
        elif r.action.path is not None:
            self.out["saved"].append({**about, "file": str(r.action.path), "shape": list(r.value.shape)})
        else:
            self.patterns[r.layer] = r.value


def list_models() -> list[dict[str, Any]]:
    """The bundled models, described by the first sentence of their metadata."""
    found = []
    for name, path in bundled().items():
        about = str(read_gguf(path)[0].get("general.description", ""))
        found.append({"name": name, "bytes": path.stat().st_size, "about": about.split(". ")[0], "path": str(path)})
    return found


def read_prompt(args: argparse.Namespace) -> str | None:
    if args.file is None:
        return args.prompt
    if args.prompt is not None:
        raise Error("-p and -f: one prompt at a time")
    try:
        return Path(args.file).expanduser().read_text("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise Error(f"{args.file}: the prompt is not valid UTF-8 at byte {e.start}") from e
    except OSError as e:
        raise Error(f"{args.file}: {e.strerror or e}") from e


def run(args: argparse.Namespace) -> int:
    """What main does once the flags are read."""
    if args.list_models:
        models = list_models()
        print(json.dumps(models) if args.json else table([list(m.values()) for m in models]))
        return 0
    if args.n_predict < 0:
        raise Error(f"-n {args.n_predict}: it must be 0 or more")
    if args.draw and importlib.util.find_spec("matplotlib") is None:
        raise Error("--draw needs matplotlib: pip install tinymia[draw]")
    if args.draw and not args.draw.endswith(".png"):
        raise Error(f"--draw {args.draw}: it draws .png files")
    flags = {spec.flag for spec in args.specs}
    if args.lens_score and "lens" not in flags:
        raise Error("--lens-score goes with --logit-lens")
    if args.ablate_mode and not flags & {"ablate", "select"}:
        raise Error("--ablate-mode goes with --ablate or --select")
    if not args.temp and (args.top_k or args.top_p != 1 or args.min_p):
        raise Error("--top-k, --top-p and --min-p choose among tokens to draw from: they need --temp above 0")
    prompt, clock = read_prompt(args), time.perf_counter()
    if args.model is None:
        print(f"no -m: the bundled model {DEFAULT} runs", file=sys.stderr)
    model = tinymia.load(args.model, args.threads, args.numerics)
    if args.verbose:
        for key, value in vars(model.config).items():
            print(f"{key:10s}  {value:.6g}" if isinstance(value, float) else f"{key:10s}  {value}", file=sys.stderr)
        print(f"loaded in {time.perf_counter() - clock:.2f} s, {model.pool.n} threads", file=sys.stderr)
    ids = None if prompt is None else model.tokenize(prompt, False if args.no_bos else None, not args.no_special)
    printer = Printer(args, model)
    if args.print_cgraph:
        printer.out["cgraph"] = rows = cgraph(model, ids and len(ids))
        weight = "{weight} {type} {weight_shape}"
        printer.line(table([
            [r["name"], r["op"], "[" + ", ".join(map(str, r["shape"])) + "]", ", ".join(r["inputs"]),
             weight.format(**r) if r["weight"] else ""] for r in rows
        ]))
    if args.list_tensors:
        printer.out["tensors"] = [
            {"name": w.name, "type": w.type_name, "shape": list(w.shape), "bytes": w.nbytes}
            for w in model.weights.values()
        ]
        printer.line(table([list(w.values()) for w in printer.out["tensors"]]))
    if ids is not None:
        generate(args, model, prompt, ids, printer)
    elif not (args.print_cgraph or args.list_tensors):
        raise Error("no prompt: give one with -p or -f")
    if args.json:
        print(json.dumps(printer.out, ensure_ascii=False))
    return 130 if printer.out.get("stop") == "interrupted" else 0


def generate(args: argparse.Namespace, model: Model, prompt: str, ids: list[int], printer: Printer) -> None:
    """Run the prompt with its actions, and print what comes of it."""
    actions = [action for spec in args.specs for action in actions_of(spec, model, args)]
    if args.draw:
        check_target(args.draw, [])
        actions.append(tinymia.Save("kq_soft_max"))
    rows = [[i, token, model.piece(token).replace(" ", "▁")] for i, token in enumerate(ids)]
    print(table([["index", "id", "piece"], *rows]), file=sys.stderr, flush=True)
    live = sys.stdout.isatty() and not args.json
    live = live and all(a.when == "prompt" for a in actions if isinstance(a, (tinymia.Lens, tinymia.Log)))
    begun, interrupted = False, False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if not compiling():
            raise KeyboardInterrupt
        interrupted = True  # numba would swallow the exception: the next piece of text ends the run

    def show(text: str) -> None:
        nonlocal begun, interrupted
        if interrupted:
            interrupted = False
            raise KeyboardInterrupt
        if not live:
            return
        print(text if begun else f'output: "{text}', end="", flush=True)
        begun = True

    foremost = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = signal.signal(signal.SIGINT, interrupt) if foremost else None
    try:
        gen = model.generate(
            prompt, args.n_predict, actions, temp=args.temp, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
            repeat_penalty=args.repeat_penalty, seed=args.seed, stop=args.stop, bos=False if args.no_bos else None,
            special=not args.no_special, on_text=show, on_record=printer.record,
        )
    finally:
        if foremost:
            signal.signal(signal.SIGINT, before)
    if not args.json:
        print('"' if begun else f'output: "{gen.text}"', flush=True)
    if args.draw:
        from .draw import draw

        draw(printer.patterns, args.draw, [model.piece(i) for i in ids], f"{model.path.name}: {prompt}")
    printer.out |= {"prompt": prompt, "output": gen.text, "stop": gen.stop_reason, "output_tokens": gen.tokens,
                    "tokens": [{"index": i, "id": token, "piece": piece} for i, token, piece in rows]}
    if gen.stop_reason == "context":
        print(f"the context is full: {model.config.n_ctx} tokens", file=sys.stderr)
    if gen.stop_reason == "interrupted":
        print("interrupted", file=sys.stderr)
    if args.verbose:
        first, rest = gen.seconds
        rates = len(ids) / max(first, 1e-9), max(len(gen.tokens) - 1, 0) / max(rest, 1e-9)
        print(f"prompt: {len(ids)} tokens in {first:.3f} s, {rates[0]:.1f} a second\n"
              f"generation: {len(gen.tokens)} tokens in {rest:.3f} s, {rates[1]:.1f} a second", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 2 for an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="replace")
        if argv and argv[0] in SUBCOMMANDS:
            status = importlib.import_module(f"tinymia_lab.{argv[0]}").command(argv[1:])
        else:
            status = run(parser().parse_args(argv))
        sys.stdout.flush()
        return status
    except OSError as e:  # of stdout: files have errors of their own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush would fail again
        if isinstance(e, BrokenPipeError):  # `| head` has seen enough
            return 0
        print(f"error: the output cannot be written: {e.strerror or e}", file=sys.stderr)
        return 2
    except (Error, MemoryError) as e:
        if "--debug" in argv:
            raise
        print(f"error: {e or 'out of memory'}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
