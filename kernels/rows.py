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
from .lanes import concat, fma, total
from .simd import address_of, keep
from .vectors import f32x1, f32x8, f32x16, load_f32x1, load_f32x16, load_i8x64, load_i32x16, to_f32, u8x32

ROWS = 16  # rows that all tokens pass before the next rows: they stay in the nearest cache

# What jit.specialise puts into the templates.
weights = weight = quants = scale = minimum = None
pair = single = step = start = dot = tile = unpack = None
SIZE = 0


@inline
def no_minimum(row, j):
    return f32x8(0)


# Four tokens at once: what is unpacked of a row serves four sums. A tile is two rows with four tokens.


@inline
def no_sums(zero):
    return zero, zero, zero, zero


@inline
def four(step, sums, weights, x, stride):
    """`step` for the sums of four tokens, whose activations lie `stride` bytes apart."""
    a, b, c, d = sums
    a, b = step(a, weights, x), step(b, weights, x + stride)
    c, d = step(c, weights, x + 2 * stride), step(d, weights, x + 3 * stride)
    return a, b, c, d


@inline
def totals(sums):
    return total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3])


@inline
def plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


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


def tile_quantised(row, row2, n_groups, record, stride):
    a = b = no_sums(f32x16(0))
    for j in range(0, n_groups - 1, 2):
        a, b = four(step, a, pair(row, j), record, stride), four(step, b, pair(row2, j), record, stride)
        record += 256
    if n_groups % 2:
        j = n_groups - 1
        a, b = four(step, a, single(row, j), record, stride), four(step, b, single(row2, j), record, stride)
    return totals(a), totals(b)


# Float rows with float activations.


@inline
def step_floats(acc, v, x):
    return fma(v, load_f32x16(x), acc)


@inline
def step_rest(acc, v, x):
    return fma(v, load_f32x1(x), acc)


def dot_floats(row, n, x, stride):
    acc, rest = f32x16(0), f32x1(0)
    for i in range(0, n - 15, 16):
        acc = step_floats(acc, weights(row + SIZE * i), x + 4 * i)
    for i in range(n - n % 16, n):
        rest = step_rest(rest, weight(row + SIZE * i), x + 4 * i)
    return total(acc) + total(rest)


def tile_floats(row, row2, n, x, stride):
    a = b = no_sums(f32x16(0))
    for i in range(0, n - 15, 16):
        v, w, at = weights(row + SIZE * i), weights(row2 + SIZE * i), x + 4 * i
        a, b = four(step_floats, a, v, at, stride), four(step_floats, b, w, at, stride)
    c = d = no_sums(f32x1(0))
    for i in range(n - n % 16, n):
        v1, w1, at = weight(row + SIZE * i), weight(row2 + SIZE * i), x + 4 * i
        c, d = four(step_rest, c, v1, at, stride), four(step_rest, d, w1, at, stride)
    return plus(totals(a), totals(c)), plus(totals(b), totals(d))


# Kernels.


def matmul_rows(y, stride, w, row_bytes, n, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; n is the length that `dot` asks for."""
    n_tok, w, y = out.shape[0], address_of(w), start(y)
    for first in range(i0, i1, ROWS):
        last = min(first + ROWS, i1)
        for t in range(0, n_tok - 3, 4):
            for i in range(first, last, 2):
                k = min(i + 1, last - 1)
                a, b = tile(w + i * row_bytes, w + k * row_bytes, n, y + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
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
            for i in range(first, last, 2):
                k = min(i + 1, last - 1)
                a, b = tile(rows + 4 * n * (i - first), rows + 4 * n * (k - first), n, x + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
        for t in range(n_tok - n_tok % 4, n_tok):
            for i in range(first, last):
                out[t, i] = dot(rows + 4 * n * (i - first), n, x + t * stride, stride)
    keep(unpacked)
