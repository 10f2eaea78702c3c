"""Saved activations: raw float32 as mia wrote it, or NumPy's .npy and .npz with what the numbers are.

A raw file is ggml's bytes of one tensor and nothing else. A .npy file is what np.save writes, then a line of JSON that
np.load does not read; an .npz file holds any number of tensors by name, and the JSON as `about`.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import FileError, short


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name and rename it: it is there whole or not at all. Raises FileError.

    What is there and is no regular file, a pipe or a device, is written to as it is.
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as f:
                write(f)
            return
        try:
            with open(temporary, "wb") as f:
                write(f)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror or e}") from e


def check_target(path: str | Path, names: Sequence[str]) -> None:
    """Raise FileError now for what write_tensors could not do after a long run."""
    path = Path(path).expanduser()
    if not os.path.isdir(path.parent):
        raise FileError(f"{path}: cannot be written: there is no folder {path.parent}, or no permission to see it")
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK):
        raise FileError(f"{path}: cannot be written: it is a folder, or there is no permission in its folder")
    if len(names) > 1 and path.suffix != ".npz":
        listed = short(", ".join(names))
        raise FileError(f"{path}: a file of this kind holds one tensor, an .npz file {len(names)}: {listed}")


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Save float32 arrays by name; the suffix decides the format (see the top of this file).

    `about` says where they come from: prompt, tokens, model. Raises FileError.
    """
    check_target(path, list(tensors))
    suffix = Path(path).suffix
    if suffix == ".npz":
        write_atomic(path, lambda f: np.savez(f, about=np.array(json.dumps(about)), **tensors))
        return
    ((name, array),) = tensors.items()
    if suffix == ".npy":
        tail = json.dumps({"name": name, **about}).encode() + b"\n"
        write_atomic(path, lambda f: (np.save(f, array), f.write(tail)))
    else:
        write_atomic(path, lambda f: f.write(array.tobytes()))


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(float32 arrays by name, about). A raw file is one flat array called "". Raises FileError."""
    path = Path(path).expanduser()
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as f:
                arrays = {name: f[name] for name in f.files}
            about = json.loads(str(arrays.pop("about", "{}")))
        elif path.suffix == ".npy":
            with open(path, "rb") as f:
                array = np.lib.format.read_array(f, allow_pickle=False)
                about = json.loads(f.read() or "{}")
            arrays = {about.get("name", ""): array}
        else:
            size = path.stat().st_size
            if size == 0 or size % 4:
                raise FileError(f"{path}: {size} bytes are no raw float32 tensor")
            return {"": np.fromfile(path, "<f4")}, {}
        if not isinstance(about, dict) or any(a.dtype.kind not in "fiu" for a in arrays.values()):
            raise ValueError("no arrays of numbers")
    except OSError as e:
        raise FileError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise FileError(f"{path}: not a saved tensor: {short(str(e))}") from e
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}, about


def read_tensor(path: str | Path, name: str, model: dict[str, Any]) -> tuple[np.ndarray, str]:
    """(the tensor `name` of a file, or the only one; its name there, "" in a raw file); refuses another model's."""
    arrays, about = read_tensors(path)
    if about.get("model", model) != model:
        raise FileError(f"{path}: saved from another model, {about['model']}; this one is {model}")
    if name not in arrays and len(arrays) != 1:
        raise FileError(f"{path}: holds no {name}; it holds {short(', '.join(arrays))}")
    held = name if name in arrays else next(iter(arrays))
    return arrays[held], held


def as_rows(
    array: np.ndarray, name: str, dims: Sequence[str], sizes: dict[str, int], source: str = "the source", held: str = ""
) -> np.ndarray:
    """A tensor with its token axis first.

    dims are the names of its dimensions, sizes those that are known: n_tok and n_kv are not. What has one dimension (a
    raw file, a vector) is cut into rows. Raises FileError when it does not fit, which names the source and what it
    holds.
    """
    shape, what = [sizes.get(d) for d in dims], f"{source} holds {held}," if held else f"{source} is"
    width = math.prod(d for d in shape if d)
    if array.ndim == 1:
        unknown = shape.count(None)
        n = round((array.size / width) ** (1 / unknown))
        if not n or n**unknown * width != array.size:
            raise FileError(f"{source}: {array.size} numbers are not rows of {width}, the width of {name}"
                            f"{'' if held else ': is it a saved tensor of this model?'}")
        array = array.reshape([d or n for d in shape])
    if array.ndim == len(shape) == 2 and array.shape[1] != width:
        raise FileError(f"{what} {array.shape[1]} wide; {name} is {width} wide")
    if array.ndim != len(shape) or any(d not in (None, have) for d, have in zip(shape, array.shape)):
        here = ", ".join(d if size is None else f"{d} {size}" for d, size in zip(dims, shape))
        raise FileError(f"{what} {list(array.shape)}; {name} is [{here}]")
    return np.moveaxis(array, dims.index("n_tok"), 0)
