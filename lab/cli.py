"""The command `tinymia`: all flags of mia, the post's program, and more.

Results go to stdout and end with `output: "..."`; the token table, progress and errors go to stderr. If the first word
is a command of the lab, the module of that name runs it: its command(argv) returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from functools import partial

import tinymia
from tinymia import Error, Model
from tinymia_files import check_target, dumps, note
from tinymia_models.stores import listed

from .flags.action_flags import Act, Output, change_flags, integers, patch_flags, read_actions
from .flags.arguments import load_model, model_flags, prompt_flags, read_prompt
from .flags.chat import chat_of
from .flags.parser import Parser, least
from .flags.prompt_notes import tell_unknown
from .measure.formulas import cgraph
from .pictures.drawing import need_matplotlib
from .pictures.terminal import notes, table, visible
from .runs.printer import Printer
from .runs.progress import interruptible
from .runs.streams import Stream, is_terminal, print_generated, print_json, streams

EXAMPLES = """\
the post's commands (https://grgv.xyz/blog; any Llama in GGUF will do for llama2.gguf):
  tinymia -m llama2.gguf --prompt "0 1 2 to 2 1 0, 1 2 3 to 3 2 1, 4 5 6 to" -n 5 --logit-lens kqv_out 5
  tinymia --model llama2.gguf --prompt "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --save l_out-14 ~/tmp/l_out-14
  tinymia --model llama2.gguf --prompt "France ->" --patch l_out-14 ~/tmp/l_out-14 --from-token-idx 13 --to-token-idx 2
more:
  tinymia -m llama2.gguf -p "France ->" -n 8 --add-token l_out-15 " reverse" -1 --at -1 --when all
  tinymia -m llama2.gguf -p "France ->" --ablate 14.3,14.7 --draw attention.png
  tinymia -m llama2.gguf --print-cgraph
commands, each with --help:
  tinymia lens            what each layer would say      tinymia sweep            patch every layer and position
  tinymia attend          attention patterns             tinymia ablate           every head's effect on the answer
  tinymia attribute       a logit split into its parts   tinymia task-vector      Hendel et al. 2023
  tinymia trace           the forward pass, op by op     tinymia function-vector  Todd et al. 2023
  tinymia report          all about a prompt, a page     tinymia steer            add a difference of means
  tinymia verify          every tensor, llama.cpp's too  tinymia story            a difference, followed to heads
  tinymia path            what one part tells another

NAME is exact (l_out-14), a base name (l_out: every layer), a glob (l_out-1?) or all. Positions count from 0, which is
BOS; negative ones from the end.
"""

SUBCOMMANDS: tuple[str, ...] = (
    "lens", "attend", "attribute", "trace", "report", "story", "sweep", "path", "ablate", "task-vector",
    "function-vector", "steer", "verify",
)


def parser() -> Parser:
    """Make the parser, with all flags in groups."""
    p = Parser("tinymia", description="Run a Llama from a GGUF file and look at, save or change any tensor on the way.",
               epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.set_defaults(specs=[])
    p.commands = SUBCOMMANDS

    g = p.add_argument_group("model and prompt")
    model_flags(g)
    prompt_flags(g)
    g.add_argument("--list-models", action="store_true",
                   help="every model that has a name here: bundled, and those of packages, ollama, LM Studio and the "
                        "Hugging Face cache; whether tinymia runs it, and where it is")

    g = p.add_argument_group("generation")
    g.add_argument("-n", "--n-predict", type=least(0), default=32, metavar="N", help="tokens at most (default 32)")
    g.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature; 0, the default, is greedy")
    g.add_argument("--top-k", type=least(0), default=0, metavar="K", help="draw from the K best tokens")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="... from the best that together have P")
    g.add_argument("--min-p", type=float, default=0.0, metavar="P", help="... from those P times as likely as the best")
    g.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="weaken the last 64 tokens (1: no)")
    g.add_argument("--seed", type=least(0), metavar="N", help="the same seed gives the same text")
    g.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")

    g = p.add_argument_group("look")
    act = partial(g.add_argument, action=Act)
    act("--logit-lens", "--ll", dest="lens", nargs=2, metavar=("NAME", "K"),
        help="the K best tokens for each row of each matching tensor")
    g.add_argument("--lens-score", choices=("raw", "logit", "prob"),
                   help="raw: norm weight only, as in mia (default); logit: the whole final norm; prob: its softmax")
    g.add_argument("--lens-position", type=integers, metavar="POS",
                   help="the rows that --logit-lens shows: 3 or 3,5 or -1, the last (default: all)")
    act("--log", nargs=1, metavar="NAME", help="shape, mean, rms, range and first values")
    g.add_argument("-d", "--draw", type=Output, metavar="FILE.png",
                   help="attention patterns: a row per layer, a panel per head")
    g.add_argument("--print-cgraph", action="store_true", help="every op in order: name, op, shape, inputs, weight")
    g.add_argument("--list-tensors", action="store_true", help="the weights: name, type, shape, bytes")

    g = p.add_argument_group("save and patch")
    g.add_argument("--save", action=Act, nargs=2, metavar=("NAME", "FILE"),
                   help="raw float32, as in mia; .npy and .npz keep shape, name, prompt, tokens and model")
    patch_flags(g)

    g = p.add_argument_group("change")
    change_flags(g)

    g = p.add_argument_group("output")
    g.add_argument("--json", action="store_true", help="all that would be printed, as one JSON object")
    g.add_argument("-v", "--verbose", action="store_true", help="the model's shape and the speed, on stderr")
    g.add_argument("--debug", action="store_true", help="a traceback with errors")
    g.add_argument("--version", action="version", version=f"tinymia {tinymia.__version__}")
    return p


def run(args: argparse.Namespace) -> int:
    """Do what the flags say, and return the exit status."""
    if args.list_models:
        models = listed()
        if args.json:
            print_json(dumps(models))
        else:
            print(table([list(models[0]), *(["" if v is None else v for v in m.values()] for m in models)]))
        return 0
    if args.draw and not args.draw.endswith(".png"):
        raise Error(f"--draw {args.draw}: it draws .png files")
    if args.draw:
        need_matplotlib(f"--draw {args.draw}")
    for flag, given in (("--lens-score", args.lens_score), ("--lens-position", args.lens_position)):
        if given and all(spec.flag != "lens" for spec in args.specs):
            raise Error(f"{flag} goes with --logit-lens")
    if not args.temp and (args.top_k or args.top_p != 1 or args.min_p):
        raise Error("--top-k, --top-p and --min-p choose among tokens to draw from: they need --temp above 0")
    prompt, clock = read_prompt(args), time.perf_counter()
    model = load_model(args)
    if args.verbose:
        for key, value in vars(model.config).items():
            note(f"{key:10s}  {value:.6g}" if isinstance(value, float) else f"{key:10s}  {visible(str(value))}")
        note(f"loaded in {time.perf_counter() - clock:.2f} s, {model.threads} threads")
    if prompt is not None and args.chat:
        _, prompt, _ = chat = chat_of(args, model, prompt)
        ids: list[int] | None = chat.ids
    else:
        ids = None if prompt is None else model.tokenize(prompt, False if args.no_bos else None, not args.no_special)
    printer = Printer(args, model)
    if args.print_cgraph:
        printer.out["cgraph"] = rows = cgraph(model, None if ids is None else len(ids))
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
    if ids is not None and prompt is not None:
        tell_unknown(model, [prompt])
        generate(args, model, prompt, ids, printer)
    elif not (args.print_cgraph or args.list_tensors):
        raise Error("no prompt: give one with -p or -f")
    if args.json:
        print_json(dumps(printer.out))
    return 130 if printer.out.get("stop") == "interrupted" else 0


def generate(args: argparse.Namespace, model: Model, prompt: str, ids: list[int], printer: Printer) -> None:
    """Run the prompt with its actions, and print what the model and the actions give."""
    actions = read_actions(args, model)
    if args.draw:
        check_target(args.draw)
        actions.append(tinymia.Save("kq_soft_max"))
    rows = [[i, token, model.piece(token).replace(" ", "▁")] for i, token in enumerate(ids)]
    printer.begin(len(ids))
    note(table([["index", "id", "piece"], *rows]))
    live = is_terminal(sys.stdout) and not args.json
    live = live and all(a.when == "prompt" for a in actions if isinstance(a, (tinymia.Lens, tinymia.Log)))
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        check_interrupt()
        if not live:
            return
        print_generated(text if begun else f'output: "{text}')
        begun = True

    with interruptible() as check_interrupt:
        gen = model.generate(
            ids if args.chat else prompt, args.n_predict, actions, temp=args.temp, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repeat_penalty=args.repeat_penalty, seed=args.seed, stop=args.stop,
            bos=False if args.no_bos else None, special=not args.no_special, on_text=show, on_record=printer.record,
        )
    if not args.json:
        print_generated('"' if begun else f'output: "{gen.text}"', end="\n")
    if args.draw:
        from .pictures.draw import draw

        draw(printer.patterns, args.draw, [model.piece(i) for i in ids], f"{model.path.name}: {prompt}")
    printer.out |= {"prompt": prompt, "output": gen.text, "stop": gen.stop_reason, "output_tokens": gen.tokens,
                    "tokens": [{"index": i, "id": token, "piece": piece} for i, token, piece in rows]}
    if gen.stop_reason == "eos" and not gen.text and model.template and not args.chat:
        note(f"note: the model ended the text at once, with {model.piece(gen.tokens[-1])}. It is trained for chats: "
              "--chat puts the prompt into the form that it knows")
    if gen.stop_reason == "context":
        note(f"the context is full: {model.config.n_ctx} tokens")
    if gen.stop_reason == "interrupted":
        note("interrupted")
    if args.verbose:
        first, rest = gen.seconds
        rates = len(ids) / max(first, 1e-9), max(len(gen.tokens) - 1, 0) / max(rest, 1e-9)
        note(f"prompt: {len(ids)} tokens in {first:.3f} s, {rates[0]:.1f} per second\n"
              f"generation: {len(gen.tokens)} tokens in {rest:.3f} s, {rates[1]:.1f} per second")


def module_of(command: str) -> str:
    """The name of the module that has a command."""
    room = "comparison" if command == "verify" else "commands"
    return f"tinymia_lab.{room}.{command.replace('-', '_')}"


@notes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 2 for an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with streams():
        try:
            if argv and argv[0] in SUBCOMMANDS:
                status = importlib.import_module(module_of(argv[0])).command(argv[1:])
            else:
                status = run(parser().parse_args(argv))
            sys.stdout.flush()
            return status
        except OSError as e:  # from stdout; a file that cannot be written raises Error
            if isinstance(sys.stdout, Stream):
                sys.stdout.drop()
            if isinstance(e, BrokenPipeError):  # the reader, such as `| head`, has closed the pipe
                return 0
            note(f"error: the output cannot be written: {e.strerror or e}")
            return 2
        except (Error, MemoryError) as e:
            if "--debug" in argv:
                raise
            note(f"error: {e or 'out of memory'}".replace("\n", " "))
            return 2
        except KeyboardInterrupt:
            note("interrupted")
            return 130
