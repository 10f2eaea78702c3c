"""Recordings of llama.cpp's tensors: .npz files, with which numerics can be checked on a computer without llama.cpp.

They hold the tensors by our names, as --save writes them, so rows of llama.cpp can also be patched in from one. Names
of tensors in later passes end with the number of the pass: l_out-3@1, l_out-3@2.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinymia import Model
from tinymia_files import FileError, dumps, short
from tinymia_files.tensors import read_tensors

from .llama import Item, Outcome


def fingerprint(model: Model) -> int:
    """A checksum of all weights, to recognise the model."""
    crc = 0
    for name in sorted(model.weights):
        crc = zlib.crc32(np.ascontiguousarray(model.weights[name].raw).data, crc)
    return crc


class Recorder:
    """Writes tensors into an .npz file as they come, and at the end a description of them."""

    def __init__(self, f: IO[bytes]):
        self.zip, self.names = zipfile.ZipFile(f, "w"), dict[str, str]()

    def add(self, item: Item) -> None:
        """Write a tensor."""
        self.names.setdefault(item.name, item.theirs)
        self._write(f"{item.name}@{item.step}" if item.step else item.name, item.value)

    def finish(
        self, model: Model, prompt: str | None, ids: Sequence[int], how: dict[str, Any], outcome: Outcome
    ) -> None:
        """Write the description after the last tensor: model, prompt and flags, with which a later run must agree."""
        said = {**vars(outcome), "names": self.names, "weights": fingerprint(model), **how}
        about = {"model": model.about, "prompt": prompt, "tokens": list(ids), "llama.cpp": said}
        self._write("about", np.array(dumps(about)))
        self.zip.close()

    def _write(self, name: str, array: np.ndarray) -> None:
        info = zipfile.ZipInfo(f"{name}.npy")  # its date is 1980: the same tensors give the same file
        with self.zip.open(info, "w", force_zip64=True) as f:
            np.lib.format.write_array(f, array, allow_pickle=False)


def read_recording(
    path: str | Path, model: Model, ids: Sequence[int], how: dict[str, Any], n_predict: int
) -> tuple[list[Item], Outcome]:
    """Read the tensors of a recording, pass after pass, in our order. Raises FileError if it is of another run."""
    tensors, about = read_tensors(path)
    had = about.get("llama.cpp")
    if not isinstance(had, dict) or not isinstance(had.get("names"), dict):
        raise FileError(f"{path}: not a recording of llama.cpp: make one with verify --record")
    if about.get("model") != model.about or had.get("weights") != fingerprint(model):
        raise FileError(f"{path}: recorded from another model, or from other weights, than {model.path}")
    if about.get("tokens") != list(ids):
        raise FileError(f"{path}: recorded with another prompt: {short(about.get('prompt'))}")
    for key, value in how.items():
        if had.get(key) != value:
            raise FileError(f"{path}: recorded with {key} {had.get(key)}, and this run has {key} {value}")
    items: dict[tuple[int, str], Item] = {}
    for key, array in tensors.items():
        name, at, step = key.partition("@")
        if name not in model.table or (at and not (step.isascii() and step.isdigit() and len(step) < 7)):
            raise FileError(f"{path}: holds {key}, which is not a tensor of this model")
        k = int(step or 0)
        sizes = {**model.config.sizes(), "n_tok": 1 if k else len(ids), "n_kv": len(ids) + k}
        want = [sizes[d] for d in model.table[name][0].dims]
        if list(array.shape) != want:
            raise FileError(f"{path}: {key} is {list(array.shape)}; it is {want} for this prompt")
        items[k, name] = Item(name, str(had["names"].get(name, name)), array, k)
    try:
        outcome = Outcome(str(had["version"]), tokens=had["tokens"], output=had["output"], absent=list(had["absent"]))
        outcome.steps.update(dict(had["steps"]))
        outcome.unknown.update(dict(had["unknown"]))
        output = list(outcome.output or [])
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{path}: not what verify --record writes: {short(repr(e))}") from e
    if n_predict:
        if len(output) < n_predict and (not output or output[-1] not in model.tokenizer.end):
            raise FileError(f"{path}: recorded with -n {len(output)}, and this run has -n {n_predict}")
        outcome.output = output[:n_predict]
    steps = sorted({step for step, _ in items if step <= n_predict})
    return [items[step, name] for step in steps for name in model.table if (step, name) in items], outcome


def check_recorded(
    path: str | Path, given: Collection[str], names: Sequence[str], shown: set[str], asked: bool, inject: bool
) -> set[str]:
    """The names to show: all recorded ones, or the chosen ones. Raises FileError for a chosen one that is not there."""
    lost = [name for name in names if name not in given and (inject or (asked and name in shown))]
    if lost:
        raise FileError(f"{path}: holds no {lost[0]}{': --inject needs every tensor' if inject else ''}; it holds "
                        f"{short(', '.join(given))}")
    return shown & set(given)
