"""Checks of what a caller gives: positions, heads, layers, token ids, names of arguments.

Python and NumPy accept much as a whole number that is not one: True is 1, 1.5 is cut to 1, and a mask [True, False]
becomes the rows 1 and 0. So everything that chooses by number goes through `whole` or `indices`, which raise Error.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from tinymia_files import Error, short

F = TypeVar("F", bound=Callable[..., Any])
PLURAL = {"id": "token ids", "layer": "layers", "head": "heads", "position": "positions", "row": "rows"}


class ArgumentError(Error, TypeError):
    """An argument that a function does not have; the message names the one that was probably meant."""


def whole(value: Any, what: str) -> int:
    """A whole number of Python or NumPy as an int. Raises Error for everything else, also for True and 1.0."""
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise Error(f"{what} is {short(value)}; it must be a whole number")


def numbers(value: Any, what: str, where: str = "") -> np.ndarray:
    """A number, or an array of numbers. Raises Error for all else: True, texts, complex numbers, 10**400."""
    try:
        array = np.asarray(value)
        if array.dtype.kind in "fiu":
            return array
    except (TypeError, ValueError):     # lists of different lengths
        pass
    raise Error(f"{where}{what} is {short(value)}; it must be a number, or an array of numbers")


def names(value: Any, what: str) -> list[Any]:
    """Names as a list; one may stand by itself, and None for none. Raises Error for what is not a list."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    try:
        return list(value)
    except TypeError:
        raise Error(f"{what} is {short(value)}; it must be a name, or a list of names") from None


def residual(start: Any, n_layer: int, shape: tuple[int, int], dtype: Any) -> tuple[int, np.ndarray]:
    """(layer, x) of a run that begins in the middle, x as contiguous numbers. Raises Error."""
    try:
        first, given = start
    except (TypeError, ValueError):
        raise Error(f"start is {short(start)}; it must be (layer, x), x of shape {list(shape)}") from None
    layer, x = whole(first, "the layer of start"), numbers(given, "x of start")
    if not 0 <= layer <= n_layer or x.shape != shape:
        raise Error(f"start=({layer}, {list(x.shape)}): it takes a layer up to {n_layer} and {list(shape)}")
    return layer, np.ascontiguousarray(x, dtype)


def out_of_range(what: str, given: Any, n: int, things: str, holder: str = "there are") -> str:
    """The message for a number outside 0 to n - 1, such as: head 9 is out of range: there are 4 heads, 0 to 3."""
    return f"{what} {given} is out of range: {holder} {n} {things}, 0 to {n - 1}"


def is_mask(given: Any) -> bool:
    """Return whether a choice is a mask: an array of booleans, or a list of nothing but booleans."""
    if isinstance(given, np.ndarray) or hasattr(given, "__array__"):
        return np.asarray(given).dtype == bool
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(v, (bool, np.bool_)) for v in given)


def indices(given: Any, what: str, n: int | None = None, where: str = "") -> np.ndarray:
    """The chosen indices, intp [n_index], from one number, a list of numbers, or a mask (True for each chosen index).

    what: "position", "head", "layer", "row" or "id". n: how many there are, which must be the length of a mask; None if
    that is not known. Raises Error, also if nothing is chosen; its message begins with `where`.
    """
    many = PLURAL[what]
    if isinstance(given, (str, bytes)) or given is None or (what == "id" and (_single(given) or is_mask(given))):
        _refuse(given, what, where)
    if _single(given):
        return np.array([_one(given, what, given, where)], np.intp)
    if is_mask(given):
        mask = np.asarray(given)
        if mask.ndim != 1:
            _refuse(given, what, where)
        if n is not None and len(mask) != n:
            raise Error(f"{where}a mask of {len(mask)} {many}: there are {n}, and a mask has one value for each")
        found = np.flatnonzero(mask)
        if not len(found):
            raise Error(f"{where}a mask that is True nowhere chooses no {what}")
        return found
    if hasattr(given, "__array__"):
        array = np.asarray(given)
        if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
            _refuse(given, what, where)
        given = np.atleast_1d(array).tolist()
    if not len(given):
        raise Error(f"{where}an empty list chooses no {what}")
    return np.array([_one(value, what, given, where) for value in given], np.intp)


def token_ids(ids: Any, n: int) -> list[int]:
    """Token ids as a list, which may be empty. Raises Error for an id that is not one of n tokens."""
    if isinstance(ids, bytes):
        raise Error("a prompt is text or token ids, not bytes")
    empty = ids.size == 0 if isinstance(ids, np.ndarray) else isinstance(ids, Sequence) and not ids
    found = [] if empty else indices(ids, "id").tolist()
    bad = [i for i in found if not 0 <= i < n]
    if bad:
        raise Error(out_of_range("token id", bad[0], n, "tokens"))
    return found


def never_came(at: Any, seen: set[int]) -> list[int]:
    """The positions of `at` that are not in `seen`, those of all passes; negative ones count from the end."""
    return [p for p in indices(at, "position").tolist() if p not in seen and not -max(seen) - 2 < p < 0]


def _single(given: Any) -> bool:
    """Return whether a choice is one value, not a list."""
    return not isinstance(given, Sequence) and np.ndim(getattr(given, "__array__", lambda: 0)()) == 0


def _one(value: Any, what: str, given: Any, where: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        _refuse(given, what, where)
    if abs(number) >= 2**62:
        raise Error(f"{where}{PLURAL[what]} {short(given)}: {short(number)} is out of range of any model")
    return number


def _refuse(given: Any, what: str, where: str) -> NoReturn:
    masks = "" if what == "id" else f", or a mask: True for each {what} that is meant"
    raise Error(f"{where}{PLURAL[what]} {short(given)}: they must be whole numbers, such as [0, 3]{masks}")


def told(value: Any) -> str:
    """A short description of an argument for a message: arrays by their shape, functions by their name."""
    if isinstance(value, np.ndarray):
        return f"array {list(value.shape)}" if value.size > 4 else str(value.tolist())
    if isinstance(value, tuple) and value:
        return f"({', '.join(map(told, value))})"
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return str(value) if isinstance(value, Path) else short(value)


def closest(name: object, names: Iterable[str]) -> str:
    """The end of a message about a wrong name: the names that look most like it."""
    close = difflib.get_close_matches(str(name), list(names), 3, 0.5)
    return f"; closest: {', '.join(close)}" if close else ""


# The names that other libraries have for arguments of ours: llama.cpp, its Python bindings, transformers, web APIs.
ELSEWHERE = {
    "max_tokens": "n", "max_new_tokens": "n", "max_length": "n", "n_predict": "n", "num_predict": "n", "n_tokens": "n",
    "max_completion_tokens": "n", "temperature": "temp", "topk": "top_k", "k": "top_k", "topp": "top_p", "p": "top_p",
    "minp": "min_p", "repetition_penalty": "repeat_penalty", "penalty": "repeat_penalty", "random_state": "seed",
    "stop_sequences": "stop", "stop_strings": "stop", "action": "actions", "hooks": "actions", "stream": "on_text",
    "callback": "on_text", "streamer": "on_text", "add_bos": "bos", "add_special_tokens": "bos", "text": "prompt",
    "input_ids": "prompt", "echo": "prompt", "keep": "actions (Save)",
    "n_threads": "threads", "num_threads": "threads", "model_path": "path", "file": "path", "max_seq_len": "n_ctx",
    "tokens": "prompt", "layer": "layers", "head": "heads", "top": "k",
}


def check_arguments(function: str, given: Iterable[str], known: Sequence[str] | None) -> None:
    """Raise ArgumentError for an argument that a function does not have; known=None: it takes any."""
    for name in given:
        if known is not None and name not in known:
            elsewhere = ELSEWHERE.get(name, "")
            near = difflib.get_close_matches(name, known, 1)
            meant = elsewhere if elsewhere.split(" ")[0] in known else near[0] if near else None
            means = f": here it is called {meant}" if meant else f"; it has {', '.join(known)}"
            raise ArgumentError(f"{function} has no argument {short(name)}{means}")


def arguments_of(function: Callable[..., Any]) -> list[str] | None:
    """The names of a function's arguments; None if it takes any name."""
    takes = inspect.signature(function).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else [name for name in takes if name != "self"]


def known_arguments(function: F) -> F:
    """Wrap a function so that an argument which it does not have is an ArgumentError that names the one meant."""
    known = arguments_of(function)

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        check_arguments(function.__name__, named, known)
        return function(*args, **named)

    return cast(F, checked)
