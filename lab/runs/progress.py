"""Long work: a bar with the time left, Ctrl-C that loses nothing, and a file that the same command goes on from."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tinymia_files import note
from tinymia_kernels import compiling

from .result import Result
from .streams import is_terminal

EVERY = 30.0    # seconds between two savings of what is done
SAY = 20.0      # seconds between two lines on a stderr that is not a terminal


class Progress:
    """Done of total and the time left: a bar on a terminal, else a line on stderr every 20 seconds."""

    def __init__(self, total: int, name: str, done: int = 0):
        """`done` of the `total` steps were made by an earlier run."""
        self.total, self.name, self.done, self.before = total, name, done, done
        self.begun = self.last = time.monotonic()
        self.live = is_terminal(sys.stderr)

    def step(self, n: int = 1) -> None:
        """Say that n more steps are done."""
        self.done += n
        now = time.monotonic()
        if self.live and (now - self.last >= 0.1 or self.done == self.total):
            self.last = now
            note(f"\r{self.line(now - self.begun)}\x1b[K", end="")
        elif not self.live and now - self.last >= SAY:
            self.last = now
            note(f"{self.name}: {self.done} of {self.total} done, {self.left(now - self.begun)} left")

    def line(self, seconds: float) -> str:
        """What the bar says after so many seconds."""
        filled = round(30 * self.done / max(self.total, 1))
        return f"{self.name} {'█' * filled}{'░' * (30 - filled)} {self.done}/{self.total}, {self.left(seconds)} left"

    def left(self, seconds: float) -> str:
        """How long the rest takes, after so many seconds."""
        return clock(seconds / max(self.done - self.before, 1) * (self.total - self.done))

    def clear(self) -> None:
        """Take the bar away."""
        if self.live:
            note("\r\x1b[K", end="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()


def clock(seconds: float) -> str:
    """5 s, 2:05, 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}" if m else f"{s} s"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C in the block raises KeyboardInterrupt, at once or, while numba compiles, which would swallow it, at the
    next call of the function that the block gets."""
    waiting = False

    def interrupt(*_: Any) -> None:
        nonlocal waiting
        if not compiling():
            raise KeyboardInterrupt
        waiting = True

    def check() -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield check
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class Keeping(Progress):
    """Progress that saves the result now and then."""

    def __init__(self, result: Result, path: str | Path | None, check: Callable[[], None], *how: Any):
        super().__init__(*how)
        self.result, self.path, self.check, self.saved, self.every = result, path, check, self.begun, EVERY

    def step(self, n: int = 1) -> None:
        super().step(n)
        self.check()
        if self.path is not None and time.monotonic() - self.saved >= self.every:
            begun = time.monotonic()
            self.result.save(self.path)
            self.saved = time.monotonic()
            self.every = max(EVERY, 10 * (self.saved - begun))  # a large result must not be saved most of the time


@contextmanager
def keeping(result: Result, path: str | Path | None, total: int, name: str, done: int = 0) -> Iterator[Progress]:
    """Progress over work that fills `result`: at its end it is saved in `path`, at Ctrl-C and at an error what is new.

        with keeping(result, path, len(cells), "sweep", done) as bar:
            for cell in cells:
                result.values[cell] = ...
                bar.step()

    It is saved every half a minute as well. After Ctrl-C a line on stderr says how far it got and that the same command
    goes on from there; KeyboardInterrupt goes on to the caller, for which the command's exit status is 130.
    """
    with interruptible() as check, Keeping(result, path, check, total, name, done) as bar:
        try:
            try:
                yield bar
            except BaseException:
                if path is not None and bar.done > done:
                    result.save(path)
                raise
            if path is not None:
                result.save(path)
        except KeyboardInterrupt:
            kept = f"kept in {path}: the same command goes on from there"
            if path is None:
                kept = "nothing is kept: with -o FILE.npz the same command would go on from there"
            bar.clear()
            note(f"{name}: stopped at {bar.done} of {total}; {kept}")
            raise
