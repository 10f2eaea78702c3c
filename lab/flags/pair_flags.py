"""The flag --pairs, for commands that can be repeated over pairs of prompts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymia import Error, Model

from ..measure.pair_sets import names, read_pairs
from ..measure.prompt_sets import read_prompts
from .action_flags import Input
from .chat import in_chat
from .parser import Parser
from .prompt_notes import tell_unknown

COMMON = ("model", "threads", "numerics", "out", "json", "debug", "chat", "system", "pairs", "quantity", "metric",
          "kinds")    # flags that hold with and without pairs


def pair_flags(p: argparse._ActionsContainer, quantities: Sequence[str] = ()) -> None:
    """Add --pairs, and --quantity if there are several quantities and no other flag chooses one."""
    p.add_argument("--pairs", type=Input, metavar="FILE",
                   help="run over pairs of prompts, and give mean and standard error: a JSON list of objects "
                        f"with clean, corrupt, answer, against; or by name: {', '.join(names())}")
    if quantities:
        p.add_argument("--quantity", choices=tuple(quantities), default=quantities[0],
                       help=f"what is shown with --pairs; all are kept (default {quantities[0]})")


def with_pairs(argv: Sequence[str]) -> bool:
    """Return whether --pairs is among the words of a command line."""
    return any(word == "--pairs" or word.startswith("--pairs=") for word in argv)


def check_pair_flags(p: Parser, args: argparse.Namespace, options: Sequence[str]) -> None:
    """Raise Error for flags that do not go with --pairs: all but the common ones and the command's `options`."""
    wrong = [dest for dest, value in vars(args).items()
             if dest not in (*COMMON, *options) and value != p.get_default(dest)]
    wrong = ["specs"] * bool(args.specs) + wrong       # the list is its own default
    if wrong:
        flag = next((p.typed(a) for a in p._actions if a.dest == wrong[0]), None)
        raise Error(f"{flag or 'a change of the run'} does not go with --pairs: the prompts and their answers are "
                    "those of the pairs, and they run as they are")


def run_pairs(
    command: str, args: argparse.Namespace, model: Model, out: Path | None, options: Sequence[str]
) -> tuple[Any, list[Any]]:
    """Run the command over the pairs of --pairs. Returns a PairsResult and its heatmaps."""
    texts = read_pairs(args.pairs)
    tell_unknown(model, [pair[key] for pair in texts for key in ("clean", "corrupt")])
    prompts = [(in_chat(args, model, pair["clean"]), in_chat(args, model, pair["corrupt"])) for pair in texts]
    given = {name: value for name in options if (value := getattr(args, name)) is not None}
    if "prompts" in given:
        given["prompts"] = [in_chat(args, model, text) for text in read_prompts(given["prompts"])]
    elif given.get("mode") == "mean":
        given["prompts"] = [corrupt for _, corrupt in prompts]
    quantity = getattr(args, "metric", None) or getattr(args, "quantity", None)
    here = importlib.import_module("tinymia_lab.commands.over_pairs")      # late: it imports the commands
    found = here.over_pairs(model, command, texts, quantity, prompts=prompts, out=out, options=given)
    return found, here.pictures(found)
