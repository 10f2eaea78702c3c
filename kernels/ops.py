"""The operations between matrix products: RMS norm, rotary positions, SiLU, GELU, soft caps.

Each returns a new float32 array.
"""

import math

import numpy as np

from .machine.half import to_half
from .machine.jit import inline, kernel
from .machine.lanes import first, fma, total
from .machine.simd import address_of, store
from .machine.threads import Pool, run
from .machine.vectors import exp, f32x1, f64x1, f64x16, load_f32x1, load_f32x16, to_f64
from .soft_max_rows import capped

F32 = np.dtype(np.float32)


def _float32(name: str, x: np.ndarray, ndim: int) -> None:
    """Raise ValueError unless x is a contiguous float32 array of so many dimensions."""
    if x.dtype != F32 or x.ndim != ndim or not x.flags.c_contiguous:
        raise ValueError(f"{name} is a contiguous float32 array of {ndim} dimensions, not {x.dtype} {x.shape}")


@kernel
def rms_norm_rows(x, eps, out, t0, t1):
    """Write the RMS norm of the tokens t0 to t1."""
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
    """Divide each row by its root mean square: out[t] = x[t] / sqrt(mean(x[t] ** 2) + eps), float32 [n_tok, n_embd].

    The squares are float32, their sum is float64, the rest is float32. ValueError for an array of another kind.
    Source: ggml-cpu/ops.cpp, ggml_compute_forward_rms_norm_f32.
    """
    _float32("x", x, 2)
    out = np.empty(x.shape, F32)
    run(pool, x.nbytes, rms_norm_rows, x.shape[0], x, np.float32(eps), out)
    return out


@kernel
def cos_sin_all(theta, cos, sin):
    """Write the cosine and the sine of each angle, by the C library."""
    for i in range(theta.size):
        cos[i], sin[i] = math.cos(theta[i]), math.sin(theta[i])


def rope_angles(
    positions: np.ndarray,
    n_rot: int,
    base: float,
    scale: float = 1.0,
    gain: float = 1.0,
    yarn: tuple[float, float] | None = None,
    freqs: np.ndarray | None = None,
    numerics: str = "ggml",
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, times `gain`, of the angles position * scale * base^(-2i / n_rot) / freqs[i].

    positions: [n_tok]; freqs: float32 [n_rot / 2]. Returns float32 [n_tok, n_rot / 2] twice. yarn = (low, high): pairs
    below `low` keep their angle, pairs above `high` are multiplied by scale, those between are blended.
    numerics "ggml" multiplies step by step in float32 and calls the C library's cosf and sinf, as ggml does; "f32"
    computes in float64 and rounds once.
    Source: ggml-cpu/ops.cpp, ggml_rope_cache_init and rope_yarn.
    """
    real = np.float32 if numerics == "ggml" else np.float64
    theta = np.empty((len(positions), n_rot // 2), real)
    theta[:, 0] = positions
    theta[:, 1:] = base ** float(real(-2) / real(n_rot))
    np.multiply.accumulate(theta, axis=1, out=theta)
    if freqs is not None:
        theta /= freqs
    scaled = theta * real(scale)
    if yarn is not None:
        low, high = real(yarn[0]), real(yarn[1])
        keep = 1 - np.clip((np.arange(n_rot // 2, dtype=real) - low) / max(real(0.001), high - low), 0, 1)
        # ggml's compiled code has a fused multiply-add here: float64 keeps the product unrounded for the sum.
        scaled = (scaled.astype(np.float64) * (1 - keep) + theta * keep).astype(real)
    if numerics != "ggml":
        return (np.cos(scaled) * gain).astype(np.float32), (np.sin(scaled) * gain).astype(np.float32)
    cos, sin = np.empty(scaled.shape, real), np.empty(scaled.shape, real)
    cos_sin_all(scaled.reshape(-1), cos.reshape(-1), sin.reshape(-1))
    return cos * real(gain), sin * real(gain)


@kernel
def rope_rows(x, cos, sin, out, t0, t1):
    """Write the rotated pairs of the tokens t0 to t1; `rope` has the formula."""
    n_head, d_head, half = x.shape[1], x.shape[2], cos.shape[1]
    for t in range(t0, t1):
        for h in range(n_head):
            for i in range(half):
                a, b, c, s = x[t, h, 2 * i], x[t, h, 2 * i + 1], cos[t, i], sin[t, i]
                out[t, h, 2 * i] = first(fma(f32x1(a), c, -(b * s)))
                out[t, h, 2 * i + 1] = first(fma(f32x1(a), s, b * c))
            for i in range(2 * half, d_head):
                out[t, h, i] = x[t, h, i]


# A kernel of its own: with the distance of a pair as an argument the compiler makes no vectors, and both take 6 times
# as long for 128 tokens.
@kernel
def rope_halves_rows(x, cos, sin, out, t0, t1):
    """Write the same for pairs whose two numbers lie half of the rotated elements apart."""
    n_head, d_head, half = x.shape[1], x.shape[2], cos.shape[1]
    for t in range(t0, t1):
        for h in range(n_head):
            for i in range(half):
                a, b, c, s = x[t, h, i], x[t, h, i + half], cos[t, i], sin[t, i]
                out[t, h, i] = first(fma(f32x1(a), c, -(b * s)))
                out[t, h, i + half] = first(fma(f32x1(a), s, b * c))
            for i in range(2 * half, d_head):
                out[t, h, i] = x[t, h, i]


def rope(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pool: Pool | None = None, halves: bool = False
) -> np.ndarray:
    """Rotate the pairs (a, b) of each head by the angle whose cosine and sine are given: a cos - b sin, a sin + b cos.

    Pair i is (x[2i], x[2i + 1]), with `halves` (x[i], x[i + n_rot / 2]). Elements from n_rot on are copied. The first
    product of each sum is part of a fused multiply-add, as in ggml's compiled code.
    x: float32 [n_tok, n_head, d_head]; cos, sin: float32 [n_tok, n_rot / 2]. ValueError when shapes do not fit.
    Source: ggml-cpu/ops.cpp, ggml_compute_forward_rope_flt, modes GGML_ROPE_TYPE_NORMAL and GGML_ROPE_TYPE_NEOX.
    """
    _float32("x", x, 3)
    _float32("cos", cos, 2)
    if sin.shape != cos.shape or sin.dtype != cos.dtype or not sin.flags.c_contiguous:
        raise ValueError(f"cos is {cos.dtype} {cos.shape}, sin {sin.dtype} {sin.shape}: they must be alike")
    if cos.shape[0] != x.shape[0] or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos and sin of {cos.shape} do not fit x of {x.shape}: [n_tok, at most d_head / 2]")
    out = np.empty(x.shape, F32)
    run(pool, x.nbytes, rope_halves_rows if halves else rope_rows, x.shape[0], x, cos, sin, out)
    return out


@inline
def _silu(x):
    """x / (1 + exp(-x)) of each lane of a vector."""
    return x / (exp(x * -1.0) + 1.0)


@kernel
def silu_rows(x, out, t0, t1):
    """Write SiLU of the tokens t0 to t1."""
    n, start, to = x.shape[1], address_of(x), address_of(out)
    for t in range(t0, t1):
        for i in range(t * n, t * n + n - 15, 16):
            store(to + 4 * i, _silu(load_f32x16(start + 4 * i)))
        for i in range(n - n % 16, n):
            out[t, i] = x[t, i] / (np.float32(1) + math.exp(-x[t, i]))


def silu(x: np.ndarray, pool: Pool | None = None) -> np.ndarray:
    """SiLU of each number: out = x / (1 + exp(-x)), float32 [n_tok, n_ff].

    As in ggml, the last n_ff % 16 numbers of a row go through the C library's expf and the others through a vector exp,
    which may differ in the last bit. ValueError for an array of another kind.
    Source: ggml-cpu/vec.h, ggml_v_silu and ggml_silu_f32.
    """
    _float32("x", x, 2)
    out = np.empty(x.shape, F32)
    run(pool, x.nbytes, silu_rows, x.shape[0], x, out)
    return out


@inline
def _gelu(x):
    """GELU of a number, by its approximation with tanh; ggml's compiled code has a fused multiply-add here."""
    inner = np.float32(0.79788456080286535587989211986876) * x
    inner = inner * first(fma(f32x1(np.float32(0.044715) * x), x, np.float32(1)))
    return np.float32(0.5) * x * (np.float32(1) + np.float32(math.tanh(inner)))


@kernel
def gelu_rows(x, as_half, out, t0, t1):
    """Write GELU of the tokens t0 to t1."""
    for t in range(t0, t1):
        for i in range(x.shape[1]):
            v = x[t, i]
            if not as_half:
                out[t, i] = _gelu(v)
            elif v <= np.float32(-10):
                out[t, i] = 0
            else:
                out[t, i] = v if v >= np.float32(10) else to_half(_gelu(to_half(v)))


def gelu(x: np.ndarray, numerics: str = "ggml", pool: Pool | None = None) -> np.ndarray:
    """out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), float32 [n_tok, n_ff].

    numerics "ggml" rounds x and the result to F16 between -10 and 10, as ggml's table does; beyond, it gives 0 and x.
    Source: ggml-cpu/vec.h, ggml_vec_gelu_f32 and ggml_gelu_f32.
    """
    _float32("x", x, 2)
    out = np.empty(x.shape, np.float32)
    run(pool, 8 * x.nbytes, gelu_rows, x.shape[0], x, numerics == "ggml", out)
    return out


@kernel
def soft_cap_rows(x, cap, out, t0, t1):
    """Write the capped numbers of the rows t0 to t1."""
    for t in range(t0, t1):
        for i in range(x.shape[1]):
            out[t, i] = capped(x[t, i], cap)


def soft_cap(x: np.ndarray, cap: float, pool: Pool | None = None) -> np.ndarray:
    """out = cap * tanh(x / cap), float32, of any number of dimensions: about x near 0, never beyond +-cap.

    Source: llama-graph.cpp, build_attn_mha (attn_soft_cap); ggml_tanh takes the C library's tanhf.
    """
    rows = x.reshape(-1, x.shape[-1])
    _float32("x", rows, 2)
    out = np.empty(rows.shape, np.float32)
    run(pool, 8 * x.nbytes, soft_cap_rows, rows.shape[0], rows, np.float32(cap), out)
    return out.reshape(x.shape)
