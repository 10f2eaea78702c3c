"""llama.cpp's control vectors: a GGUF file with one direction per layer, which is added to the residual stream.

    general.architecture        "controlvector"
    controlvector.model_hint    architecture of the model it was made for
    controlvector.layer_count   int32, how many directions there are
    direction.L                 F32 [n_embd], L from 1 on: added to l_out-L, of every token in every pass

Layers are counted from 0, and layer 0 never has a direction. llama-cvector-generator is off by one: its direction.L is
a difference of l_out-(L-1), which llama.cpp then adds to l_out-L.
Source: llama.cpp: common/common.cpp (common_control_vector_load_one), src/llama-adapter.cpp (llama_adapter_cvec),
src/models/llama.cpp (build_cvec before l_out), tools/cvector-generator (export_gguf).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Config, GGUFError
from tinymia_files import expand, read_gguf, reading, short, write_atomic

from ..runs.result import dumps

ARCHITECTURE, ABOUT = "controlvector", "tinymia.about"


def read_control_vector(path: str | Path, config: Config) -> dict[int, np.ndarray]:
    """The directions of a file, float32 [n_embd] by layer. Raises GGUFError if they do not fit a model of this shape.

    A direction for a layer that the model does not have is an error here; llama.cpp ignores it.
    """
    with reading(path, "a control vector", GGUFError):
        return _read(expand(path), config)


def _read(path: Path, config: Config) -> dict[int, np.ndarray]:
    meta, tensors = read_gguf(path)
    kind = meta.get("general.architecture")
    if kind != ARCHITECTURE:
        raise GGUFError(f"{path}: not a control vector: general.architecture is {short(kind)}, not {ARCHITECTURE!r}")
    found: dict[int, np.ndarray] = {}
    for name, tensor in tensors.items():
        number = re.fullmatch(r"direction\.([1-9]\d{0,5})", name)
        if number is None:
            raise GGUFError(f"{path}: a control vector has tensors direction.1, direction.2, ..., not {short(name)}")
        layer = int(number[1])
        if layer >= config.n_layer:
            raise GGUFError(f"{path}: {name}: the model's layers are 0 to {config.n_layer - 1}: made for another one?")
        if tensor.type_name != "F32":
            raise GGUFError(f"{path}: {name} is {tensor.type_name}; it must be F32")
        if tensor.shape[-1] != config.n_embd or tensor.raw.size != 4 * config.n_embd:
            raise GGUFError(f"{path}: {name} is {list(tensor.shape)}; the model's layers are [{config.n_embd}] wide")
        found[layer] = tensor.numpy().reshape(-1)
        if not np.isfinite(found[layer]).all():
            raise GGUFError(f"{path}: {name} has numbers that are not finite")
    if not found:
        raise GGUFError(f"{path}: a control vector without directions")
    return dict(sorted(found.items()))


def write_control_vector(
    path: str | Path, directions: Mapping[int, np.ndarray], model_hint: str, about: dict[str, Any]
) -> None:
    """Write directions, float32 [n_embd] by layer, for llama.cpp; `about` is written as JSON, which llama.cpp ignores.

    Raises Error for layer 0, and for a file that cannot be written.
    """
    import gguf

    if min(directions, default=0) < 1:
        raise GGUFError(f"{path}: llama.cpp's control vectors begin at layer 1: leave layer 0 out")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "control.gguf"
        writer = gguf.GGUFWriter(whole, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_int32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(ABOUT, dumps(about))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = whole.read_bytes()
    write_atomic(path, lambda f: f.write(written))
