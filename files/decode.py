"""Weights of types that have no kernel: gguf-py decodes them, once, to a format that has one.

    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S    EXPANDED, 8.6 bits per weight, which holds their numbers exactly
    all others                                        F16, or F32 if one of the numbers is too large for F16

In products with the others, activations are still quantised as ggml's CPU code does for the type: to Q8_K for blocks of
256 weights, to Q8_0 for smaller ones. Source: ggml-cpu.c, type_traits_cpu (vec_dot_type).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import tinymia_kernels as kernels

from .disk import note
from .types import BlockType, dequantize

F32, F16, EXPANDED = kernels.FORMATS[0], kernels.FORMATS[1], kernels.EXPANDED
SLICE = 1 << 20  # weights decoded at a time, because gguf-py needs some tens of bytes per weight meanwhile

# A weight is d * unit * (2 s + 1) * a whole number. By type: the unit; the places of the bytes that hold the scales s;
# the bits of s in these bytes.  Source: ggml-common.h, block_iq1_s to block_iq3_s.
TABLES = {
    "IQ1_S": (0.125, slice(35, 50, 2), 0x70),
    "IQ1_M": (0.125, slice(48, 56), [0xFF, 0x0F] * 4),
    "IQ2_XXS": (0.125, slice(9, 66, 8), 0xF0),
    "IQ2_XS": (0.125, slice(66, 74), 0xFF),
    "IQ2_S": (0.125, slice(74, 82), 0xFF),
    "IQ3_XXS": (0.25, slice(69, 98, 4), 0xF0),
    "IQ3_S": (1.0, slice(106, 110), 0xFF),
}


def stored(raw: np.ndarray, kind: BlockType, n_rows: int, n_in: int) -> kernels.Matrix:
    """A weight as kernels take it: its bytes as they are, decoded if its type has no kernel."""
    fmt = kernels.FORMATS.get(kind.type)
    if fmt is None:
        fmt, raw = decode(raw, kind, n_rows, n_in)
    return kernels.Matrix.of(raw, fmt, n_rows, n_in)


def _target(fmt: BlockType) -> kernels.Format:
    return EXPANDED if fmt.name in TABLES else F16


def decode(raw: np.ndarray, fmt: BlockType, n_rows: int, n_in: int) -> tuple[kernels.Format, np.ndarray]:
    """Decode rows to a format that has kernels: (format, bytes). The format keeps the name and number of the type."""
    to, rows, step = _target(fmt), raw.reshape(n_rows, -1), max(1, SLICE // n_in)
    out = np.empty((n_rows, to.row_bytes(n_in)), np.uint8)
    for i in range(0, n_rows, step):
        some = rows[i : i + step]
        if to is EXPANDED:
            out[i : i + step] = _expand(some.reshape(-1, fmt.type_size), fmt).reshape(len(some), -1)
            continue
        numbers = dequantize(some.reshape(-1), fmt, n_in)
        with np.errstate(over="ignore"):
            if to is F16 and (np.isinf(numbers.astype(np.float16)) & np.isfinite(numbers)).any():
                to, out = F32, out.view(np.float16).astype(np.float32).view(np.uint8)
            out[i : i + step] = numbers.astype(np.float16 if to is F16 else np.float32).view(np.uint8)
    out.flags.writeable = False
    if to is EXPANDED:
        return replace(to, name=fmt.name, type=fmt.type), out.reshape(-1)
    activation = "Q8_K" if fmt.block_size == 256 else "Q8_0"
    return replace(to, name=fmt.name, type=fmt.type, activation=activation), out.reshape(-1)


def _expand(blocks: np.ndarray, fmt: BlockType) -> np.ndarray:
    """Blocks [n, type_size] as EXPANDED [n, 276].

    They are decoded three times: with scales and d of 1, with d of 1, and as they are. Quotients of the results are the
    scales and d.
    """
    unit, place, bits = TABLES[fmt.name]
    d_is_1 = blocks.copy()
    if fmt.name == "IQ1_M":  # here d is spread over the upper four bits of the last four u16
        d_is_1[:, 49::2] = d_is_1[:, 49::2] & 0x0F | np.array([0, 0, 0xC0, 0x30], np.uint8)
    else:
        d_is_1[:, :2] = 0x00, 0x3C
    scales_are_1 = d_is_1.copy()
    scales_are_1[:, place] &= ~np.array(bits, np.uint8)
    whole, scaled, weights = (dequantize(some.reshape(-1), fmt, 256) for some in (scales_are_1, d_is_1, blocks))
    out = np.empty((len(blocks), EXPANDED.type_size), np.uint8)
    out[:, :256] = whole / unit + 128
    out[:, 256:272] = scaled[:, ::16] / whole[:, ::16]
    out[:, 272:] = (weights[:, :1] / scaled[:, :1] * np.float32(unit)).view(np.uint8)
    return out


def say_cost(path: Path, weights: list[tuple[BlockType, int]]) -> None:
    """Write a line on stderr: how much memory decoding takes; weights: (type, number of weights) per tensor."""
    if not weights:
        return
    types = ", ".join(sorted({fmt.name for fmt, _ in weights}))
    to = " and ".join(sorted({"bytes" if _target(fmt) is EXPANDED else "F16" for fmt, _ in weights}))
    size = sum(n * _target(fmt).type_size // _target(fmt).block_size for fmt, n in weights)
    note(f"tinymia: {path}: decoding {len(weights)} tensors of type {types} to {to}: "
         f"{size / 1e6:.1f} MB of memory")
