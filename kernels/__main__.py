"""How a format's products are put together: `python -m tinymia_kernels Q4_K`. Without a name: the table of formats."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from . import EXPANDED, FORMATS, Format
from .machine.cpu import CHOSEN_DOT4
from .machine.template import part

FOLDER = Path(__file__).resolve().parent


def table() -> str:
    """The block formats as a Markdown table, as docs/formats.md has it."""
    heads = "format", "bits per weight", "weights per block", "bytes per block", "activations", "weight"
    rows = [heads, ("---",) * len(heads)]
    for fmt in sorted(FORMATS.values(), key=lambda fmt: fmt.type):
        formula = inspect.cleandoc(fmt.made_of.__doc__).splitlines()[0].partition(": ")[2].rstrip(".")
        numbers = f"{fmt.bits_per_weight:g}", str(fmt.block_size), str(fmt.type_size)
        rows.append((fmt.name, *numbers, fmt.activation, formula))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def place(function: Any) -> str:
    """The file and line of a function, from the package's folder."""
    code = function.__code__
    return f"{Path(code.co_filename).resolve().relative_to(FOLDER).as_posix()}:{code.co_firstlineno}"


def called(function: Any) -> list[tuple[str, Any]]:
    """The compiled functions of this package that a function uses by their global names, as (name, function)."""
    found = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    compiled = ((name, getattr(value, "py_func", None)) for name, value in found)
    return [(name, f) for name, f in compiled if f and Path(f.__code__.co_filename).resolve().is_relative_to(FOLDER)]


class Tree:
    """The parts of a format's kernels as a tree: each part stands below what uses it, and is shown in full once."""

    def __init__(self, fmt: Format):
        self.made_of, self.parts, self.shown = fmt.made_of, fmt.made_of.templates(), set[str]()
        self.lines: list[str] = []

    def line(self, depth: int, name: str, where: str, note: str = "") -> None:
        """Add a line: a name, indented by its depth in the tree, and the place where it is defined."""
        self.lines.append(f"{'    ' * depth + name:<44} {where}{note}")

    def part(self, name: str, depth: int = 0) -> None:
        """Add a part with its class, file and line, then the parts and functions that it uses."""
        function = self.function(name)
        if function is None:
            return
        owner = next(c.__name__ for c in self.made_of.__mro__ if name in vars(c))
        again = name in self.shown and bool(called(function) or self.uses(name))
        self.shown.add(name)
        self.line(depth, name, f"{place(function):<34} {owner}", "  (above)" if again else "")
        if not again:
            for used in self.uses(name):
                self.part(used, depth + 1)
            self.below(function, depth + 1)

    def below(self, function: Any, depth: int) -> None:
        """Add the functions that a function uses and that are the same for all formats."""
        for used, other in called(function):
            self.helper(used, other, depth)
        if "dot4" in function.__code__.co_names:
            self.line(depth, "dot4", CHOSEN_DOT4.instruction)

    def uses(self, name: str) -> list[str]:
        """The names of the parts that a part uses."""
        return [n for n in (self.parts[name].uses if name in self.parts else ()) if self.function(n)]

    def function(self, name: str) -> Any:
        """The Python function of a part; None for a number, and for a part that is written in LLVM instructions."""
        value = next((vars(c)[name] for c in self.made_of.__mro__ if name in vars(c)), None)
        return value.function if isinstance(value, part) else getattr(value, "py_func", None)

    def helper(self, name: str, function: Any, depth: int) -> None:
        """Add a function that is the same for all formats, then what it uses."""
        again = place(function) in self.shown and bool(called(function) or "dot4" in function.__code__.co_names)
        self.shown.add(place(function))
        self.line(depth, name, place(function), "  (above)" if again else "")
        if not again:
            self.below(function, depth + 1)


def describe(fmt: Format) -> str:
    """The text that `python -m tinymia_kernels FORMAT` prints: how the kernels of a format are put together."""
    made_of, tree = fmt.made_of, Tree(fmt)
    bases = " > ".join(c.__name__ for c in made_of.__mro__[1:-2])
    file, line = Path(inspect.getsourcefile(made_of) or ""), inspect.getsourcelines(made_of)[1]
    head = [
        f"{fmt.name}    class {made_of.__name__}, {file.resolve().relative_to(FOLDER).as_posix()}:{line}",
        f"    is a  {bases}",
        "",
        inspect.cleandoc(made_of.__doc__ or ""),
        "",
        f"{fmt.block_size} weights in {fmt.type_size} bytes; activations as {fmt.activation}"
        + (f"; from {fmt.many_from} tokens on: matmul_many" if fmt.many_from else ""),
    ]
    if fmt.activation.startswith("Q8"):
        head.append(f"products of bytes on this CPU: {CHOSEN_DOT4.instruction}")
    for title, kernel in (
        ("a few tokens", "matmul"),
        ("a single token", "matmul_one"),
        ("many tokens", "matmul_many"),
        ("float32 inputs", "matmul_f32"),
        ("unpacking", "unpack_rows"),
    ):
        made = getattr(fmt, kernel)
        if made is not None:
            tree.lines += ["", f"{title}:"]
            tree.part(made.py_func.__name__.removesuffix(f"_{made_of.__name__}"))
    return "\n".join([*head, *tree.lines])


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 for a name that is not the name of a format."""
    parser = argparse.ArgumentParser(prog="python -m tinymia_kernels", description=__doc__)
    parser.add_argument("format", nargs="?", help="a block format, such as Q4_K")
    name = parser.parse_args(argv).format
    known = {fmt.name: fmt for fmt in (*FORMATS.values(), EXPANDED)}
    if name is None:
        print(table())
    elif name.upper() in known:
        print(describe(known[name.upper()]))
    else:
        print(f"error: no block format is called {name!r}: it is one of {', '.join(known)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
