"""argparse, with values that may begin with a dash, and with errors that say what would be right."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tinymia import Error
from tinymia_files import check_apart, check_target, place

from .action_flags import Input, Output, Spec
from .mistakes import closest, left_over, shell_mistake

GUARD = "\0"                                        # put before a value that begins with a dash; cannot be typed
FLAG = re.compile(r"--?[A-Za-z]")                   # what looks like a flag
KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors of our own, which refuses an output that is also an input or another output.

    commands: the words that may come before the flags, for suggestions.
    """

    argv: Sequence[str] = ()
    commands: Sequence[str] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of a command line. Raises Error."""
        self.argv = sys.argv[1:] if args is None else list(args)
        found, left = self.parse_known_args(self.guarded(self.argv), namespace)
        check_outputs(vars(found))
        if left:
            self.error(left_over([w.removeprefix(GUARD) for w in left], self.argv, self.options, self.commands))
        return found

    @property
    def options(self) -> list[str]:
        """All flags, as they are typed."""
        return list(self._option_string_actions)

    def guarded(self, argv: Sequence[str]) -> list[str]:
        """The words, with a mark on values that begin with a dash, such as -> and -1,-2: argparse takes them for flags.

        A word that looks like a flag is not a value; numbers, such as -inf, are values.
        """
        rest, out = list(argv), list[str]()
        while rest:
            out.append(rest.pop(0))
            action = self._option_string_actions.get(out[-1])
            if action is None:
                continue
            room = action.nargs if isinstance(action.nargs, int) else 1 if action.nargs is None else len(rest)
            while room and rest and is_value(rest[0]):
                room -= 1
                word = rest.pop(0)
                out.append(GUARD + word if word.startswith("-") else word)
        return out

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """The value of a word, of the type of its flag. Raises Error."""
        text = arg_string.removeprefix(GUARD)
        try:
            return action.type(text) if callable(action.type) else text
        except (TypeError, ValueError):
            kind = KINDS.get(action.type) or getattr(action.type, "kind", "of the right kind")
            self.error(f"{self.typed(action)} {text or repr(text)}: it must be {kind}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            *most, last = map(str, action.choices)
            meant = closest(str(value), [*most, last])[:1]
            self.error(f"{self.typed(action)} {value}: it must be {', '.join(most)} or {last}"
                       + "".join(f"; did you mean {word}?" for word in meant))

    def typed(self, action: argparse.Action) -> str:
        """The flag as the user typed it."""
        words = {word.partition("=")[0] for word in self.argv}
        names = list(action.option_strings) or [str(action.metavar or action.dest)]
        return next((name for name in names if name in words), max(names, key=len))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version; unlike argparse, let an error of the stream be told."""
        print(message, end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        """Raise Error with a message of argparse, in clearer words, or with our own."""
        shell = shell_mistake(self.argv)
        text = shell if shell and ("required" in message or "expected" in message) else self._in_our_words(message)
        raise Error(f"{text} ({self.prog} --help shows the flags)")

    def _in_our_words(self, message: str) -> str:
        needed = re.match(r"the following arguments are required: (.*)", message)
        if needed:
            flags = [self._option_string_actions[name.split("/")[-1]] for name in needed[1].split(", ")]
            return f"it needs {' and '.join(self.usage_of(action) for action in flags)}"
        part = re.match(r"argument ([^:]*): (expected|ignored) ", message)
        action = part and self._option_string_actions.get(part[1].split("/")[-1])
        if not part or not action:
            return message
        flag = self.typed(action)
        if part[2] == "ignored":
            return f"{flag} takes no value"
        after = list(self.argv)[list(self.argv).index(flag) + 1 :] if flag in self.argv else []
        dashed = next((word for word in after if word.startswith("-")), None)
        hint = ""
        if dashed is not None and action.nargs is None:
            hint = f"; a value that begins with - is written {flag}={dashed}"
        elif dashed is not None:
            hint = f"; {dashed!r} looks like a flag: a file is written ./{dashed}, a token by its id, #123"
        count = {None: "a value", 1: "a value", "+": "values"}.get(action.nargs, f"{action.nargs} values")
        return f"{flag} needs {count}: {self.usage_of(action)}{hint}"

    def usage_of(self, action: argparse.Action) -> str:
        """A flag and its values, such as --logit-lens NAME K."""
        metavar = action.metavar or action.dest.upper()
        names = [metavar] if isinstance(metavar, str) else [f"[{m}]" if action.nargs == "+" and i else m
                                                           for i, m in enumerate(metavar)]
        return " ".join([max(action.option_strings, key=len), *names])


def least(n: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number, n or more."""
    def read(text: str) -> int:
        if (number := int(text)) < n:
            raise ValueError
        return number

    read.kind = f"a whole number, {n} or more"  # type: ignore[attr-defined]
    return read


def check_outputs(given: Mapping[str, Any]) -> None:
    """Raise Error for an output that is also read, or written twice; several --save may share a file."""
    def of(kind: type[str], value: Any) -> list[str]:
        if isinstance(value, (list, tuple)):
            return [path for one in value for path in of(kind, one)]
        return of(kind, value.args) if isinstance(value, Spec) else [value] if isinstance(value, kind) else []

    saved = of(Output, given.get("specs", []))
    written = [path for name, value in given.items() if name != "specs" for path in of(Output, value)]
    for path in [*written, *saved]:
        check_target(path, inputs=of(Input, list(given.values())))
    check_apart([*written, *{place(path): path for path in saved}.values()])


def is_value(word: str) -> bool:
    """Return whether a word after a flag is its value, not the next flag."""
    if not FLAG.match(word):
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True     # -inf, -nan
