"""Dot products of rows: the templates from which each block format gets its kernels.

A float format brings
    weights(address)   -> f32x16    16 weights
    weight(address)    -> f32x1     one weight
    SIZE                            bytes of a weight
and a quantised format, for the j-th group of 32 weights of the row at address `row`,
    quants(row, j)     -> u8x32     unsigned, in the order of the weights
    scale(row, j)      -> f32x8     lane k for weights 4k to 4k + 3 of the group
    minimum(row, j)    -> f32x8     the same, or no_minimum
    BIAS                            weight = scale * (quant - BIAS) + minimum

One token and four tokens are summed in the same order, so that a token's result does not depend on its company.
Quantised activations are described in activations.py: one record of 256 bytes for 64 of them, four vectors
q, c, d, s at bytes 0, 64, 128 and 192, with which the dot product of two groups is
    sum over lanes of  scale * d * (dot4(quants, q) + c) + minimum * s
"""

import numpy as np

from .cpu import dot4
from .jit import inline
from .simd import address_of, concat, fma, keep, store, total
from .vectors import f32x1, f32x8, f32x16, load_f32x1, load_f32x16, load_i8x64, load_i32x16, spread, to_f32, u8x32

ROWS = 16  # rows that all tokens pass before the next rows: they stay in the nearest cache

weights = weight = quants = scale = minimum = pair = single = step = start = dot = dots4 = unpack = None  # see jit.specialise
SIZE = BIAS = 0


@inline
def no_minimum(row, j):
    return f32x8(0)


# Quantised rows with quantised activations.


def two_groups(row, j):
    """Groups j and j + 1."""
    q = concat(quants(row, j), quants(row, j + 1))
    return q, concat(scale(row, j), scale(row, j + 1)), concat(minimum(row, j), minimum(row, j + 1))


def one_group(row, j):
    """Group j, and nothing in the upper lanes."""
    return concat(quants(row, j), u8x32(0)), concat(scale(row, j), f32x8(0)), concat(minimum(row, j), f32x8(0))


@inline
def step_scale(acc, group, record):
    products = dot4(load_i32x16(record + 64), group[0], load_i8x64(record))
    return fma(to_f32(products), group[1] * load_f32x16(record + 128), acc)


@inline
def step_scale_minimum(acc, group, record):
    return step_scale(fma(group[2], load_f32x16(record + 192), acc), group, record)


def dot_quantised(row, n_groups, record, stride):
    acc = f32x16(0)
    for j in range(0, n_groups - 1, 2):
        acc = step(acc, pair(row, j), record)
        record += 256
    if n_groups % 2:
        acc = step(acc, single(row, n_groups - 1), record)
    return total(acc)


def dots4_quantised(row, n_groups, record, stride):
    a = b = c = d = f32x16(0)
    for j in range(0, n_groups - 1, 2):
        group = pair(row, j)
        a, b = step(a, group, record), step(b, group, record + stride)
        c, d = step(c, group, record + 2 * stride), step(d, group, record + 3 * stride)
        record += 256
    if n_groups % 2:
        group = single(row, n_groups - 1)
        a, b = step(a, group, record), step(b, group, record + stride)
        c, d = step(c, group, record + 2 * stride), step(d, group, record + 3 * stride)
    return total(a), total(b), total(c), total(d)


# Float rows with float activations.


def dot_floats(row, n, x, stride):
    acc, rest = f32x16(0), f32x1(0)
    for i in range(0, n - 15, 16):
        acc = fma(weights(row + SIZE * i), load_f32x16(x + 4 * i), acc)
    for i in range(n - n % 16, n):
        rest = fma(weight(row + SIZE * i), load_f32x1(x + 4 * i), rest)
    return total(acc) + total(rest)


def dots4_floats(row, n, x, stride):
    a = b = c = d = f32x16(0)
    for i in range(0, n - 15, 16):
        v, p = weights(row + SIZE * i), x + 4 * i
        a, b = fma(v, load_f32x16(p), a), fma(v, load_f32x16(p + stride), b)
        c, d = fma(v, load_f32x16(p + 2 * stride), c), fma(v, load_f32x16(p + 3 * stride), d)
    e = f = g = h = f32x1(0)
    for i in range(n - n % 16, n):
        v, p = weight(row + SIZE * i), x + 4 * i
        e, f = fma(v, load_f32x1(p), e), fma(v, load_f32x1(p + stride), f)
        g, h = fma(v, load_f32x1(p + 2 * stride), g), fma(v, load_f32x1(p + 3 * stride), h)
    return total(a) + total(e), total(b) + total(f), total(c) + total(g), total(d) + total(h)


# Kernels.


def matmul_rows(y, stride, w, row_bytes, n, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; n is the length that `dot` asks for."""
    n_tok, w, y = out.shape[0], address_of(w), start(y)
    for first in range(i0, i1, ROWS):
        last = min(first + ROWS, i1)
        for t in range(0, n_tok - 3, 4):
            for i in range(first, last):
                a, b, c, d = dots4(w + i * row_bytes, n, y + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a, b, c, d
        for t in range(n_tok - n_tok % 4, n_tok):
            for i in range(first, last):
                out[t, i] = dot(w + i * row_bytes, n, y + t * stride, stride)


def matmul_unpacked(x, stride, w, row_bytes, n, out, i0, i1):
    """The same with rows unpacked to float32 and float32 activations."""
    unpacked = np.empty((ROWS, n), np.float32)
    n_tok, w, x, rows = out.shape[0], address_of(w), address_of(x), address_of(unpacked)
    for first in range(i0, i1, ROWS):
        last = min(first + ROWS, i1)
        for i in range(first, last):
            unpack(w + i * row_bytes, n, rows + 4 * n * (i - first))
        for t in range(0, n_tok - 3, 4):
            for i in range(first, last):
                a, b, c, d = dots4(rows + 4 * n * (i - first), n, x + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a, b, c, d
        for t in range(n_tok - n_tok % 4, n_tok):
            for i in range(first, last):
                out[t, i] = dot(rows + 4 * n * (i - first), n, x + t * stride, stride)
    keep(unpacked)


def unpack_quantised(row, n, out):
    for j in range(n // 32):
        values = spread(scale(row, j)) * (to_f32(quants(row, j)) - BIAS)
        store(out + 128 * j, values)


def unpack_quantised_minimum(row, n, out):
    for j in range(n // 32):
        values = spread(scale(row, j)) * (to_f32(quants(row, j)) - BIAS) + spread(minimum(row, j))
        store(out + 128 * j, values)


def unpack_floats(row, n, out):
    for i in range(0, n - 15, 16):
        store(out + 4 * i, weights(row + SIZE * i))
    for i in range(n - n % 16, n):
        store(out + 4 * i, weight(row + SIZE * i))


def unpack_rows(w, row_bytes, ids, out, i0, i1):
    """out[i] = row ids[i] of w, as float32."""
    n, w, to = out.shape[1], address_of(w), address_of(out)
    for i in range(i0, i1):
        unpack(w + ids[i] * row_bytes, n, to + 4 * n * i)
