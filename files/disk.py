"""How files are read: one way each to expand a path, to report a broken file, to read text and JSON, and to map a file.

A file may be damaged, renamed, encrypted or hostile. The libraries that parse it (zipfile, zlib, json, NumPy) raise
some twenty kinds of exception for that, and new versions raise others. So readers do not list them: every exception
inside `reading` is reported as an error of the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from .errors import Error, FileError, short


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~name` expanded as in a shell: they stay as they are if there is no such user.

    Raises FileError for a text that cannot be the name of a file.
    """
    try:
        text = os.path.expanduser(os.fsdecode(path))
        if "\0" in text:
            raise ValueError("it has a NUL character")
        os.fsencode(text)  # lone surrogates
    except (TypeError, ValueError) as e:
        raise FileError(f"{short(path)} cannot be the name of a file: {short(str(e))}") from e
    return Path(text)


@contextmanager
def reading(path: object, what: str, kind: type[FileError] = FileError) -> Iterator[None]:
    """Turn every exception of the block into one error of the file: it is not `what` ("a saved tensor").

    An Error that the block itself raises says more, and passes unchanged.
    """
    try:
        yield
    except Error:
        raise
    except OSError as e:
        raise kind(f"{path}: cannot be read: {e.strerror or e}") from e
    except MemoryError as e:
        raise kind(f"{path}: cannot be read: it takes more memory than there is") from e
    except RecursionError as e:
        raise kind(f"{path}: not {what}: lists in lists in lists without end") from e
    except Exception as e:
        why = f"it has no {short(e.args[0])}" if isinstance(e, KeyError) and e.args else str(e) or type(e).__name__
        raise kind(f"{path}: not {what}: {why if len(why) <= 120 else why[:117] + '...'}") from e


def note(text: str, end: str = "\n") -> None:
    """Write a line for the user on stderr, at once.

    If there is no stderr, or it cannot be written, the line is lost: it never appears among the results on stdout, and
    never stops the work.
    """
    with suppress(OSError, ValueError, AttributeError):     # the stream is full, closed, or None
        sys.stderr.write(text + end)
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------- text and JSON


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file, carriage returns included; only a byte order mark is dropped, with a note on stderr.

    `what` names the text in an error message, such as "the prompt". Raises FileError.
    """
    name = expand(path)
    with reading(path, f"{what} in UTF-8"):
        data = name.read_bytes()
    begin = data[:64] if len(data) >= 8 else b""
    wide = [not any(begin[i::2]) for i in (0, 1)] in ([True, False], [False, True])  # every other byte is 0
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or wide:
        raise FileError(f"{path}: {what} must be UTF-8, and this looks like UTF-16: save it as UTF-8, or "
                        f"`iconv -f UTF-16 -t UTF-8`")
    if data.startswith(b"\xef\xbb\xbf"):
        note(f"note: {path}: the byte order mark at its beginning is not taken as text")
        data = data[3:]
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FileError(f"{path}: {what} is not valid UTF-8 at byte {e.start}") from e


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value that a JSON file holds. Raises FileError, in which `what` names the kind of file ("a task file")."""
    text = read_text(path, what)
    with reading(path, what):
        return json.loads(text)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, paths as text, infinity and NaN as null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if hasattr(value, "to_json"):  # a result within another one
        return value.to_json()
    return str(value) if isinstance(value, Path) else value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts, on one line or indented: no NaN, and no lone surrogates from file names."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# ---------------------------------------------------------------------------------------- maps


class Mapped(mmap.mmap):
    """A file in memory, with its name and identity from the time when it was mapped.

    If the file becomes shorter while it is mapped, reading the missing part ends the process with SIGBUS.
    """

    path: Path                  # as the caller named it
    place: str                  # the absolute path
    identity: tuple[int, ...]   # device, inode, bytes, time of the last change in nanoseconds

    @classmethod
    def open(cls, f: Any, path: Path) -> Mapped:
        """Map an open file, which must not be empty."""
        mapped = cls(f.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            place = os.path.abspath(path)
        except OSError:  # the current folder was deleted
            place = str(path)
        mapped.path, mapped.place, mapped.identity = path, place, _identity(os.fstat(f.fileno()))
        with _lock:
            _live.add(mapped)
        return mapped

    def sha256(self) -> str:
        """SHA-256 of the mapped bytes, in hexadecimal. Raises FileError if the file has changed since it was loaded."""
        self.check()
        if self.identity not in _hashes:
            digest, view = hashlib.sha256(), memoryview(self)
            for i in range(0, len(view), 1 << 20):
                digest.update(view[i : i + (1 << 20)])
            view.release()
            self.check()
            _hashes[self.identity] = digest.hexdigest()
        return _hashes[self.identity]

    def check(self) -> None:
        """Raise FileError if the file was written to since it was mapped.

        It does not matter if the file was removed, or replaced by another one of its name: the mapped one stays.
        """
        try:
            now = _identity(os.stat(self.place))
        except OSError:
            now = self.identity
        if self.size() != len(self) or (now[:2] == self.identity[:2] and now != self.identity):
            raise FileError(f"{self.path}: the file was written to after it was loaded: load it again")


def is_mapped(found: os.stat_result) -> bool:
    """Return whether a file is mapped in this process, as the file of a loaded model is."""
    with _lock:
        return any(m.identity[:2] == (found.st_dev, found.st_ino) for m in _live)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_live: WeakSet[Mapped] = WeakSet()
_lock = threading.Lock()
_hashes: dict[tuple[int, ...], str] = {}
