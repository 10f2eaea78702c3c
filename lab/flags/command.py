"""The shape that all commands of the lab have: a function, its result, its text, its pictures, its flags.

    def lens(model, prompt, ..., out=None) -> Lens          the experiment, as Python calls it
    def text(found, position=-1, colour="prob") -> str      what the terminal shows of its result
    def pictures(found, colour="prob") -> list[Heatmap]     what -o FILE.png and FILE.html show
    def add_flags(p) -> None                                the flags that no other command has
    def run(args, model, out) -> Lens                       calls the function as the flags say
    command = Command("lens", "What each layer ...", add_flags, run, text, pictures, text_flags=("position", "colour"))

Help, checks, loading the model, resuming from a file of -o, saving, drawing and printing are written here, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tinymia import Model

from .arguments import PICTURES, RESULTS, emit, open_model, out_file, parser
from .pair_flags import check_pair_flags, run_pairs, with_pairs
from .parser import Parser


def nothing(found: Any) -> list[Any]:
    """No pictures: for a command that draws none."""
    return []


def well(found: Any) -> int:
    """The exit status of a command whose results are neither right nor wrong."""
    return 0


@dataclass(frozen=True)
class Command:
    """A command of the lab. A call with the words after its name runs it and returns the exit status."""

    name: str
    about: str                                                      # the first sentence of --help
    add_flags: Callable[[Parser], None]
    run: Callable[[argparse.Namespace, Model, Path | None], Any]     # a Result; out: the file that keeps it, or None
    text: Callable[..., str]
    pictures: Callable[..., Sequence[Any]] = nothing                # Heatmaps and Charts
    epilog: str = ""                                                # examples, at the end of --help
    text_flags: Sequence[str] = ()                                  # flags that `text` takes as keyword arguments
    picture_flags: Sequence[str] = ()                               # ... and that `pictures` takes
    before: Callable[[argparse.Namespace], int | None] | None = None    # checks before the model is opened; an exit
                                                                        # status ends the command there
    results: Sequence[str] = RESULTS                                # kinds of file that keep the result
    drawn: Sequence[str] = PICTURES                                 # kinds of file that show it
    writers: Mapping[str, Callable[[Any, Path], None]] = field(default_factory=dict)    # by suffix, for kinds of file
                                                                    # that show more than the pictures, or are not drawn
    with_pairs: Sequence[str] = ()                                  # flags of its own that go with --pairs
    numerics: str = "f32"                                           # default: ggml's rounding is as large as many
                                                                    # effects that the lab measures
    status: Callable[[Any], int] = well                             # the exit status for a result
    resumes: bool = True                                            # whether a kept result is continued, or made anew

    def parser(self) -> Parser:
        """Make the parser, with the flags of every command and those of this one."""
        p = parser(self.name, self.about, self.epilog, self.drawn, self.numerics, self.results, self.resumes)
        p.set_defaults(kinds=tuple(dict.fromkeys([*self.results, *self.drawn, *self.writers])))
        self.add_flags(p)
        return p

    def __call__(self, argv: Sequence[str]) -> int:
        p = self.parser()
        if "--pairs" in p.options and with_pairs(argv):
            return self.over_pairs(p, argv)
        args = p.parse_args(argv)
        status = self.before and self.before(args)
        if status is not None:
            return status
        model, out = open_model(args), out_file(args)
        return self.show(args, self.run(args, model, out), out)

    def over_pairs(self, p: Parser, argv: Sequence[str]) -> int:
        """Run the command over the pairs of --pairs, which bring the prompts; the exit status."""
        for action in p._actions:
            action.required = False
        args = p.parse_args(argv)
        check_pair_flags(p, args, self.with_pairs)
        model, out = open_model(args), out_file(args)
        found, pictures = run_pairs(self.name, args, model, out, self.with_pairs)
        return emit(args, found, str(found), pictures, kept=out)

    def show(self, args: argparse.Namespace, found: Any, out: Path | None) -> int:
        """Print the result, and write the files of -o, of which `out` is written already. Returns the exit status."""
        words, look = ({name: getattr(args, name) for name in names} for names in (self.text_flags, self.picture_flags))
        asked = {Path(path).suffix for path in args.out} & {*PICTURES} - self.writers.keys()
        emit(args, found, self.text(found, **words), self.pictures(found, **look) if asked else None,
             {suffix: partial(write, found) for suffix, write in self.writers.items()}, kept=out)
        return self.status(found)
