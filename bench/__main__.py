"""tinymia beside llama.cpp, pair by pair: `python -m bench -m MODEL.gguf --threads 1,2 --out results/today`.

bench/README.md explains each row. Exit status: 0; 1 if a part could not be measured; 2 if nothing could; 130 after
Ctrl-C. Whatever was measured is printed in every case.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymia import Error
from tinymia_files import check_target
from tinymia_kernels import physical_cores
from tinymia_models import DEFAULT, bundled

from . import machine, report, theirs
from .measure import PARTS, QUICK, SMALL, Case, Row, Sizes, context, measure
from .ours import Ours


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    p = argparse.ArgumentParser("python -m bench", description="tinymia's speed and memory beside llama.cpp's")
    p.add_argument("-m", "--model", action="append", default=[], metavar="FILE",
                   help="GGUF; repeatable (the bundled one)")
    p.add_argument("-t", "--threads", metavar="N,...", help="numbers of threads (1 and all cores)")
    p.add_argument("--only", metavar="PART,...", help=f"parts: {', '.join(PARTS)} (all)")
    p.add_argument("--repeats", type=int, metavar="N", help="pairs per measurement (7)")
    p.add_argument("--out", metavar="PREFIX", help="write PREFIX.md, PREFIX.json and PREFIX.png")
    p.add_argument("--quick", action="store_true", help="every part, but short: only a test that it runs")
    return p


class Bench:
    """One run of the benchmark: its settings and its rows."""

    def __init__(self, args: argparse.Namespace, command: str):
        self.sizes = QUICK if args.quick else Sizes()
        self.repeats = args.repeats or (2 if args.quick else 7)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed = False
        self.program: Path | None = None
        self.about: dict[str, Any] = machine.about(command)
        self.threads = self.read_threads(args.threads)
        self.only = self.read_only(args.only)
        self.models = [Path(m) for m in args.model]
        if not self.models or ("small" in self.only and not any(map(is_small, self.models))):
            self.models.append(bundled()[DEFAULT])
        self.bandwidth = machine.Bandwidth((64 if args.quick else 512) << 20)
        self.about["bandwidth"] = {n: self.bandwidth(n, 10) for n in self.threads}

    def note(self, text: str) -> None:
        """Add a note for the reader of the table, and print it, once."""
        if text not in self.notes:
            self.notes.append(text)
            say(text)

    def fail(self, text: str) -> None:
        """Add a note about something that is missing in the table; the exit status is then not 0."""
        self.failed = True
        self.note(text)

    def read_threads(self, text: str | None) -> list[int]:
        """The numbers of threads of --threads, without wrong ones, which are noted."""
        if text is None:
            return sorted({1, physical_cores()})
        good = []
        for part in text.split(","):
            if part.strip().isdecimal() and 1 <= int(part) <= machine.cpus():
                good.append(int(part))
            else:
                self.fail(f"--threads {part.strip() or '(nothing)'}: it must be 1 to {machine.cpus()}, the CPUs here")
        return list(dict.fromkeys(good))

    def read_only(self, text: str | None) -> list[str]:
        """The parts of --only, in order, without unknown ones, which are noted."""
        names = list(PARTS) if text is None else [part.strip() for part in text.split(",")]
        for name in names:
            if name not in PARTS:
                self.fail(f"--only {name or '(nothing)'}: the parts are {', '.join(PARTS)}")
        return [name for name in PARTS if name in names]

    def find_llama_cpp(self, folder: Path) -> bool:
        """Look for llama.cpp, and compile first_token.c if a part needs it. Returns whether llama.cpp was found."""
        try:
            self.about |= theirs.about()
        except Error as e:
            self.fail(str(e))
            return False
        if {"start", "memory", "long"} & set(self.only):
            try:
                self.program = theirs.compile_program(folder)
            except Error as e:
                self.fail(str(e))
        return True

    def run(self) -> None:
        """Measure every model with every number of threads."""
        with tempfile.TemporaryDirectory() as folder:
            compare = self.find_llama_cpp(Path(folder))
            for path in self.models:
                for n in self.threads:
                    try:
                        self.run_case(path, n, compare)
                    except (Error, MemoryError, OSError) as e:
                        self.fail(f"{path}: not measured: {e or 'out of memory'}")
                        break

    def run_case(self, path: Path, threads: int, compare: bool) -> None:
        """Measure one model with one number of threads, beside llama.cpp if `compare`. Raises Error."""
        small = path.exists() and is_small(path)
        only = [name for name in self.only if name != ("decode" if small else "small")]
        if threads != self.threads[-1]:  # compiling takes equally long for any number of threads
            only = [name for name in only if name != "first"]
        if not only:
            return
        if path.exists():
            machine.need(path.stat().st_size, str(path))
        ours, other = Ours(path, threads), None
        try:
            if compare:
                other = self.open_theirs(path, threads, ours.model.config.n_ctx)
            case = Case(path, threads, ours, other, other and self.program, self.bandwidth, self.sizes, self.repeats,
                        self.note)
            for row in measure(case, only, self.fail):
                self.rows.append(row)
                say(report.line(row))
        finally:
            if other is not None:
                other.close()

    def open_theirs(self, path: Path, threads: int, n_ctx: int) -> theirs.Theirs | None:
        """Load the model in llama.cpp; None, with a note, if that is not possible."""
        try:
            machine.need(2 * path.stat().st_size, f"{path}: llama.cpp, which keeps a second copy of the weights,")
            return theirs.Theirs(path, threads, context(self.sizes, n_ctx))
        except Error as e:
            self.fail(str(e))
            return None


def is_small(path: Path) -> bool:
    """Return whether a model file is so small that the Python code around each operation dominates its speed."""
    return path.is_file() and path.stat().st_size < SMALL


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        say(f"error: --repeats {args.repeats}: it must be 1 or more")
        return 2
    try:
        if args.out:
            for suffix in report.SUFFIXES:
                check_target(args.out + suffix, [])
    except Error as e:
        say(f"error: {e}")
        return 2
    bench, interrupted = Bench(args, shlex.join(["python", "-m", "bench", *argv])), False
    if not bench.threads or not bench.only:
        return 2
    try:
        bench.run()
    except KeyboardInterrupt:
        interrupted = True
        bench.note("interrupted: not everything that was asked for is here")
    print(report.markdown(bench.about, bench.rows, bench.notes))
    if args.out:
        try:
            report.write(args.out, bench.about, bench.rows, bench.notes)
        except Error as e:
            bench.fail(f"error: {e}")
    return 130 if interrupted else 2 if not bench.rows else int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
