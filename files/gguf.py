"""Reading GGUF: header, metadata and tensor table, with every length checked before it is used.

gguf-py's reader takes seconds to open a file with a large vocabulary; this one takes a tenth of a second.
"""

from __future__ import annotations

import copy
import math
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .disk import Mapped, expand
from .errors import GGUFError
from .types import TYPES, BlockType, decodable, dequantize

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Reader:
    """Reads a GGUF header from front to back, and checks before each step that the bytes are there.

    magic "GGUF" | u32 version | u64 n_tensors | u64 n_metadata | metadata | tensor table | padding | data
    metadata: string key, u32 type, value.  tensor: string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset.
    A string is a u64 length and UTF-8 bytes; an array is u32 type, u64 count and the elements. All little-endian.
    Source: ggml/docs/gguf.md.
    """

    def __init__(self, data: Mapped, path: Path):
        self.data, self.path, self.pos, self.end = data, path, 0, len(data)

    def need(self, n: int, what: str) -> int:
        """The position of the next n bytes; the reader moves past them. Raises GGUFError if they are missing."""
        if n > self.end - self.pos:
            raise GGUFError(f"{self.path}: ends inside {what} (at byte {self.pos} of {self.end}, {n} more are wanted)")
        self.pos += n
        return self.pos - n

    def scalar(self, code: str, what: str) -> Any:
        """The next number, of a type code of `struct`; `what` names it in an error. Raises GGUFError."""
        return struct.unpack_from("<" + code, self.data, self.need(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        """The next string; bytes that are not UTF-8 become U+FFFD. Raises GGUFError."""
        n = self.scalar("Q", what)
        pos = self.need(n, what)
        return str(self.data[pos : pos + n], "utf-8", "replace")

    def strings(self, n: int, what: str) -> list[str]:
        """The next n strings, read faster than by string(): a vocabulary has hundreds of thousands."""
        data, pos, end, found, length = self.data, self.pos, self.end, [], struct.Struct("<Q").unpack_from
        for _ in range(n):
            size = length(data, pos)[0] if pos <= end - 8 else 0
            if pos > end - 8 or size > end - pos - 8:
                self.pos = pos
                self.string(what)  # raises, with what is missing
            found.append(data[pos + 8 : pos + 8 + size])
            pos += 8 + size
        self.pos = pos
        return [piece.decode("utf-8", "replace") for piece in found]

    def value(self, kind: int, key: str) -> Any:
        """The next value of metadata, of a GGUF value type: number, text, list of texts or array. Raises GGUFError."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], key)
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            raise GGUFError(f"{self.path}: {key} has value type {kind}; GGUF knows 0 to 12")
        kind, n = self.scalar("I", key), self.scalar("Q", key)
        if kind == STRING:
            if n > (self.end - self.pos) // 8:  # so that a hostile count starts no endless loop
                raise GGUFError(f"{self.path}: {key} claims {n} strings, more than the file has room for")
            return self.strings(n, key)
        if kind not in SCALARS:
            raise GGUFError(f"{self.path}: {key} is an array of type {kind}; only scalars and strings are supported")
        dtype = np.dtype("<" + SCALARS[kind] if kind != 7 else "?")
        return np.frombuffer(self.data, dtype, n, self.need(n * dtype.itemsize, key)) if n else np.zeros(0, dtype)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight, as a view of its bytes in the mapped file."""

    name: str                   # as GGUF has it: blk.0.attn_q.weight
    shape: tuple[int, ...]      # NumPy's order: (n_out, n_in) for a matrix
    type: BlockType             # how a row is stored
    raw: np.ndarray             # uint8 [bytes], read-only, in the map
    scale: np.float32 | None = None     # a factor of all the numbers, and so of products with them

    @property
    def type_name(self) -> str:
        """ggml's name of the type, such as Q4_0."""
        return self.type.name

    @cached_property
    def stored(self) -> Any:
        """The weight for kernels: a kernels.Matrix of its bytes in the map, decoded if its type has no kernel."""
        from .decode import stored

        return stored(self.raw, self.type, math.prod(self.shape[:-1]), self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.raw.size

    def numpy(self) -> np.ndarray:
        """A dequantised copy, float32 [shape], times the scale if there is one."""
        x = dequantize(self.raw, self.type, self.shape[-1]).reshape(self.shape)
        return x if self.scale is None else x * self.scale

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Dequantised rows of a matrix, equal to those of numpy(): float32 [len(ids), n_in]."""
        x = dequantize(self.raw.reshape(self.shape[0], -1)[ids].reshape(-1), self.type, self.shape[1])
        return x if self.scale is None else x * self.scale

    def but(self, **fields: Any) -> Tensor:
        """A copy of this weight with other values in some fields."""
        other = copy.copy(self)
        vars(other).update(fields)
        return other

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type_name}, {list(self.shape)})"


class Tensors(dict[str, Tensor]):
    """The tensors of a model by name, and the files that they lie in."""

    files: tuple[Mapped, ...] = ()


def decode_now(path: Path, tensors: Iterable[Tensor]) -> None:
    """Decode the tensors whose types have no kernel, and say on stderr how much memory that takes."""
    weights = {t.name: t for t in tensors if t.type.type not in TYPES}
    if weights:
        from .decode import say_cost

        say_cost(path, [(t.type, math.prod(t.shape)) for t in weights.values()])
    for tensor in weights.values():
        _ = tensor.stored


def read_part(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Map one GGUF file and read its index: (metadata, tensors by name). See split.py for models in several files.

    Versions 2 and 3, little-endian. Raises GGUFError for everything that is inconsistent: nothing in a file is trusted.
    """
    r = Reader(_map(path), path)
    magic = r.data[:4]
    if magic != b"GGUF":
        raise GGUFError(f"{path}: not a GGUF file (it starts with {magic!r}, GGUF files start with b'GGUF')")
    r.pos = 4
    version = r.scalar("I", "the version")
    if version not in (2, 3):
        kind = "is big-endian" if version in (2 << 24, 3 << 24) else f"has GGUF version {version}"
        raise GGUFError(f"{path}: {kind}; supported: little-endian versions 2 and 3")
    n_tensors, n_meta = r.scalar("Q", "the tensor count"), r.scalar("Q", "the metadata count")
    if n_meta > r.end // 13 or n_tensors > r.end // 33:  # the fewest bytes that an entry takes
        raise GGUFError(f"{path}: claims {n_meta} metadata entries and {n_tensors} tensors, more than it has room for")
    meta: dict[str, Any] = {}
    for i in range(n_meta):
        key = r.string(f"metadata key {i}")
        if key in meta:
            raise GGUFError(f"{path}: metadata key {key} occurs twice")
        meta[key] = r.value(r.scalar("I", key), key)
    table = [_read_tensor_info(r, i) for i in range(n_tensors)]
    alignment = meta.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise GGUFError(f"{path}: general.alignment is {alignment!r}, it must be a positive multiple of 8")
    start = -(-r.pos // alignment) * alignment
    return meta, _place(table, r, start, alignment)


def _map(path: Path) -> Mapped:
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(expand(path), flags), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise GGUFError(f"{path}: not a regular file; -m takes a .gguf file")
            if os.fstat(f.fileno()).st_size == 0:
                raise GGUFError(f"{path}: the file is empty")
            return Mapped.open(f, path)
    except OSError as e:
        raise GGUFError(f"{path}: {e.strerror or e}") from e


Info = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset


def _read_tensor_info(r: Reader, i: int) -> Info:
    name = r.string(f"the name of tensor {i}")
    n_dims = r.scalar("I", name)
    if not 1 <= n_dims <= 4:
        raise GGUFError(f"{r.path}: tensor {name} has {n_dims} dimensions; 1 to 4 are possible")
    dims = tuple(r.scalar("Q", name) for _ in range(n_dims))
    return name, dims[::-1], r.scalar("I", name), r.scalar("Q", name)


def _place(table: list[Info], r: Reader, start: int, alignment: int) -> Tensors:
    """Check the place that each tensor claims in the file, and make a view of it."""
    tensors = Tensors()
    tensors.files = (r.data,)
    data = np.frombuffer(r.data, np.uint8)
    last, taken = "the header", 0  # the tensor before, and where its bytes end
    for name, shape, kind, offset in sorted(table, key=lambda entry: entry[3]):
        if name in tensors:
            raise GGUFError(f"{r.path}: tensor {name} occurs twice")
        fmt = TYPES.get(kind) or decodable(kind)
        if fmt is None:
            known = ", ".join(t.name for t in TYPES.values())
            what = f"tensor {name} has type {_type_name(kind)}; supported: {known}, and what gguf-py can decode"
            raise GGUFError(f"{r.path}: {what}")
        if min(shape) < 1 or math.prod(shape) > 8 * r.end:  # every format takes at least one bit per weight
            raise GGUFError(f"{r.path}: tensor {name} has shape {list(shape)}, which the file has no room for")
        if shape[-1] % fmt.block_size:
            row = f"rows of {shape[-1]}: {fmt.name} needs a multiple of {fmt.block_size}"
            raise GGUFError(f"{r.path}: tensor {name} has {row}")
        size = math.prod(shape) // fmt.block_size * fmt.type_size
        if offset % alignment:
            raise GGUFError(f"{r.path}: tensor {name} starts at {offset}, which is not aligned to {alignment}")
        if offset < taken:
            raise GGUFError(f"{r.path}: tensor {name} overlaps {last}")
        begin, end = start + offset, start + offset + size
        if end > r.end:
            raise GGUFError(f"{r.path}: tensor {name} ends at byte {end}, the file at {r.end}: is it truncated?")
        tensors[name] = Tensor(name, shape, fmt, data[begin:end])
        last, taken = name, offset + size
    return tensors


def _type_name(kind: int) -> str:
    import gguf

    known = {t.value: t.name for t in gguf.GGMLQuantizationType}
    return known.get(kind, f"{kind}, which ggml does not know")
