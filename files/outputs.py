"""How files are written: checked before a long run, then written completely or not at all, and never over an input.

A file that is replaced keeps its mode and owner. A link stays a link, and the file that it points to is replaced.
Pipes, devices and /dev/stdout are written in place, and so is a file in a folder where no temporary file can be made.
"""

from __future__ import annotations

import io
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .disk import expand, is_mapped
from .errors import FileError, short

AnyPath = str | os.PathLike[str]


def check_target(path: AnyPath, names: Sequence[str] = (), inputs: Iterable[AnyPath] = ()) -> None:
    """Raise FileError now for a file that could not, or should not, be written after a long run.

    names: the tensors that the file will hold. inputs: files that the run reads, to which a loaded model always
    belongs.
    """
    _, found = _target(path)
    for other in inputs:
        if found is not None and stat.S_ISREG(found.st_mode) and _same(found, other):
            what = "it is read in this run" if str(other) == str(path) else f"it is {other}, which is read in this run"
            raise FileError(f"{path}: cannot be written: {what}, and would be lost")
    if len(names) > 1 and Path(path).suffix != ".npz":
        listed = short(", ".join(names))
        raise FileError(f"{path}: a file of this kind holds one tensor, an .npz file {len(names)}: {listed}")


def check_apart(paths: Sequence[AnyPath]) -> None:
    """Raise FileError if two of the paths are the same file, because the second output would overwrite the first."""
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if _collide(path, other):
                as_ = "" if str(other) == str(path) else f", as {other}"
                raise FileError(f"{path}: two outputs would go there{as_}: the second would replace the first")


def place(path: AnyPath) -> str:
    """A path made unique: absolute, with links followed."""
    try:
        return os.path.realpath(expand(path))
    except OSError:  # a ring of links, or the current folder was deleted
        return os.path.normpath(expand(path))


def write_atomic(path: AnyPath, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name and rename it, so that it is complete or does not exist. Raises FileError."""
    target, found = _target(path)
    try:
        if found is None or (stat.S_ISREG(found.st_mode) and _may_replace(target, found) and not _descriptor(found)):
            _replace(target, found, write)
            return
        whole = io.BytesIO()
        write(whole)
        with _open(target, found) as f:
            f.write(whole.getbuffer())
            if stat.S_ISREG(found.st_mode) and not _descriptor(found):
                f.truncate()
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror or e}") from e


def _target(path: AnyPath) -> tuple[Path, os.stat_result | None]:
    """(the file that would be written, what is there now). Raises FileError for what cannot be written."""
    target = expand(path)
    try:
        found = _stat(target)
        if os.path.islink(target) and (found is None or stat.S_ISREG(found.st_mode)):
            target = Path(os.path.realpath(target))
        trouble = _trouble(target, found)
    except OSError as e:
        trouble = e.strerror or str(e)
    if not trouble and found is not None and stat.S_ISREG(found.st_mode):
        if is_mapped(found):
            trouble = "the model that is loaded lies there, and would be lost"
        elif _descriptor(found) and not str(path).startswith(("/dev/", "/proc/")):
            trouble = "stdout or stderr goes there already"
    if trouble:
        raise FileError(f"{path}: cannot be written: {trouble}", limit=800)
    return target, found


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _trouble(target: Path, found: os.stat_result | None) -> str:
    """The reason why a file cannot be written; "" if it can."""
    if found is None:
        folder = _stat(target.parent)
        if folder is None:
            return f"there is no folder {target.parent}; mkdir -p {shlex.quote(str(target.parent))} makes it"
        if not stat.S_ISDIR(folder.st_mode):
            return f"{target.parent} is not a folder"
        if not folder.st_nlink:
            return "its folder was deleted"
        if not _allowed(target.parent, os.W_OK | os.X_OK):
            return f"there is no permission to make a file in its folder {target.parent}"
        return ""
    if stat.S_ISDIR(found.st_mode):
        return "it is a folder"
    if stat.S_ISSOCK(found.st_mode):
        return "it is a socket"
    # root may write to any file; a file without permission to write is kept even then
    if not _allowed(target, os.W_OK) or (stat.S_ISREG(found.st_mode) and not found.st_mode & 0o222):
        return "there is no permission to write to it"
    return ""


def _allowed(path: Path, what: int) -> bool:
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids)


def _may_replace(target: Path, found: os.stat_result) -> bool:
    """Return whether a new file can replace this one: its folder is writable, and not shared like /tmp."""
    folder = os.stat(target.parent)
    shared = folder.st_mode & stat.S_ISVTX and hasattr(os, "geteuid")
    if shared and os.geteuid() not in (0, found.st_uid, folder.st_uid):
        return False
    return _allowed(target.parent, os.W_OK | os.X_OK)


def _replace(target: Path, found: os.stat_result | None, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = target.with_name(f".tinymia-{secrets.token_hex(6)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as f:
            write(f)
            if found is not None and hasattr(os, "fchmod"):
                with suppress(OSError):  # not allowed for another user's file: then the new file is ours
                    os.fchown(f.fileno(), found.st_uid, found.st_gid)
                with suppress(OSError):  # a file system without modes
                    os.fchmod(f.fileno(), stat.S_IMODE(found.st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _open(target: Path, found: os.stat_result) -> IO[bytes]:
    """Open an existing file, pipe or device for writing in place."""
    number = _descriptor(found)
    if number:  # duplicated, because two open files would overwrite each other's output
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return os.fdopen(os.dup(number), "wb")
    return open(target, "r+b" if stat.S_ISREG(found.st_mode) else "wb")


def _descriptor(found: os.stat_result) -> int:
    """1 or 2 if the file is this process's stdout or stderr, else 0."""
    for number in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(os.fstat(number), found):
                return number
    return 0


def _same(found: os.stat_result, path: AnyPath) -> bool:
    with suppress(OSError, FileError):  # it does not exist, or is not accessible: whoever reads it will report that
        return os.path.samestat(found, os.stat(expand(path)))
    return False


def _collide(path: AnyPath, other: AnyPath) -> bool:
    """Return whether two outputs are one file, existing or not yet (two outputs to /dev/null lose nothing)."""
    with suppress(OSError, FileError):
        found = os.stat(expand(path))
        return stat.S_ISREG(found.st_mode) and _same(found, other)
    return place(path) == place(other)
