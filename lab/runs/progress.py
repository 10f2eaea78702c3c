"""Long work: a progress bar with the time left, Ctrl-C that loses nothing, and a file from which to continue."""

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

EVERY = 30.0    # seconds between two savings of the result
SAY = 20.0      # seconds between two lines if stderr is not a terminal


class Progress:
    """Shows how much is done and the time left: a bar on a terminal, else a line on stderr every 20 seconds."""

    def __init__(self, total: int, name: str, done: int = 0):
        """Begin; an earlier run has made `done` of the `total` steps."""
        self.total, self.name, self.done, self.before = total, name, done, done
        self.begun = self.last = time.monotonic()
        self.live = is_terminal(sys.stderr)

    def step(self, n: int = 1) -> None:
        """Count n more steps, and show the progress."""
        self.done += n
        now = time.monotonic()
        if self.live and (now - self.last >= 0.1 or self.done == self.total):
            self.last = now
            note(f"\r{self.line(now - self.begun)}\x1b[K", end="")
        elif not self.live and now - self.last >= SAY:
            self.last = now
            note(f"{self.name}: {self.done} of {self.total} done, {self.left(now - self.begun)} left")

    def line(self, seconds: float) -> str:
        """The line with the bar, after this many seconds."""
        filled = round(30 * self.done / max(self.total, 1))
        return f"{self.name} {'█' * filled}{'░' * (30 - filled)} {self.done}/{self.total}, {self.left(seconds)} left"

    def left(self, seconds: float) -> str:
        """The time that the rest will take, judged by the seconds so far."""
        return clock(seconds / max(self.done - self.before, 1) * (self.total - self.done))

    def clear(self) -> None:
        """Remove the bar."""
        if self.live:
            note("\r\x1b[K", end="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()


def clock(seconds: float) -> str:
    """A duration as text: 5 s, 2:05, 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}" if m else f"{s} s"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C in the block raise KeyboardInterrupt, also if it comes while numba compiles.

    Numba would lose the exception. So it is raised later then, when the block next calls the function that it gets.
    """
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

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield check
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class Keeping(Progress):
    """Progress that also saves the result from time to time."""

    def __init__(self, result: Result, path: str | Path | None, check: Callable[[], None], *how: Any):
        super().__init__(*how)
        self.result, self.path, self.check, self.saved, self.every = result, path, check, self.begun, EVERY

    def step(self, n: int = 1) -> None:
        """Count n more steps; raise KeyboardInterrupt if Ctrl-C is waiting; save the result if it is time."""
        super().step(n)
        self.check()
        if self.path is not None and time.monotonic() - self.saved >= self.every:
            begun = time.monotonic()
            self.result.save(self.path)
            self.saved = time.monotonic()
            self.every = max(EVERY, 10 * (self.saved - begun))  # save for at most a tenth of the time


@contextmanager
def keeping(result: Result, path: str | Path | None, total: int, name: str, done: int = 0) -> Iterator[Progress]:
    """Progress over work that fills `result`, which is saved in `path` at the end, and after Ctrl-C or an error.

        with keeping(result, path, len(cells), "sweep", done) as bar:
            for cell in cells:
                result.values[cell] = ...
                bar.step()

    It is saved every half a minute, too. After Ctrl-C a line on stderr says how far the work got, and that the same
    command continues from there; then KeyboardInterrupt is raised again, and the command's exit status is 130.
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
