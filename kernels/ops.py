"""The operations between matrix products: RMS norm, rotary positions, SiLU. Each returns a fresh float32 array."""

import numpy as np

from .jit import inline, kernel
from .lanes import total
from .simd import address_of, store
from .threads import Pool, run
from .vectors import exp, f64x1, f64x16, load_f32x1, load_f32x16, to_f64


def _float32(name: str, x: np.ndarray, ndim: int) -> None:
    if x.dtype != np.float32 or x.ndim != ndim or not x.flags.c_contiguous:
        raise ValueError(f"{name} is a contiguous float32 array of {ndim} dimensions, not {x.dtype} {x.shape}")


@kernel
def rms_norm_rows(x, eps, out, t0, t1):
    n, start = x.shape[1], address_of(x)
    for t in range(t0, t1):
        row = start + 4 * t * n
        squares, rest = f64x16(0), f64x1(0)
        for i in range(0, n - 15, 16):
            v = load_f32x16(row + 4 * i)
            squares = squares + to_f64(v * v)
        for i in range(n - n % 16, n):
            v = load_f32x1(row + 4 * i)
            rest = rest + to_f64(v * v)
        mean = np.float32((total(squares) + total(rest)) / n)
        scale = np.float32(1) / np.sqrt(mean + eps)
        for i in range(n):
            out[t, i] = x[t, i] * scale


def rms_norm(x: np.ndarray, eps: float, pool: Pool | None = None) -> np.ndarray:
    """out[t] = x[t] / sqrt(mean(x[t] ** 2) + eps), float32 [n_tok, n_embd].

    The products are float32, their sum is float64, the rest float32.
    Source: ggml-cpu/ops.cpp, ggml_compute_forward_rms_norm_f32.
    """
    _float32("x", x, 2)
    out = np.empty(x.shape, np.float32)
    run(pool, x.nbytes, rms_norm_rows, x.shape[0], x, np.float32(eps), out)
    return out


@kernel
def rope_rows(x, cos, sin, out, t0, t1):
    n_head, d_head, half = x.shape[1], x.shape[2], cos.shape[1]
    for t in range(t0, t1):
        for h in range(n_head):
            for i in range(half):
                a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                out[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
                out[t, h, 2 * i + 1] = a * sin[t, i] + b * cos[t, i]
            for i in range(2 * half, d_head):
                out[t, h, i] = x[t, h, i]


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pool: Pool | None = None) -> np.ndarray:
    """Turn the pairs (x[2i], x[2i+1]) of each head by the angle whose cosine and sine are given.

    out[2i] = x[2i] cos[i] - x[2i+1] sin[i], out[2i+1] = x[2i] sin[i] + x[2i+1] cos[i]; elements from n_rot on stay.
    x: float32 [n_tok, n_head, d_head]; cos, sin: float32 [n_tok, n_rot / 2]. ValueError when shapes do not fit.
    Source: ggml-cpu/ops.cpp, ggml_compute_forward_rope_flt, mode GGML_ROPE_TYPE_NORMAL.
    """
    _float32("x", x, 3)
    _float32("cos", cos, 2)
    if sin.shape != cos.shape or sin.dtype != cos.dtype or not sin.flags.c_contiguous:
        raise ValueError(f"cos is {cos.dtype} {cos.shape}, sin {sin.dtype} {sin.shape}: they must be alike")
    if cos.shape[0] != x.shape[0] or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos and sin of {cos.shape} do not fit x of {x.shape}: [n_tok, at most d_head / 2]")
    out = np.empty(x.shape, np.float32)
    run(pool, x.nbytes, rope_rows, x.shape[0], x, cos, sin, out)
    return out


@inline
def _silu(x):
    return x / (exp(x * -1.0) + 1.0)


@kernel
def silu_all(x, out, i0, i1):
    x, out = address_of(x), address_of(out)
    for i in range(i0, i1 - 15, 16):
        store(out + 4 * i, _silu(load_f32x16(x + 4 * i)))
    for i in range(i1 - (i1 - i0) % 16, i1):
        store(out + 4 * i, _silu(load_f32x1(x + 4 * i)))


def silu(x: np.ndarray, pool: Pool | None = None) -> np.ndarray:
    """out = x / (1 + exp(-x)), float32 of any shape. Source: ggml-cpu/vec.h, ggml_silu_f32."""
    _float32("x", x, x.ndim)
    out = np.empty(x.shape, np.float32)
    run(pool, x.nbytes, silu_all, x.size, x.reshape(-1), out.reshape(-1))
    return out
