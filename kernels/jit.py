"""How every kernel of this package is compiled, cached and announced.

`@kernel` is for functions that Python calls: compiled at the first call with given argument types, kept on disk.
`@inline` is for their parts: compiled into the kernels that use them, never kept by themselves.
`specialise` makes a kernel out of a template by giving the template's global names a format's own functions.

The cache differs from numba's in three points. A kernel is stale as soon as any file of this package changes (numba
looks at the one file that holds the function, and kernels take in parts from other files). It lies in the user's cache
folder, never beside the sources. And a folder that cannot be written is said once, aloud, and still read from.
"""

import hashlib
import os
import sys
import time
import types
from pathlib import Path

import numba
from numba.core import config, event
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from .notes import note

HERE = Path(__file__).resolve().parent
PORTABLE = os.environ.get("TINYMIA_PORTABLE", "0") not in ("", "0")  # tests: no instruction that only some CPUs have


def cache_folder() -> Path:
    """The folder of compiled kernels: `$NUMBA_CACHE_DIR/tinymia`, or `tinymia/kernels` in the user's cache folder."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "tinymia"
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "tinymia" / "kernels"


def _source_stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


STAMP = _source_stamp()
# Each installed copy and each mode has files of its own, so that two of them do not overwrite each other in turn.
COPY = hashlib.sha256(str(HERE).encode()).hexdigest()[:12]
MODE = ("b" if config.BOUNDSCHECK else "") + ("p" if PORTABLE else "")


class _Locator(_CacheLocator):
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
    _locator_classes = (_Locator,)

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
        except Exception:  # damaged or unreadable: the same as not there, the kernel is compiled
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:
            if not _Cache.said:
                _Cache.said = True
                _say(f"cannot keep compiled kernels in {self.cache_path} ({error}): every process compiles them "
                     "again; set NUMBA_CACHE_DIR to a folder that can be written")


def _say(line: str) -> None:
    note(f"tinymia: {line}")


class _Announcer(event.Listener):
    """Counts and times the kernels that were really compiled, and says so before the first one."""

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
    """Whether a kernel is being compiled, when numba would swallow an exception that a signal handler raises."""
    return bool(_announcer.began)


def announce_done() -> None:
    """Say on stderr how many kernels were compiled, and how long that took, since the last call; else say nothing."""
    count, seconds = _announcer.kernels, _announcer.seconds
    if count:
        _announcer.kernels, _announcer.seconds = 0, 0.0
        _say(f"compiled {count} kernel{'s' * (count > 1)} in {seconds:.1f} s")


def inline(function):
    """A part of kernels, compiled into them."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def kernel(function):
    """A function that Python calls: compiled once for each CPU, without the GIL, division by zero as in NumPy."""
    dispatcher = inline(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


def specialise(template, name: str, part: bool = False, **bindings):
    """A kernel, or a part of kernels, with the template's code, and `bindings` in place of its global names.

    A closure would read better, but numba cannot keep closures over compiled functions on disk.
    """
    function = types.FunctionType(template.__code__, {**template.__globals__, **bindings}, name)
    function.__qualname__, function.__doc__ = name, template.__doc__
    return inline(function) if part else kernel(function)
