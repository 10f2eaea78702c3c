"""The command line of the programs in this folder: an error is one line, and Ctrl-C is not an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tinymia_files import Error


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed between two training steps, after the checkpoint was saved."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help shows the module's docstring and whose errors are `Error`."""

    def __init__(self, module: str, doc: str | None) -> None:
        super().__init__(f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise Error for wrong flags."""
        raise Error(f"{message} ({self.prog} --help shows the flags)")


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def stop_without_torch() -> NoReturn:
    """End the program where torch cannot be imported. Exit status 2."""
    say("error: training needs torch, which tinymia itself does not: pip install 'tinymia[train]'")
    sys.exit(2)


def run(work: Callable[[argparse.Namespace], None], parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Call `work` with the flags. Return the exit status: 0, 2 after an error, 130 after an interruption."""
    try:
        work(parser.parse_args(argv))
    except (Interrupted, KeyboardInterrupt) as e:
        say(str(e) or "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe: it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Error, OSError) as e:
        say(f"error: {e}".replace("\n", " "))
        return 2
    return 0
