"""Work on many items, here or on the workers of any `concurrent.futures` executor: threads, processes, a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

import tinymia
from tinymia import Error, Model

Item = TypeVar("Item")
Found = TypeVar("Found")

How = tuple[Path, int, str, tuple[str, ...]]    # file, threads, numerics, hashes of its parts
_shared: WeakValueDictionary[How, Model] = WeakValueDictionary()  # the models of callers in this process
_opening = Lock()


@lru_cache(maxsize=1)
def _open(path: Path, threads: int, numerics: str, hashes: tuple[str, ...]) -> Model:
    model = tinymia.load(path, threads, numerics)
    if tuple(file.sha256() for file in model.files) != hashes:
        raise Error(f"{path}: another file lies there than the one that was loaded")
    return model


def _call(how: How, fn: Callable[[Model, Item], Found], item: Item) -> Found:
    with _opening:
        model = _shared.get(how) or _open(*how)
    return fn(model, item)


def spread(
    model: Model, fn: Callable[[Model, Item], Found], items: Sequence[Item], executor: Executor | None = None
) -> Iterator[Found]:
    """Yield fn(model, item) for each item, in order.

    The threads of an executor share the model; workers that are processes open its file, once per process.
    """
    if executor is None:
        yield from (fn(model, item) for item in items)
        return
    how = (model.path.resolve(), model.threads, model.numerics, tuple(file.sha256() for file in model.files))
    _shared[how] = model
    futures = [executor.submit(_call, how, fn, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def commit(result: Any, **fields: np.ndarray) -> None:
    """Set several fields of a result in one step, so that Ctrl-C cannot come between them."""
    vars(result).update(fields)
