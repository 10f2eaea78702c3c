"""Products of rows with tokens: the templates of the kernels that matmul.py calls.

`stack` and `tile`, of four rows with a token and of two rows with four tokens, are a format's own, as stacks.py,
rows.py and superblocks.py describe them; `start` says where the activations begin in their array.
"""

import numpy as np

from .jit import inline
from .lanes import fma, total
from .simd import address_of, keep
from .vectors import f32x16, load_f32x16

ROWS = 16  # rows that all tokens pass before the next rows: they stay in the nearest cache

start = stack = tile = unpack = None  # see jit.specialise
FAR = False  # whether the four rows of a stack are a quarter of all apart, each a long stream


def matmul_rows(y, stride, w, row_bytes, n, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; n is the length that `stack` asks for."""
    n_tok, w, y = out.shape[0], address_of(w), start(y)
    for begin in range(i0, i1, ROWS):
        end = min(begin + ROWS, i1)
        for t in range(0, n_tok - 3, 4):
            for i in range(begin, end, 2):
                k = min(i + 1, end - 1)
                a, b = tile(w + i * row_bytes, w + k * row_bytes, n, y + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
    apart, step = ((i1 - i0) // 4, 1) if FAR else (1, 4)
    for i in range(i0, i0 + (i1 - i0) // 4 * step, step):
        for t in range(n_tok - n_tok % 4, n_tok):
            sums = stack(w + i * row_bytes, apart * row_bytes, n, y + t * stride)
            out[t, i], out[t, i + apart], out[t, i + 2 * apart], out[t, i + 3 * apart] = sums
    for i in range(i1 - (i1 - i0) % 4, i1):
        for t in range(n_tok - n_tok % 4, n_tok):
            out[t, i] = stack(w + i * row_bytes, 0, n, y + t * stride)[0]


def matmul_one(y, stride, w, row_bytes, n, out, i0, i1):
    """The same for a single token."""
    w, y = address_of(w), start(y)
    apart, step = ((i1 - i0) // 4, 1) if FAR else (1, 4)
    for i in range(i0, i0 + (i1 - i0) // 4 * step, step):
        sums = stack(w + i * row_bytes, apart * row_bytes, n, y)
        out[0, i], out[0, i + apart], out[0, i + 2 * apart], out[0, i + 3 * apart] = sums
    for i in range(i1 - (i1 - i0) % 4, i1):
        out[0, i] = stack(w + i * row_bytes, 0, n, y)[0]


@inline
def tile_4_by_6(row, stride, n, x, x_stride):
    """Dot products of four rows of float32 with six tokens."""
    z = f32x16(0)
    a = b = c = d = e = f = z, z, z, z
    for i in range(0, 4 * n, 64):
        at, v = x + i, row + i
        w = load_f32x16(v), load_f32x16(v + stride), load_f32x16(v + 2 * stride), load_f32x16(v + 3 * stride)
        a, b = step4(a, w, at), step4(b, w, at + x_stride)
        c, d = step4(c, w, at + 2 * x_stride), step4(d, w, at + 3 * x_stride)
        e, f = step4(e, w, at + 4 * x_stride), step4(f, w, at + 5 * x_stride)
    return totals(a), totals(b), totals(c), totals(d), totals(e), totals(f)


@inline
def step4(acc, w, x):
    v = load_f32x16(x)
    return fma(w[0], v, acc[0]), fma(w[1], v, acc[1]), fma(w[2], v, acc[2]), fma(w[3], v, acc[3])


@inline
def totals(acc):
    return total(acc[0]), total(acc[1]), total(acc[2]), total(acc[3])


@inline
def tile_4_by_2(row, stride, n, x, x_stride):
    z = f32x16(0)
    a = b = z, z, z, z
    for i in range(0, 4 * n, 64):
        at, v = x + i, row + i
        w = load_f32x16(v), load_f32x16(v + stride), load_f32x16(v + 2 * stride), load_f32x16(v + 3 * stride)
        a, b = step4(a, w, at), step4(b, w, at + x_stride)
    return totals(a), totals(b)


def matmul_unpacked(x, stride, w, row_bytes, n, out, i0, i1):
    """The same with rows unpacked to float32 and float32 activations; n is a multiple of 16."""
    row_stride = 4 * n + 64  # not 4 n: powers of two would put all rows in the same few places of the nearest cache
    unpacked = np.empty(ROWS * row_stride, np.uint8)
    n_tok, w, x, rows = out.shape[0], address_of(w), address_of(x), address_of(unpacked)
    for begin in range(i0, i1, ROWS):
        end = min(begin + ROWS, i1)
        for i in range(begin, min(begin + ROWS, (end + 3) // 4 * 4)):
            unpack(w + min(i, end - 1) * row_bytes, n, rows + row_stride * (i - begin))
        for t in range(0, n_tok - 5, 6):
            for i in range(begin, end, 4):
                a, b, c, d, e, f = tile_4_by_6(rows + row_stride * (i - begin), row_stride, n, x + t * stride, stride)
                for k in range(min(4, end - i)):
                    out[t, i + k], out[t + 1, i + k], out[t + 2, i + k] = a[k], b[k], c[k]
                    out[t + 3, i + k], out[t + 4, i + k], out[t + 5, i + k] = d[k], e[k], f[k]
        for t in range(n_tok - n_tok % 6, n_tok, 2):
            m = min(t + 1, n_tok - 1)
            for i in range(begin, end, 4):
                at = rows + row_stride * (i - begin)
                a, b = tile_4_by_2(at, row_stride, n, x + t * stride, (m - t) * stride)
                for k in range(min(4, end - i)):
                    out[t, i + k], out[m, i + k] = a[k], b[k]
    keep(unpacked)
