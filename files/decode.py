"""Weights of types that have no kernel: gguf-py decodes them, once, to what kernels take.

    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S    UNROLLED, 8.6 bits a weight, which holds their numbers exactly
    all others                                        F16, or F32 when one of the numbers is too large for F16

Products with the others still see activations as ggml's CPU code quantises them for the type: Q8_K beside blocks of 256
weights, Q8_0 beside smaller ones. Source: ggml-cpu.c, type_traits_cpu (vec_dot_type).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import tinymia_kernels as kernels

F32, F16, UNROLLED = kernels.FORMATS[0], kernels.FORMATS[1], kernels.UNROLLED
SLICE = 1 << 20  # weights decoded at a time: gguf-py takes some tens of bytes for each while it works

# A weight is d * unit * (2 s + 1) * a whole number. By type: the unit; where the bytes with the scales s lie, and s's
# bits in them.  Source: ggml-common.h, block_iq1_s to block_iq3_s.
TABLES = {
    "IQ1_S": (0.125, slice(35, 50, 2), 0x70),
    "IQ1_M": (0.125, slice(48, 56), [0xFF, 0x0F] * 4),
    "IQ2_XXS": (0.125, slice(9, 66, 8), 0xF0),
    "IQ2_XS": (0.125, slice(66, 74), 0xFF),
    "IQ2_S": (0.125, slice(74, 82), 0xFF),
    "IQ3_XXS": (0.25, slice(69, 98, 4), 0xF0),
    "IQ3_S": (1.0, slice(106, 110), 0xFF),
}


def decodable(kind: int) -> kernels.Format | None:
    """What a block of a ggml type is, without kernels, when gguf-py can decode the type."""
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        block_size, type_size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, type_size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kernels.Format(known.name, kind, block_size, type_size, "Q8_K" if block_size == 256 else "Q8_0")


def _target(fmt: kernels.Format) -> kernels.Format:
    return UNROLLED if fmt.name in TABLES else F16


def decode(raw: np.ndarray, fmt: kernels.Format, n_rows: int, n_in: int) -> tuple[kernels.Format, np.ndarray]:
    """The rows in a format that has kernels: (format, bytes). The format keeps the name and number of the type."""
    to, rows, step = _target(fmt), raw.reshape(n_rows, -1), max(1, SLICE // n_in)
    out = np.empty((n_rows, to.row_bytes(n_in)), np.uint8)
    for i in range(0, n_rows, step):
        some = rows[i : i + step]
        if to is UNROLLED:
            out[i : i + step] = _unroll(some.reshape(-1, fmt.type_size), fmt).reshape(len(some), -1)
            continue
        numbers = _dequantise(some, fmt)
        with np.errstate(over="ignore"):
            if to is F16 and (np.isinf(numbers.astype(np.float16)) & np.isfinite(numbers)).any():
                to, out = F32, out.view(np.float16).astype(np.float32).view(np.uint8)
            out[i : i + step] = numbers.astype(np.float16 if to is F16 else np.float32).view(np.uint8)
    out.flags.writeable = False
    if to is UNROLLED:
        return replace(to, name=fmt.name, type=fmt.type), out.reshape(-1)
    return replace(to, name=fmt.name, type=fmt.type, activation=fmt.activation), out.reshape(-1)


def _dequantise(blocks: np.ndarray, fmt: kernels.Format) -> np.ndarray:
    import gguf

    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(fmt.type))


def _unroll(blocks: np.ndarray, fmt: kernels.Format) -> np.ndarray:
    """Blocks [n, type_size] as UNROLLED [n, 276], by decoding them three times: the quotients are the factors."""
    unit, place, bits = TABLES[fmt.name]
    d_is_1 = blocks.copy()
    if fmt.name == "IQ1_M":  # d is in the upper four bits of the last four u16, in a sequence of its own
        d_is_1[:, 49::2] = d_is_1[:, 49::2] & 0x0F | np.array([0, 0, 0xC0, 0x30], np.uint8)
    else:
        d_is_1[:, :2] = 0x00, 0x3C
    scales_are_1 = d_is_1.copy()
    scales_are_1[:, place] &= ~np.array(bits, np.uint8)
    whole, scaled, weights = (_dequantise(some, fmt) for some in (scales_are_1, d_is_1, blocks))
    out = np.empty((len(blocks), UNROLLED.type_size), np.uint8)
    out[:, :256] = whole / unit + 128
    out[:, 256:272] = scaled[:, ::16] / whole[:, ::16]
    out[:, 272:] = (weights[:, :1] / scaled[:, :1] * np.float32(unit)).view(np.uint8)
    return out


def say_cost(path: Path, weights: list[tuple[kernels.Format, int]]) -> None:
    """One line on stderr: what decoding these weights, of which format and number each is, costs in memory."""
    if not weights:
        return
    types = ", ".join(sorted({fmt.name for fmt, _ in weights}))
    to = " and ".join(sorted({"bytes" if _target(fmt) is UNROLLED else "F16" for fmt, _ in weights}))
    size = sum(n * _target(fmt).type_size // _target(fmt).block_size for fmt, n in weights)
    kernels.note(f"tinymia: {path}: decoding {len(weights)} tensors of type {types} to {to}: "
                 f"{size / 1e6:.1f} MB of memory")
