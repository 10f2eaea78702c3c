"""stdout and stderr while the command runs: everything that is printed goes through these streams.

Texts from files may hold control characters and escape sequences, which a terminal would obey. They are removed here;
only the colours and the bar that the lab itself draws on a terminal stay. Generated text is cleaned for a terminal, and
written unchanged to a file or a pipe. A stream that is closed or missing drops what it is given; so does stderr if it
cannot be written, because a lost note is not a reason to stop.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tinymia_files import printable

KEEP = "\n\t\u200c\u200d"   # line ends, tabs, and the joiners that some scripts and emoji need
OURS = re.compile(          # our own sequences: colours of cells, bold, and the bar that overwrites its line
    r"(\x1b\[48;(?:2;\d{1,3};\d{1,3};\d{1,3}|5;\d{1,3});(?:30|97)m|\x1b\[[01]m|\A\r|\r\Z|\x1b\[K\Z)")


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal. It may be missing, closed, or any object with a write method."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def json_safe(text: str) -> str:
    """JSON in which characters that a terminal must not get are written as \\u escapes."""
    def escape(c: str) -> str:
        half = c.encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{half[i]:02x}{half[i + 1]:02x}" for i in range(0, len(half), 2))

    return printable(text, KEEP, escape)


def print_json(text: str) -> None:
    """Print a line of JSON, with control characters escaped."""
    print(json_safe(text))


def print_generated(text: str, end: str = "") -> None:
    """Print text that a model generated: cleaned for a terminal, unchanged for a file or a pipe."""
    out = sys.stdout
    (out.as_it_is if isinstance(out, Stream) else out.write)(text)
    print(end=end, flush=True)


class Stream:
    """A text stream that cleans what is written to it, around another one, which may lack nearly every method."""

    def __init__(self, inner: Any, forgiving: bool = False):
        """Wrap a stream; forgiving: drop what cannot be written, instead of raising."""
        missing = inner is None or getattr(inner, "closed", False) is True or not hasattr(inner, "write")
        self.inner: Any = None if missing else inner
        self.forgiving = forgiving
        self.terminal = is_terminal(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def isatty(self) -> bool:
        """Return whether the inner stream is a terminal."""
        return self.terminal

    def write(self, text: str) -> int:
        """Write a text without the characters that a terminal must not get. Returns the length of the text."""
        parts = OURS.split(text) if self.terminal else [text]       # every second part is one of our own sequences
        self._send("".join(part if i % 2 else printable(part, KEEP) for i, part in enumerate(parts)))
        return len(text)

    def as_it_is(self, text: str) -> int:
        """Write a text unchanged, unless this is a terminal. Returns the length of the text."""
        if self.terminal:
            return self.write(text)
        self._send(text)
        return len(text)

    def flush(self) -> None:
        """Flush the inner stream."""
        self._send(None)

    def drop(self) -> None:
        """Drop everything from now on. The descriptor leads to nothing, or Python's last flush would fail again."""
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
        except UnicodeError:        # an encoding that lacks some letters
            self.inner.write((text or "").encode("ascii", "backslashreplace").decode())
        except ValueError:          # the stream was closed meanwhile
            self.inner = None
        except OSError:
            if not self.forgiving:
                raise
            self.drop()


@contextmanager
def streams() -> Iterator[None]:
    """Replace stdout and stderr by such streams in the block.

    First, descriptors 0 to 2 that are closed are opened on nothing. Otherwise the next file to be opened, such as a
    result, would get one of these numbers, and libraries would print into it.
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
