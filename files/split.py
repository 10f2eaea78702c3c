"""Models split over several files, `NAME-00001-of-00003.gguf`: the name of any part stands for the model.

Each part is a complete GGUF file with some of the tensors. The first part has the metadata; every part has split.no
(from 0), split.count, and split.tensors.count, the number of tensors in all parts together.
Source: llama.cpp, tools/gguf-split/gguf-split.cpp and llama_split_path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import GGUFError, short
from .gguf import Tensors, read_part


def read_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Map a model, with all its parts if it is split, and read its index: (metadata, tensors by name).

    Raises GGUFError for a file that is not GGUF, and for parts that are missing or belong to different models.
    """
    meta, tensors = read_part(path)
    no, count, total = _numbers(meta, path)
    if count < 2:
        return meta, tensors
    suffix = f"-{no + 1:05}-of-{count:05}.gguf"
    if not path.name.endswith(suffix):
        found = f"part {no + 1} of {count}: its name must end in {suffix}, as the other parts are found by name"
        raise GGUFError(f"{path}: the file is {found}")
    parts = [path.with_name(f"{path.name.removesuffix(suffix)}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    read = [(meta, tensors) if i == no else _other(part, path, i, count, total) for i, part in enumerate(parts)]
    whole = Tensors()
    whole.files = tuple(file for _, some in read for file in some.files)
    for part, (_, some) in zip(parts, read):
        twice = whole.keys() & some.keys()
        if twice:
            first = next(p for p, (_, other) in zip(parts, read) if min(twice) in other)
            raise GGUFError(f"{part}: tensor {min(twice)} is also in {first.name}")
        whole |= some
    if len(whole) != total:
        raise GGUFError(f"{path}: split.tensors.count is {total}, but the {count} parts hold {len(whole)} tensors")
    return read[0][0], whole


def _numbers(meta: dict[str, Any], path: Path) -> tuple[int, int, int]:
    """split.no, split.count and split.tensors.count; a count of 0 for a file that is not split."""

    def number(key: str, limit: int) -> int:
        value = meta.get(key)
        if type(value) is not int or not 0 <= value < limit:
            raise GGUFError(f"{path}: {key} is {'missing' if value is None else short(value)}, in a split model")
        return value

    count = number("split.count", 2**16) if "split.count" in meta else 0
    if count < 2:
        return 0, 0, 0
    no = number("split.no", 2**16)
    if no >= count:
        raise GGUFError(f"{path}: split.no is {no}, but split.count {count}: parts are numbered from 0")
    return no, count, number("split.tensors.count", 2**31)


def _other(part: Path, named: Path, no: int, count: int, total: int) -> tuple[dict[str, Any], Tensors]:
    """Read one of the other parts, which must belong to the same model as the named one."""
    if not part.exists():
        raise GGUFError(f"{part}: part {no + 1} of {count} of the model is missing")
    meta, tensors = read_part(part)
    found = _numbers(meta, part)
    if found != (no, count, total):
        is_, wanted = (f"part {n + 1} of {c} ({t} tensors in all)" if c else "no part" for n, c, t in (
            found, (no, count, total)))
        raise GGUFError(f"{part}: the file is {is_}, not {wanted} as {named.name} asks for: of another model?")
    return meta, tensors
