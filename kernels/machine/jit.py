"""How every kernel of this package is compiled, cached and announced.

`@kernel` is for functions that Python calls: compiled at the first call with given argument types, and kept on disk.
`@inline` is for their parts: compiled into the kernels that use them, and never kept by themselves.
`specialise` makes a kernel from a template by binding the template's global names to a format's own functions.

The cache differs from numba's in three points. A kernel is stale as soon as any file of this package changes (numba
checks only the file that holds the function, but kernels contain parts from other files). The cache lies in the user's
cache folder, never beside the sources. If that folder cannot be written, one line on stderr says so, and kernels that
are in it are still used.
"""

import hashlib
import os
import sys
import tempfile
import time
import types
from contextlib import suppress
from pathlib import Path

import numba
from numba.core import config, event
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

PACKAGE = Path(__file__).resolve().parents[1]
PORTABLE = os.environ.get("TINYMIA_PORTABLE", "0") not in ("", "0")  # for tests: only instructions that all CPUs have


def cache_folder() -> Path:
    """The folder of compiled kernels: `$NUMBA_CACHE_DIR/tinymia`, or `tinymia/kernels` in the user's cache folder.

    A user without a home folder (a container's unknown uid) gets one in the folder for temporary files.
    """
    chosen, home = os.environ.get("NUMBA_CACHE_DIR"), os.path.expanduser("~")
    if chosen:
        chosen = os.path.expanduser(chosen)
        return Path(chosen) / "tinymia" if not chosen.startswith("~") else _temporary()
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification: a relative path is to be ignored
        return Path(named) / "tinymia" / "kernels"
    if not os.path.isabs(home):
        return _temporary()
    base = Path(home) / "Library" / "Caches" if sys.platform == "darwin" else Path(home) / ".cache"
    return base / "tinymia" / "kernels"


def _temporary() -> Path:
    """This user's folder among the temporary files, or a path that cannot exist if another user may write to it.

    Files in it are loaded and run, and somebody else could have made a folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"tinymia-{os.getuid() if hasattr(os, 'getuid') else ''}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(folder)
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise PermissionError
    except OSError:
        return Path(os.devnull) / "no folder of this user's own"
    return folder / "kernels"


def source_stamp(folder: Path) -> str:
    """A digest of all Python files in a folder and its subfolders: of their relative names and their contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


STAMP = source_stamp(PACKAGE)
# Each installed copy and each mode has files of its own, so that two of them do not overwrite each other in turn.
COPY = hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
MODE = ("b" if config.BOUNDSCHECK else "") + ("p" if PORTABLE else "")


class _Locator(_CacheLocator):
    """The answers to numba's questions about its cache: the folder, the stamp of the sources, and the mode."""

    def __init__(self, py_func, py_file):
        self._py_file = py_file

    def get_cache_path(self):
        return str(cache_folder() / COPY)

    def get_source_stamp(self):
        return STAMP

    def get_disambiguator(self):
        return MODE

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func, py_file)


class _Impl(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012  (numba's own attribute, a list)

    def __init__(self, py_func):
        chosen, config.CACHE_LOCATOR_CLASSES = config.CACHE_LOCATOR_CLASSES, ""
        try:
            super().__init__(py_func)
        finally:
            config.CACHE_LOCATOR_CLASSES = chosen


class _Cache(FunctionCache):
    _impl_class = _Impl
    said = False

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # damaged or unreadable: compile the kernel, as if the file were not there
            return None

    def save_overload(self, sig, data):
        try:
            try:
                super().save_overload(sig, data)
            except OSError:
                raise
            except Exception:  # the index is damaged (a full disk may have cut it off): replace it by a new one
                self.flush()
                super().save_overload(sig, data)
        except Exception as error:
            if not _Cache.said:
                _Cache.said = True
                _say(f"cannot keep compiled kernels in {self.cache_path} ({error}): every process compiles them "
                     "again; set NUMBA_CACHE_DIR to a folder that can be written")


def _say(line: str) -> None:
    """Write a line to stderr. If there is none, or it cannot be written, do nothing."""
    with suppress(OSError, ValueError, AttributeError):     # the stream is full, closed, or None
        sys.stderr.write(f"tinymia: {line}\n")
        sys.stderr.flush()


class _Announcer(event.Listener):
    """Count and time the kernels that are compiled, not loaded from the cache; print a line before the first one."""

    def __init__(self):
        self.kernels, self.seconds, self.began = 0, 0.0, {}

    def on_start(self, ev):
        dispatcher = ev.data["dispatcher"]
        if isinstance(dispatcher._cache, _Cache):
            if self.kernels == 0:
                _say("compiling kernels for this CPU (once, then kept in "
                     f"{cache_folder()}): {dispatcher.py_func.__name__} ...")
            self.kernels += 1
            self.began[dispatcher] = time.perf_counter()

    def on_end(self, ev):
        began = self.began.pop(ev.data["dispatcher"], None)
        if began is not None and not self.began:  # a kernel inside another one is in that one's time
            self.seconds += time.perf_counter() - began


_announcer = _Announcer()
event.register("numba:compile", _announcer)


def compiling() -> bool:
    """Return whether a kernel is being compiled. Meanwhile numba would lose an exception raised by a signal handler."""
    return bool(_announcer.began)


def announce_done() -> None:
    """Print on stderr how many kernels were compiled since the last call, and how long that took, if there were any."""
    count, seconds = _announcer.kernels, _announcer.seconds
    if count:
        _announcer.kernels, _announcer.seconds = 0, 0.0
        _say(f"compiled {count} kernel{'s' * (count > 1)} in {seconds:.1f} s")


def inline(function):
    """Compile a function as a part of kernels.

    It is compiled even under NUMBA_DISABLE_JIT (debuggers, coverage): much of it stands for CPU instructions, which
    Python cannot run.
    """
    disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        return numba.njit(nogil=True, error_model="numpy")(function)
    finally:
        config.DISABLE_JIT = disabled


def kernel(function):
    """Compile a function that Python calls: once per CPU; it runs without the GIL; division by zero is as in NumPy."""
    dispatcher = inline(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


def specialise(template, name: str, part: bool = False, **bindings):
    """Make a kernel, or a part of kernels, from the template's code, with `bindings` in place of its global names.

    TypeError if the template does not use one of the names. A closure would read better, but numba cannot keep closures
    over compiled functions on disk. See template.py for the templates of a whole class.
    """
    unknown = sorted(bindings.keys() - set(template.__code__.co_names))
    if unknown:
        raise TypeError(f"{name}: the template {template.__qualname__} uses no {', '.join(unknown)}")
    function = types.FunctionType(template.__code__, {**template.__globals__, **bindings}, name)
    function.__qualname__, function.__doc__ = name, template.__doc__
    return inline(function) if part else kernel(function)
