"""Where lines leave for the terminal: stdout and stderr while the command runs.

Whatever a file says may hold control characters and escape sequences. All that is printed is cleaned here, on its way
out; only the colours and the bar that the lab itself draws on a terminal go through. Generated text is cleaned for a
terminal, and goes as it is into a file or a pipe. A stream that is closed, or missing, takes what it is given and
drops it; stderr does the same when it cannot be written, since a note is no reason to stop.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tinymia_files import printable

KEEP = "\n\t\u200c\u200d"   # line ends, tabs, and the joiners that scripts and emoji are written with
OURS = re.compile(          # colours of cells, bold, and the bar that renews its line
    r"(\x1b\[48;(?:2;\d{1,3};\d{1,3};\d{1,3}|5;\d{1,3});(?:30|97)m|\x1b\[[01]m|\A\r|\r\Z|\x1b\[K\Z)")


def is_terminal(stream: Any) -> bool:
    """Whether a stream, which may be missing, closed, or some object with a write method, is a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def json_safe(text: str) -> str:
    """A line of JSON in which what a terminal must not get is written as \\u0000: the same data."""
    def escape(c: str) -> str:
        half = c.encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{half[i]:02x}{half[i + 1]:02x}" for i in range(0, len(half), 2))

    return printable(text, KEEP, escape)


def print_json(text: str) -> None:
    """Print a line of JSON."""
    print(json_safe(text))


def print_generated(text: str, end: str = "") -> None:
    """Print what a model wrote: cleaned for a terminal, as it is for a file or a pipe."""
    out = sys.stdout
    (out.as_it_is if isinstance(out, Stream) else out.write)(text)
    print(end=end, flush=True)


class Stream:
    """A text stream that cleans what goes through it, around one that may lack nearly everything."""

    def __init__(self, inner: Any, forgiving: bool = False):
        """forgiving: what cannot be written is dropped."""
        missing = inner is None or getattr(inner, "closed", False) is True or not hasattr(inner, "write")
        self.inner: Any = None if missing else inner
        self.forgiving = forgiving
        self.terminal = is_terminal(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        parts = OURS.split(text) if self.terminal else [text]       # every second one is ours
        self._send("".join(part if i % 2 else printable(part, KEEP) for i, part in enumerate(parts)))
        return len(text)

    def as_it_is(self, text: str) -> int:
        """Write without cleaning, unless this is a terminal."""
        if self.terminal:
            return self.write(text)
        self._send(text)
        return len(text)

    def flush(self) -> None:
        self._send(None)

    def drop(self) -> None:
        """Take no more. The descriptor leads nowhere from now on, or Python's own flush at the end would fail again."""
        with suppress(OSError, ValueError, AttributeError):
            number, nowhere = self.inner.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
        self.inner = None

    def _send(self, text: str | None) -> None:
        """Write a text, or flush."""
        if self.inner is None:
            return
        try:
            if text is not None:
                self.inner.write(text)
            elif hasattr(self.inner, "flush"):
                self.inner.flush()
        except UnicodeError:        # an encoding that lacks letters
            self.inner.write((text or "").encode("ascii", "backslashreplace").decode())
        except ValueError:          # closed meanwhile
            self.inner = None
        except OSError:
            if not self.forgiving:
                raise
            self.drop()


@contextmanager
def streams() -> Iterator[None]:
    """Print through such streams in the block.

    Descriptors 0 to 2 that are closed are opened on nothing first: else the next file that is opened, say one to save
    in, would get the number, and with it what a library prints.
    """
    with suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(opened)
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout, sys.stderr = Stream(before[0]), Stream(before[1], forgiving=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
