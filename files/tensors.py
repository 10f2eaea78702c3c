"""Saved activations: raw float32, as mia wrote it, or NumPy's .npy and .npz, with a description of the numbers.

A raw file holds the bytes of one tensor, as in ggml, and nothing else. A .npy file holds what np.save writes and then a
line of JSON, which np.load ignores. An .npz file holds any number of tensors by name, and the JSON under `about`.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .disk import dumps, expand, reading
from .errors import FileError, short
from .outputs import check_target, write_atomic

KINDS = {b"PK\3\4": "it begins as an .npz file", b"\x93NUMPY": "it begins as an .npy file", b"GGUF": "it is GGUF"}


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Save float32 arrays by name; the suffix decides the format (see the top of this file).

    about: where they come from (prompt, tokens, model). Raises FileError.
    """
    check_target(path, list(tensors))
    suffix = Path(path).suffix
    if suffix == ".npz":
        arrays: dict[str, Any] = {"about": np.array(dumps(about)), **tensors}
        write_atomic(path, lambda f: np.savez(f, **arrays))
        return
    ((name, array),) = tensors.items()
    if suffix == ".npy":
        tail = dumps({"name": name, **about}).encode() + b"\n"

        def write(f: IO[bytes]) -> None:
            np.save(f, array)
            f.write(tail)

        write_atomic(path, write)
    else:
        write_atomic(path, lambda f: f.write(array.tobytes()))


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(float32 arrays by name, about). A raw file is one flat array called "". Raises FileError."""
    name, about = expand(path), {}
    with reading(path, "a saved tensor"):
        if name.suffix == ".npz":
            arrays = read_npz(name)
            if "about" in arrays:
                about = json.loads(str(arrays.pop("about")))
        elif name.suffix == ".npy":
            with open(name, "rb") as f:
                array = read_npy(f, os.fstat(f.fileno()).st_size)
                about = json.loads(f.read() or "{}")
            arrays = {about.get("name", ""): array}
        else:
            data = name.read_bytes()
            if kind := next((kind for begin, kind in KINDS.items() if data.startswith(begin)), None):
                raise FileError(f"{path}: not raw float32, though its name has no .npy or .npz at the end: {kind}")
            if not data or len(data) % 4:
                raise FileError(f"{path}: {len(data)} bytes are not a raw float32 tensor: its size is a multiple of 4")
            return {"": np.frombuffer(data, "<f4").astype(np.float32)}, {}
        if not isinstance(about, dict) or any(a.dtype.kind not in "fiu" for a in arrays.values()):
            raise ValueError("it holds arrays that are not numbers")
        if not all(isinstance(key, str) for key in arrays):
            raise ValueError("the name of its tensor is not a text")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
            return {key: np.asarray(a, np.float32) for key, a in arrays.items()}, about


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name: numbers, texts and booleans. To be called inside `reading`."""
    arrays = {}
    with zipfile.ZipFile(path) as z:
        for info in z.infolist():
            if info.flag_bits & 1:
                raise ValueError("it is encrypted with a password")
            if info.file_size > 1100 * info.compress_size + 4096:  # deflate compresses by a factor of 1032 at most
                raise ValueError(f"{info.filename} claims {info.file_size} bytes, more than it has room for")
            with z.open(info) as f:
                arrays[info.filename.removesuffix(".npy")] = read_npy(f, info.file_size)
                if f.read():  # reading to the end also checks the checksum
                    raise ValueError(f"{info.filename} is longer than its array")
    return arrays


def read_npy(f: IO[bytes], size: int) -> np.ndarray:
    """The array of an .npy file of `size` bytes; memory is allocated only if it fits. To be called in `reading`."""
    version = np.lib.format.read_magic(f)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"version {version} of .npy")
    shape, by_columns, dtype = header[version](f)
    n = math.prod(shape)
    if dtype.kind not in "fiubU" or any(d < 0 for d in shape):
        raise ValueError(f"an array of {dtype}, shape {shape}")
    if n * dtype.itemsize > size - f.tell():
        raise ValueError(f"shape {shape} of {dtype} takes {n * dtype.itemsize} bytes, and {size - f.tell()} are there")
    data = f.read(n * dtype.itemsize)
    array = np.frombuffer(data, dtype, n) if data else np.zeros(n, dtype)
    return array.reshape(shape, order="F" if by_columns else "C").copy()


def read_tensor(path: str | Path, name: str, model: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The tensor `name` of a file, or its only tensor, and the name that it has there ("" in a raw file).

    Raises FileError if there is no such tensor, or if it was saved from another model than `model`.
    """
    arrays, about = read_tensors(path)
    if about.get("model", model) != model:
        theirs, ours = (", ".join(f"{k} {short(v)}" for k, v in one.items()) if isinstance(one, dict) else short(one)
                        for one in (about["model"], model))
        raise FileError(f"{path}: saved from another model ({theirs}); this one is {ours}")
    if name not in arrays and len(arrays) != 1:
        raise FileError(f"{path}: holds no {name}; it holds {short(', '.join(arrays))}")
    held = name if name in arrays else next(iter(arrays))
    return arrays[held], held


def as_rows(
    array: np.ndarray, name: str, dims: Sequence[str], sizes: dict[str, int], source: str = "the source", held: str = ""
) -> np.ndarray:
    """A tensor with its token axis first.

    dims: the names of its dimensions; sizes: the known sizes (all but n_tok and n_kv). An array of one dimension (a raw
    file, a vector) is cut into rows. Raises FileError, with the names of the source and of the tensor in it, if the
    array does not fit.
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
