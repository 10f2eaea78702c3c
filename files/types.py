"""The types of numbers that a GGUF file may hold, and their decoding with NumPy and gguf-py, without any kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import GGUFError


class BlockType(NamedTuple):
    """A type of ggml: it stores `block_size` numbers in `type_size` bytes."""

    type: int               # ggml's number
    name: str
    block_size: int
    type_size: int


# The types that have kernels; gguf-py decodes the others when a model is loaded.
# Source: ggml.h, enum ggml_type; ggml-common.h. A test compares the table with gguf.GGML_QUANT_SIZES and with
# kernels.FORMATS.
TYPES = {
    t[0]: BlockType(*t)
    for t in [
        (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2),
        (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210), (20, "IQ4_NL", 32, 18), (23, "IQ4_XS", 256, 136), (39, "MXFP4", 32, 17),
        (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
    ]
}


def dequantize(raw: np.ndarray, kind: BlockType, n_in: int) -> np.ndarray:
    """Decode rows of n_in numbers to float32 [n_rows, n_in], a copy; raw: uint8, their bytes. Raises GGUFError."""
    if kind.name == "F32":
        return raw.view(np.float32).reshape(-1, n_in).copy()
    if kind.name == "F16":
        return raw.view(np.float16).reshape(-1, n_in).astype(np.float32)
    if kind.name == "BF16":     # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, n_in)
    try:
        import gguf
    except ImportError as e:
        raise GGUFError(f"weights of type {kind.name} are decoded by gguf-py: pip install gguf ({e})") from e
    with np.errstate(all="ignore"):
        rows = raw.reshape(-1, n_in // kind.block_size * kind.type_size)
        return gguf.dequantize(rows, gguf.GGMLQuantizationType(kind.type)).reshape(-1, n_in)


def decodable(kind: int) -> BlockType | None:
    """The type with ggml's number `kind`, if gguf-py is installed and can decode it; else None."""
    try:
        import gguf

        known = gguf.GGMLQuantizationType(kind)
        block_size, type_size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, type_size), np.uint8), known)
    except (ImportError, ValueError, KeyError, NotImplementedError):
        return None
    return BlockType(kind, known.name, block_size, type_size)
