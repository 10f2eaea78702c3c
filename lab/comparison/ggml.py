"""Access to llama-cpp-python: the package, its log, its calls, and ggml's functions that read and write a tensor."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinymia import Error


class Head(ctypes.Structure):
    """The first fields of struct ggml_tensor (ggml.h)."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                ("nb", ctypes.c_size_t * 4)]


class Ggml:
    """The functions of ggml that read and write a tensor."""

    SIGNATURES: ClassVar = {
        "ggml_get_name": (ctypes.c_char_p, ctypes.c_void_p),
        "ggml_op_desc": (ctypes.c_char_p, ctypes.c_void_p),
        "ggml_nbytes": (ctypes.c_size_t, ctypes.c_void_p),
        "ggml_nelements": (ctypes.c_int64, ctypes.c_void_p),
        "ggml_backend_tensor_get": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_set": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
    }

    get_name: Any
    op_desc: Any
    nbytes: Any
    nelements: Any
    backend_tensor_get: Any
    backend_tensor_set: Any

    def __init__(self, package: Any):
        folder = Path(package.__file__).parent / "lib"
        found = sorted(folder.glob("*ggml-base*"))
        if not found:
            raise Error(f"llama-cpp-python {package.__version__} has no ggml-base library in its folder lib")
        lib = ctypes.CDLL(str(found[0]))
        for name, (result, *arguments) in self.SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def label(self, t: int) -> tuple[str, str]:
        """The name and the operation of the tensor at this address."""
        return self.get_name(t).decode("utf-8", "replace"), self.op_desc(t).decode()

    def read(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a tensor: its values, ggml's dimensions in reverse order, and the bytes of which they are a view."""
        head = Head.from_address(t)
        ne, nb = head.ne[:], head.nb[:]
        kinds: dict[int, np.dtype[Any]] = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}
        dtype = kinds.get(head.type)
        if math.prod(ne) != self.nelements(t) or dtype is None or nb[0] != dtype.itemsize:
            raise Error(f"llama.cpp's {self.label(t)[0]} is of ggml type {head.type} and shape {ne}, and floats are "
                        "expected: this version of llama.cpp may lay its tensors out in a way of its own")
        raw = np.empty(self.nbytes(t), np.uint8)
        self.backend_tensor_get(t, raw.ctypes.data, 0, raw.size)
        return np.ndarray(ne[::-1], dtype, raw, 0, nb[::-1]), raw

    def write(self, t: int, raw: np.ndarray) -> None:
        """Write all bytes of a tensor back."""
        self.backend_tensor_set(t, raw.ctypes.data, 0, raw.size)


def package() -> Any:
    """Import llama_cpp. Raises Error, which says how to install it."""
    try:
        import llama_cpp
    except Exception as e:  # if its library cannot be loaded, any exception may come
        reason = f"{type(e).__name__}: {e}"
        raise Error(f"verify runs llama.cpp beside tinymia: pip install 'tinymia[verify]' ({reason})") from e
    return llama_cpp


@contextlib.contextmanager
def quiet(llama_cpp: Any) -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal in the block, which gets a list of the last lines, newest first."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        lines[:] = [text.decode("utf-8", "replace").strip(), *lines[:19]]

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        before = getattr(getattr(llama_cpp, "_logger", None), "llama_log_callback", None)
        llama_cpp.llama_log_set(before or llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def why(log: list[str]) -> str:
    """The reason for a failure: the last two lines of a log."""
    return "; ".join([line for line in log if line][:2]) or "it does not say why"


def tokenize(llama_cpp: Any, vocab: Any, text: str) -> list[int]:
    """The ids of a text as llama.cpp cuts it, with BOS if its vocabulary adds one."""
    raw = text.encode()
    out = (llama_cpp.llama_token * (len(raw) + 16))()
    return out[: max(llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), True, True), 0)]


def decode(llama_cpp: Any, context: Any, ids: list[int], start: int) -> None:
    """Run these tokens from position `start` on, with logits for each. Raises Error."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise Error(f"llama.cpp gave up on {len(ids)} tokens: llama_decode returned {status}")


def best(llama_cpp: Any, context: Any, vocab: Any) -> int:
    """The token with the greatest logit in the last row."""
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, (llama_cpp.llama_vocab_n_tokens(vocab),)).argmax())
