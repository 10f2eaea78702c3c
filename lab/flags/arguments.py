"""The command line that the lab's commands share: model, prompt, threads, --json, and -o for the result.

    p = parser("lens", "What each layer would say.")        # -m -t --numerics -o --json --debug
    prompt_flags(p)                                         # -p -f --no-bos --no-special
    args = p.parse_args(argv)
    model = open_model(args)
    result = lens(model, prompt_ids(args, model))
    return emit(args, result, text, heatmap)

command.py puts these together, once for all commands.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tinymia
from tinymia import Error, Model
from tinymia_files import check_target, note, read_text
from tinymia_models import DEFAULT

from ..measure.selection import chosen as chosen
from ..pictures.drawing import need_matplotlib
from ..pictures.heatmap import Heatmap
from ..pictures.heatmap_png import draw_png
from ..pictures.page import page, write_page
from ..pictures.terminal import visible
from ..runs.result import Result, dumps
from ..runs.streams import print_json
from .action_flags import Input, Output
from .chat import chat_flags, chat_of, check_chat
from .mistakes import find_model
from .parser import Parser, least
from .prompt_notes import tell_of_prompt, tell_unknown

RESULTS, PICTURES = (".npz", ".json"), (".png", ".html")    # what -o takes
Writer = Callable[[Path], None]


def model_flags(g: argparse._ActionsContainer, numerics: str = "ggml") -> None:
    """Add -m, -t and --numerics, whose default is `numerics`."""
    g.add_argument("-m", "--model", type=Input, metavar="FILE",
                   help=f"GGUF file, or a name: {DEFAULT} (bundled, the default), smollm2, ollama:NAME, lmstudio:NAME, "
                        "hf:NAME (--list-models shows all)")
    g.add_argument("-t", "--threads", type=least(1), metavar="N", help="default: the physical cores")
    g.add_argument("--numerics", choices=("ggml", "f32"), default=numerics,
                   help="ggml: activations quantised as llama.cpp does; f32: float32 throughout; "
                        f"default: {numerics}")


def prompt_flags(g: argparse._ActionsContainer) -> None:
    """Add -p, -e, -f, --keep-line-end, --no-bos, --no-special, --chat and --system."""
    g.add_argument("-p", "--prompt", metavar="TEXT")
    escape_flag(g, "-p")
    g.add_argument("-f", "--file", type=Input, metavar="FILE",
                   help="read the prompt from a file (its last line end is dropped)")
    g.add_argument("--keep-line-end", action="store_true", help="with -f: keep the last line end")
    g.add_argument("--no-bos", action="store_true", help="no BOS token before the prompt")
    g.add_argument("--no-special", action="store_true", help="take <s> and the like in the prompt as plain text")
    chat_flags(g)


def escape_flag(g: argparse._ActionsContainer, flags: str) -> None:
    """Add -e, for the texts of some flags."""
    g.add_argument("-e", "--escapes", action="store_true",
                   help=rf"in {flags}, \n is a line end, \t a tab, \\ a backslash")


def parser(
    command: str, description: str, epilog: str = "", pictures: Sequence[str] = PICTURES, numerics: str = "f32",
    results: Sequence[str] = RESULTS, resumes: bool = True,
) -> Parser:
    """Make the parser of a command, with the flags that every command of the lab has.

    pictures: suffixes of the files that the command draws; results: suffixes of those that keep its result,
    from which a stopped run continues if it `resumes`.
    """
    p = Parser(f"tinymia {command}", description=description, epilog=epilog, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(specs=[], kinds=(*results, *pictures))
    model_flags(p, numerics)
    kept = [f"{' or '.join(results)} keeps the result" + ", and long work goes on from there" * resumes] * bool(results)
    drawn = [f"{', '.join(pictures)} the picture"] * bool(pictures)
    p.add_argument("-o", "--out", action="append", type=Output, default=[], metavar="FILE",
                   help=f"{'; '.join(kept + drawn)}; more than once")
    p.add_argument("--json", action="store_true", help="the result as one JSON object")
    p.add_argument("--debug", action="store_true", help="a traceback with errors")
    return p


def check_file(flag: str, path: str, kinds: Sequence[str]) -> None:
    """Raise Error now for a file of `flag` that could not be written after a long run."""
    if Path(path).suffix not in kinds:
        raise Error(f"{flag} {path}: the kinds of file are {', '.join(kinds)}")
    check_target(path)
    if path.endswith(".png"):
        need_matplotlib(f"{flag} {path}")


def out_file(args: argparse.Namespace) -> Path | None:
    """The file of -o that keeps the result, and from which a stopped run continues; None if there is none."""
    return next((Path(path) for path in args.out if Path(path).suffix in RESULTS), None)


def open_model(args: argparse.Namespace) -> Model:
    """Load the model of -m, after a check that the files of -o can be written. Raises Error."""
    for path in args.out:
        check_file("-o", path, args.kinds)
    return load_model(args)


def load_model(args: argparse.Namespace) -> Model:
    """Load the model of -m; without -m the bundled one, with a line on stderr that says so. Raises Error."""
    path = find_model(args.model)
    if path is None:
        note(f"no -m: the bundled model {DEFAULT} runs")
    return tinymia.load(path, args.threads, args.numerics)


def read_prompt(args: argparse.Namespace) -> str | None:
    """The text of -p or -f; None without either. Raises Error for flags that do not go together."""
    check_chat(args)
    if args.escapes and args.prompt is None:
        raise Error("-e goes with -p: a file has its line ends already")
    if args.keep_line_end and args.file is None:
        raise Error("--keep-line-end goes with -f")
    prompt = args.prompt
    if args.file is None and prompt is not None and sys.getfilesystemencoding() != "utf-8":
        prompt = os.fsencode(prompt).decode("utf-8", "surrogateescape")     # a C locale without Python's UTF-8 mode
    if args.file is None:
        return None if prompt is None else typed(args, prompt)
    if args.prompt is not None:
        raise Error("-p and -f: one prompt at a time")
    text = read_text(args.file, "the prompt")
    if args.keep_line_end:
        return text
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def typed(args: argparse.Namespace, text: str) -> str:
    """A prompt from the command line: with -e, its escapes are read; else notes tell what it holds. Raises Error."""
    if args.escapes:
        return unescape(text)
    tell_of_prompt(text)
    return text


def unescape(text: str) -> str:
    r"""Replace \n by a line end, \t by a tab and \\ by a backslash. Raises Error for another escape."""
    wrong = re.search(r"\\[^nt\\]|(?<!\\)(?:\\\\)*\\$", text)
    if wrong:
        raise Error(f"-e: {wrong[0]!r} is not an escape: there are \\n, \\t and \\\\")
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)


def prompt_ids(args: argparse.Namespace, model: Model, others: Sequence[str] = ()) -> str | list[int]:
    """The prompt of a command that needs one: its text, or ids if --chat, --no-bos or --no-special is given.

    A note names words of it, and of the command's other prompts, that the bundled model does not know. Raises Error.
    """
    prompt = read_prompt(args)
    if prompt is None:
        raise Error("no prompt: give one with -p or -f")
    tell_unknown(model, [prompt, *others])
    if args.chat:
        return chat_of(args, model, prompt).ids
    if args.no_bos or args.no_special:
        return model.tokenize(prompt, False if args.no_bos else None, not args.no_special)
    return prompt


def caption(about: Mapping[str, Any], pictures: Sequence[Heatmap]) -> list[str]:
    """The lines above a picture: the model, and those of the result's single prompts that no title quotes."""
    prompts = {name: visible(prompt["text"]) for name, prompt in about["prompts"].items() if isinstance(prompt, dict)}
    missing = [name for name, text in prompts.items() if not any(text in picture.title for picture in pictures)]
    return [Path(about["model"]["path"]).name, *(f"{name}: {prompts[name]}" for name in missing)]


def emit(args: argparse.Namespace, result: Result, text: str, picture: Heatmap | Sequence[Heatmap] | None = None,
         writers: Mapping[str, Writer] | None = None, kept: Path | None = None) -> int:
    """Print the text, or with --json the result, and write every file of -o. Returns the exit status, 0.

    writers: by suffix, functions that write what a heatmap cannot show. The file `kept` has the result already.
    """
    pictures = [picture] if isinstance(picture, Heatmap) else list(picture or ())
    title = " ".join(["tinymia", result.about["command"], result.about["model"]["name"]])
    above = caption(result.about, pictures)
    draw: dict[str, Writer] = {
        ".npz": result.save, ".json": result.save, ".png": lambda path: draw_png(path, pictures, above),
        ".html": lambda path: write_page(path, page(title, [p.html() for p in pictures])),
        **(writers or {}),
    }
    for path in args.out:
        if Path(path) != kept:
            draw[Path(path).suffix](Path(path))
    if args.json:
        print_json(dumps(result.to_json()))
    else:
        print(text)
    return 0
