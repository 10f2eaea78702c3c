"""The measurements: each part takes a Case, runs tinymia and llama.cpp in turn, and yields rows of the table."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tinymia import Error

from .machine import Bandwidth, Spawned, spawn
from .ours import Ours, prompt
from .theirs import Theirs

TEXT = "Once upon a time,"      # six tokens of Llama-2's vocabulary, BOS among them
SMALL = 16 << 20                # a file of fewer bytes is a small model, where the Python code around each op matters
PAUSE = 0.05                    # seconds after each run, in which its threads go to sleep


@dataclass(frozen=True)
class Sizes:
    """The lengths of the measurements, in tokens."""

    prefill: tuple[int, ...] = (128, 512)
    decode: int = 32
    small: int = 256
    after: int = 16             # length of the prompt before decoding
    keep: int = 128
    long: tuple[int, ...] = (500, 1000, 2000)


QUICK = Sizes(prefill=(32,), decode=16, small=32, keep=32, long=(40, 80))


@dataclass(frozen=True)
class Goal:
    """A number that the median of a row's ratios, or of our values, must reach."""

    on: str     # "ratio" or "ours"
    sign: str   # "≥" or "≤"
    value: float

    def met(self, x: float) -> bool:
        """Return whether a median reaches the goal."""
        return x >= self.value if self.sign == "≥" else x <= self.value


@dataclass
class Row:
    """One line of the table: our numbers and llama.cpp's, pair by pair."""

    measure: str
    model: str
    threads: int
    unit: str
    ours: list[float]
    theirs: list[float]                                     # empty if there is nothing to compare with
    goal: Goal | None = None
    bandwidth: list[float] = field(default_factory=list)    # bytes per second, measured with each pair
    bytes_read: int = 0                                     # bytes of weights read per decoded token
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> list[float]:
        """Ours divided by theirs, per pair."""
        return [a / b for a, b in zip(self.ours, self.theirs)]

    @property
    def ceiling(self) -> list[float]:
        """The tokens per second at which reading the weights would take the whole bandwidth, per pair."""
        return [b / self.bytes_read for b in self.bandwidth]

    @property
    def of_ceiling(self) -> list[float]:
        """The share of the ceiling that we reach, per pair."""
        return [a / c for a, c in zip(self.ours, self.ceiling)]

    @property
    def met(self) -> bool | None:
        """True if the goal is reached; None if there is none, or nothing to compare with."""
        values = self.goal and (self.ratio if self.goal.on == "ratio" else self.ours)
        return self.goal.met(median(values)) if self.goal and values else None


@dataclass
class Case:
    """A model, a number of threads, and the settings of the whole run."""

    path: Path
    threads: int
    ours: Ours
    theirs: Theirs | None
    program: Path | None        # first_token, compiled
    bandwidth: Bandwidth
    sizes: Sizes
    repeats: int
    skip: Callable[[str], None]     # called with a note about a prompt that does not fit the context

    def row(self, measure: str, unit: str, ours: list[float], theirs: list[float], goal: Goal | None = None,
            **more: Any) -> Row:
        """Make a row of this case. A small model has a goal for decoding only."""
        goal = goal if measure == "small" or not self.small else None
        return Row(measure, self.path.stem, self.threads, unit, ours, theirs, goal, **more)

    @property
    def small(self) -> bool:
        """True if the model file is smaller than SMALL."""
        return self.path.stat().st_size < SMALL

    def ids(self, n: int, more: int = 0) -> list[int] | None:
        """A prompt of n tokens; None if it and `more` tokens do not fit into the model's context."""
        config = self.ours.model.config
        if n + more <= config.n_ctx:
            return prompt(n, config.n_vocab)
        self.skip(f"{self.path.stem}: no prompt of {n} tokens: its context has room for {config.n_ctx - more}")
        return None


def pairs(repeats: int, ours: Callable[[], Any], theirs: Callable[[], Any] | None,
          after: Callable[[], Any] | None = None) -> tuple[list[Any], list[Any], list[Any]]:
    """Call ours and theirs `repeats` times in turn, and return the results; the first call of each is not counted.

    They take turns in who begins. `after` is called once per pair. Without theirs the second list is empty, without
    `after` the third.
    """
    out: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    calls = [(side, call) for side, call in enumerate((ours, theirs)) if call is not None]
    for _, call in calls:
        call()
    for i in range(repeats):
        for side, call in calls if i % 2 == 0 else calls[::-1]:
            time.sleep(PAUSE)
            out[side].append(call())
        if after is not None:
            time.sleep(PAUSE)
            out[2].append(after())
    return out


def rates(n: int, seconds: list[float]) -> list[float]:
    """Tokens per second from seconds per n tokens."""
    return [n / s for s in seconds]


def decode(case: Case) -> Iterator[Row]:
    """Measure tokens per second when decoding one token at a time, and the memory bandwidth with each pair."""
    n = case.sizes.small if case.small else case.sizes.decode
    n = min(n, case.ours.model.config.n_ctx - case.sizes.after)
    ids = case.ids(case.sizes.after, n)
    if ids is None:
        return
    ours, theirs, bandwidth = pairs(
        case.repeats, lambda: case.ours.decode(ids, n), case.theirs and (lambda: case.theirs.decode(ids, n)),
        lambda: case.bandwidth(case.threads))
    yield case.row("small" if case.small else "decode", "tok/s", rates(n, ours), rates(n, theirs),
                   Goal("ratio", "≥", 0.3 if case.small else 1.0), bandwidth=bandwidth, bytes_read=case.ours.bytes_read,
                   more={"tokens": n, "after": len(ids)})


def prefill(case: Case) -> Iterator[Row]:
    """Measure tokens per second of a prompt in one pass."""
    for n in case.sizes.prefill:
        ids = case.ids(n)
        if ids is not None:
            ours, theirs, _ = pairs(case.repeats, lambda: case.ours.prefill(ids),  # noqa: B023
                                    case.theirs and (lambda: case.theirs.prefill(ids)))  # noqa: B023
            yield case.row(f"prefill {n}", "tok/s", rates(n, ours), rates(n, theirs), Goal("ratio", "≥", 1.0))


def start(case: Case) -> Iterator[Row]:
    """Measure the time from the shell to the first token, and the peak memory."""
    command = [sys.executable, "-m", "tinymia", "-m", case.path, "-t", case.threads, "-p", TEXT, "-n", "1"]
    ours, theirs, _ = pairs(
        case.repeats, lambda: spawn(command),
        case.program and (lambda: spawn([case.program, case.path, case.threads, TEXT])))
    totals = [[s.total for s in side] for side in (ours, theirs)]
    more = {"tokens": len(case.ours.model.tokenize(TEXT)), "total": totals}
    yield case.row("start", "s", [s.first for s in ours], [s.first for s in theirs], Goal("ratio", "≤", 1.0), more=more)
    size = case.path.stat().st_size
    yield case.row("memory", "MB", megabytes(ours), megabytes(theirs), Goal("ours", "≤", round(size / 1e6 + 200)),
                   more={"file": size})


def megabytes(runs: list[Spawned]) -> list[float]:
    """The peak memory of processes, in MB."""
    return [s.peak / 1e6 for s in runs]


def first(case: Case) -> Iterator[Row]:
    """Measure the first run on a computer, when no kernel is compiled yet."""
    command = [sys.executable, "-m", "tinymia", "-m", case.path, "-t", case.threads, "-p", TEXT, "-n", "2"]
    with tempfile.TemporaryDirectory() as folder:
        once = spawn(command, {"NUMBA_CACHE_DIR": folder})
    yield case.row("first", "s", [once.total], [], Goal("ours", "≤", 20.0))


def keep(case: Case) -> Iterator[Row]:
    """Measure the seconds of a prompt with a copy of every l_out and, instead of llama.cpp's, those without copies."""
    ids = case.ids(case.sizes.keep)
    if ids is not None:
        kept, plain, _ = pairs(2 * case.repeats, lambda: case.ours.prefill(ids, "l_out-*"),
                               lambda: case.ours.prefill(ids))
        yield case.row("keep", "s", kept, plain, Goal("ratio", "≤", 1.03), more={"tokens": len(ids)})


def long(case: Case) -> Iterator[Row]:
    """Measure milliseconds per token of long prompts, and the memory of a process that runs one."""
    for n in case.sizes.long:
        ids = case.ids(n)
        if ids is None:
            continue
        ours, theirs, _ = pairs(min(case.repeats, 3), lambda: case.ours.prefill(ids),  # noqa: B023
                                case.theirs and (lambda: case.theirs.prefill(ids)))  # noqa: B023
        yield case.row(f"long {n}", "ms/token", [1e3 * s / n for s in ours], [1e3 * s / n for s in theirs])
        alone = [sys.executable, "-m", "bench.ours", case.path, case.threads, n]
        ours = [spawn(alone)]
        theirs = [spawn([case.program, case.path, case.threads, f"#{n}"])] if case.program else []
        yield case.row(f"long {n} memory", "MB", megabytes(ours), megabytes(theirs))


PARTS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "decode": decode, "small": decode, "prefill": prefill, "start": start, "memory": start, "first": first,
    "keep": keep, "long": long,
}


def context(sizes: Sizes, n_ctx: int) -> int:
    """The length of context that llama.cpp needs for all parts."""
    return min(n_ctx, max(*sizes.prefill, *sizes.long, sizes.after + sizes.decode, sizes.after + sizes.small))


def measure(case: Case, only: list[str], fail: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of the chosen parts; `fail` is called for a part that fails, and the next one runs."""
    for part in dict.fromkeys(PARTS[name] for name in only):
        try:
            yield from (row for row in part(case) if row.measure.split()[0] in only)
        except (Error, MemoryError, OSError) as e:
            fail(f"{case.path.stem}, {case.threads} threads, {part.__name__}: {e or 'out of memory'}")
