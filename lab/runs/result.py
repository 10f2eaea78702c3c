"""The results of experiments, with all that is needed to repeat them: saved in a file, loaded, and resumed.

An .npz file holds the arrays by name and everything else as one string of JSON; a .json file holds arrays as nested
lists, with NaN as null, and their types. Cells of an array that are not computed yet are NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numba
import numpy as np

import tinymia
from tinymia import Error, Model
from tinymia_files import check_target, dumps, expand, plain, read_json, read_npz, reading, short, write_atomic

__all__ = ["Result", "about", "describe", "dumps", "model_hash", "plain", "resume"]
R = TypeVar("R", bound="Result")
SCREEN = (120, 24)  # columns and lines if stdout is not a terminal
SAME = ("command", "settings", "model", "prompts")  # parts of `about` that two runs must share to be the same


@dataclass
class Result:
    """The base of what the lab's functions return. Fields are NumPy arrays, or values that JSON can hold."""

    about: dict[str, Any]       # command, settings, model, prompts, versions

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        setattr(cls, "__repr__", Result.__repr__)   # noqa: B010  or @dataclass would write one that prints every number

    def __str__(self) -> str:
        """The text that the command prints. Each kind of result has its own."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """The lines of the text, cut to the screen; the names of the fields if the result is not complete yet."""
        try:
            lines = str(self).splitlines()
        except Exception:
            return f"{type(self).__name__}({', '.join(f.name for f in fields(self))})"
        width, height = shutil.get_terminal_size(SCREEN)
        shown = [line if len(line) <= width or "\x1b" in line else line[: width - 1] + "…" for line in lines]
        if len(shown) > height - 2:
            shown[height - 3 :] = [f"... and {len(shown) - height + 3} more lines"]
        return "\n".join(shown)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are arrays, by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray)}

    def to_json(self, arrays: bool = True) -> dict[str, Any]:
        """All fields, or all but the arrays, as JSON can hold them: arrays as lists, NaN and infinity as null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: plain(v) for name, v in values.items() if arrays or not isinstance(v, np.ndarray)}

    def save(self, path: str | Path) -> None:
        """Write the result to a .npz or .json file, completely or not at all. Raises Error."""
        check_target(path)
        kind, suffix, arrays = type(self).__name__, Path(path).suffix, self.arrays()
        if suffix == ".npz":
            rest = {"kind": kind, **self.to_json(arrays=False)}
            whole: dict[str, Any] = {"result": np.array(dumps(rest)), **arrays}
            write_atomic(path, lambda f: np.savez_compressed(f, **whole))
        elif suffix == ".json":
            types = {name: str(array.dtype) for name, array in arrays.items()}
            text = dumps({"kind": kind, "arrays": types, **self.to_json()}) + "\n"
            write_atomic(path, lambda f: f.write(text.encode()))
        else:
            raise Error(f"{path}: a result is kept in a .npz or a .json file")

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Load a result from a file. Raises Error for a file that holds none, or one of another kind."""
        with reading(path, "a saved result"):
            if Path(path).suffix not in (".npz", ".json"):
                raise Error(f"{path}: not a saved result, which is an .npz or a .json file")
            found = _read_npz(expand(path)) if Path(path).suffix == ".npz" else _read_json(path)
            kind, hints = found.pop("kind"), get_type_hints(cls)
            newer = {f.name for f in fields(cls) if f.default_factory is not MISSING}   # older files lack these fields
            if kind != cls.__name__ or not hints.keys() - newer <= found.keys() <= hints.keys():
                raise Error(f"{path}: holds a result of the kind {short(kind)}, or of another version, not "
                            f"{cls.__name__}")
            wrong = next((name for name, hint in hints.items() if name in found and not _fits(found[name], hint)), None)
            if wrong is not None:
                raise ValueError(f"its {wrong} is not a {getattr(hints[wrong], '__name__', hints[wrong])}")
        return cls(**found)


def _read_npz(path: Path) -> dict[str, Any]:
    arrays = read_npz(path)
    if "result" not in arrays:
        raise ValueError("it holds saved tensors" if "about" in arrays else "it holds other arrays")
    return json.loads(str(arrays.pop("result"))) | arrays


def _read_json(path: str | Path) -> dict[str, Any]:
    found = read_json(path, "a saved result")
    if not isinstance(found, dict) or not {"kind", "arrays"} <= found.keys():
        raise ValueError("it holds other JSON")
    for name, kind in found.pop("arrays").items():
        dtype = np.dtype(kind)
        if dtype.kind not in "fiubU":
            raise ValueError(f"an array of {dtype}")
        found[name] = np.array(found[name], np.float64 if dtype.kind == "f" else dtype).astype(dtype)  # null is NaN
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of a field."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint is float:  # null is NaN
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return type(value) is (origin or hint)


def model_hash(model: Model) -> str:
    """SHA-256, in hexadecimal, of the file that a model was loaded from; for a split model, that of its parts' hashes.

    Raises Error if the file was written to since then.
    """
    hashes = [file.sha256() for file in model.files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def about(
    model: Model, command: str, settings: dict[str, Any], **prompts: str | Sequence[int] | Sequence[Any]
) -> dict[str, Any]:
    """All that is needed to repeat a run: command, settings, model, prompts with their tokens, versions.

    Each of `prompts` is a text, ids, or a list of prompts.
    """
    return {
        "command": command,
        "settings": plain(settings),
        "model": {"name": model.config.name, "path": str(model.path), "sha256": model_hash(model),
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
    """An action, or a field of one, as settings: arrays by shape and hash, runs by tokens, functions by name."""
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


def resume(path: str | Path | None, about: dict[str, Any], cls: type[R], inputs: Any = ()) -> R | None:
    """Load the result of an earlier run of the same command, complete or not; None if there is no such file.

    inputs: what the run is given, such as actions; the file must not be one of these. Raises Error for that, and if the
    file holds the result of another run; the message says where they differ. Versions and the model's path may differ.
    """
    if path is None:
        return None
    check_target(path, inputs=files_in(inputs))
    if not os.path.exists(expand(path)):
        return None
    found = cls.load(path)
    old, new = ({k: v for part in SAME for k, v in _flat(one.get(part), part).items() if k != "model path"}
                for one in (found.about, plain(about)))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise Error(f"{path}: holds another run: its {key.removeprefix('prompts ')} is {short(old.get(key))}, not "
                        f"{short(new.get(key))}; remove the file, or name another")
    return found


def files_in(value: Any) -> list[str | Path]:
    """The files that a run reads: paths among its arguments, and the sources of actions."""
    if isinstance(value, (str, Path)):
        return [value]
    if isinstance(value, tinymia.Action):
        return list(tinymia.files_read(value))
    if isinstance(value, (list, tuple)):
        return [file for one in value for file in files_in(one)]
    return []


def _flat(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dictionaries by their path, such as {"settings layer": 3}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name} {key}").items()}
