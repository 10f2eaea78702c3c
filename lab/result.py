"""What an experiment found, with all that is needed to repeat it: kept in a file, read again, gone on with.

An .npz file holds the arrays by their names and everything else as one string of JSON; a .json file holds arrays as
nested lists, NaN as null, and their types. Cells of an array that are not done yet are NaN.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from glob import escape
from pathlib import Path
from re import sub
from typing import Any, TypeVar

import numba
import numpy as np

import tinymia
from tinymia import Error, Model
from tinymia_files import check_target, short, write_atomic

R = TypeVar("R", bound="Result")
SAME = ("command", "settings", "model", "prompts")  # parts of `about` that two runs must share to be the same


@dataclass
class Result:
    """Base of what the lab's functions give. Fields are NumPy arrays, or what JSON can hold."""

    about: dict[str, Any]       # command, settings, model, prompts, versions

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are arrays."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray)}

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it: arrays as nested lists, what is no number as null."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def save(self, path: str | Path) -> None:
        """Write it to a .npz or .json file, whole or not at all. Raises Error."""
        check_target(path, [])
        kind, suffix, arrays = type(self).__name__, Path(path).suffix, self.arrays()
        if suffix == ".npz":
            rest = {"kind": kind, **{k: v for k, v in self.to_json().items() if k not in arrays}}
            write_atomic(path, lambda f: np.savez_compressed(f, result=np.array(dumps(rest)), **arrays))
        elif suffix == ".json":
            types = {name: str(array.dtype) for name, array in arrays.items()}
            text = dumps({"kind": kind, "arrays": types, **self.to_json()}) + "\n"
            write_atomic(path, lambda f: f.write(text.encode()))
        else:
            raise Error(f"{path}: a result is kept in a .npz or a .json file")

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """The result in a file. Raises Error for a file that holds none, or one of another kind."""
        path = Path(path).expanduser()
        try:
            found = _read_npz(path) if path.suffix == ".npz" else _read_json(path)
            kind, names = found.pop("kind"), {f.name for f in fields(cls)}
        except OSError as e:
            raise Error(f"{path}: cannot be read: {e.strerror or e}") from e
        except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as e:
            raise Error(f"{path}: not a saved result: {short(str(e))}") from e
        if kind != cls.__name__ or names != found.keys():
            raise Error(f"{path}: holds a result of the kind {kind}, or of another version, not {cls.__name__}")
        return cls(**found)


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as f:
        arrays = {name: f[name] for name in f.files if name != "result"}
        return json.loads(str(f["result"])) | arrays


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    for name, kind in found.pop("arrays").items():
        dtype = np.dtype(kind)
        found[name] = np.array(found[name], np.float64 if dtype.kind == "f" else dtype).astype(dtype)  # null is NaN
    return found


def plain(value: Any) -> Any:
    """The same as JSON can hold it: arrays as lists, paths as text, what is no number as null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def dumps(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


@lru_cache(maxsize=8)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_hash(path: str | Path) -> str:
    """SHA-256 of a model's file in hexadecimal; of a split model, that of its parts' hashes in their order."""
    path = Path(path)
    parts = sorted(path.parent.glob(sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", escape(path.name))))
    hashes = [_sha256(part, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def about(
    model: Model, command: str, settings: dict[str, Any], **prompts: str | Sequence[int] | Sequence[Any]
) -> dict[str, Any]:
    """All that is needed to repeat a run: command, settings, model, prompts with their tokens, versions.

    A prompt is a text or ids, or a list of prompts.
    """
    return {
        "command": command,
        "settings": plain(settings),
        "model": {"name": model.config.name, "path": str(model.path), "sha256": model_hash(model.path),
                  "numerics": model.numerics},
        "prompts": {name: _prompt(model, prompt) for name, prompt in prompts.items()},
        "versions": {"tinymia": tinymia.__version__, "python": platform.python_version(), "numpy": np.__version__,
                     "numba": numba.__version__},
    }


def _prompt(model: Model, prompt: Any) -> Any:
    if not isinstance(prompt, str) and any(not isinstance(i, (int, np.integer)) for i in prompt):
        return [_prompt(model, one) for one in prompt]
    ids = model.ids(prompt)
    return {"text": model.text(prompt), "tokens": ids, "pieces": [model.piece(i) for i in ids]}


def describe(value: Any) -> Any:
    """An action, or what one holds, as settings: arrays by shape and hash, runs by their tokens, functions by name."""
    if isinstance(value, tinymia.Action):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        return {"action": type(value).__name__, **{k: describe(v) for k, v in given.items()}}
    if isinstance(value, np.ndarray) and value.size > 16:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {list(value.shape)} sha256 {digest}"
    if isinstance(value, tinymia.Run):
        return {"run": value.tokens}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    return getattr(value, "__qualname__", repr(value)) if callable(value) else plain(value)


def resume(path: str | Path | None, about: dict[str, Any], cls: type[R]) -> R | None:
    """What an earlier run, stopped or done, left in a file; None where there is no file.

    Raises Error when the file holds another run, and says in what it differs. Versions and the model's path may.
    """
    if path is None or not Path(path).expanduser().exists():
        return None
    found = cls.load(path)
    old, new = ({k: v for part in SAME for k, v in _flat(one.get(part), part).items() if k != "model path"}
                for one in (found.about, plain(about)))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise Error(f"{path}: holds another run: its {key} is {short(old.get(key))}, not {short(new.get(key))}; "
                        "remove the file, or name another")
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dictionaries by their path: {"settings layer": 3}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name} {key}").items()}
