"""Dot products of rows: the templates from which each block format gets its kernels (products.py).

A float format brings
    weights(address)   -> f32x16    16 weights
    weight(address)    -> f32x1     one weight
    SIZE                            bytes of a weight
and a quantised format, for the j-th group of 32 weights of the row at address `row`,
    quants(row, j)     -> u8x32     unsigned, in the order of the weights
    scale(row, j)      -> f32x8     lane k for weights 4k to 4k + 3 of the group
    minimum(row, j)    -> f32x8     the same in all lanes, or no_minimum
    BIAS                            weight = scale * (quant - BIAS) + minimum

Quantised activations are described in activations.py: one record of 256 bytes for 64 of them, four vectors
q, c, d, s at bytes 0, 64, 128 and 192, with which the dot product of a group is
    sum over 8 lanes of  scale * d * (dot4(quants, q) + c)   + minimum * s

Sums are taken in the order of ggml's code for x86-64 with AVX-512, so that results are ggml's bit for bit: 8 lanes and
group after group for quants, the minima by themselves (arch/x86/quants.c; llamafile/sgemm.cpp, tinyBLAS_Q0_AVX); 16
lanes for floats (sgemm.cpp, tinyBLAS), and where a row does not divide evenly, as ggml_vec_dot_* in vec.cpp do. Of
quantised rows one token and several are summed alike. Of floats ggml sums a single token by ggml_vec_dot_* always:
`vec_dot` is that order, which numerics "ggml" takes for a pass of one token.
"""

import numpy as np

from .cpu import dot4, even, odd
from .jit import inline
from .lanes import concat, first, fma, high, low, total
from .vectors import f32x8, f32x16, load_f32x1, load_f32x16, load_f32x32, load_i8x64, load_i32x16, to_f32, u8x32

# What jit.specialise puts into the templates.
weights = weight = quants = scale = minimum = rest = None
pair = single = nothing = step = whole = add_64 = vec_dot = dot = None
SIZE = CHUNK = 0


@inline
def no_minimum(row, j):
    return f32x8(0)


# Four tokens at once: what is unpacked of a row serves four sums. A tile is two rows with four tokens.


@inline
def four(step, sums, weights, x, stride):
    """`step` for the sums of four tokens, whose activations lie `stride` bytes apart."""
    a, b, c, d = sums
    a, b = step(a, weights, x), step(b, weights, x + stride)
    c, d = step(c, weights, x + 2 * stride), step(d, weights, x + 3 * stride)
    return a, b, c, d


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
    products = to_f32(dot4(load_i32x16(record + 64), group[0], load_i8x64(record)))
    scales = group[1] * load_f32x16(record + 128)
    return fma(high(products), high(scales), fma(low(products), low(scales), acc))


@inline
def step_two_sums(acc, group, record):
    """Even and odd groups by themselves."""
    products = to_f32(dot4(load_i32x16(record + 64), group[0], load_i8x64(record)))
    scales = group[1] * load_f32x16(record + 128)
    return fma(low(products), low(scales), acc[0]), fma(high(products), high(scales), acc[1])


@inline
def step_scale_minimum(acc, group, record):
    s = load_f32x16(record + 192)
    return step_scale(acc[0], group, record), fma(high(group[2]), high(s), fma(low(group[2]), low(s), acc[1]))


@inline
def nothing_scale():
    return f32x8(0)


@inline
def nothing_scale_minimum():
    return f32x8(0), f32x8(0)


@inline
def whole_two_sums(acc):
    return total(acc[0] + acc[1])


@inline
def whole_scale_minimum(acc):
    return total(acc[0]) + first(acc[1])


# nothing, step and whole of the formats, by what they have.
SCALE = nothing_scale, step_scale, total
SCALE_MINIMUM = nothing_scale_minimum, step_scale_minimum, whole_scale_minimum
TWO_SUMS = nothing_scale_minimum, step_two_sums, whole_two_sums


def tile_quantised(row, row2, n_groups, record, stride):
    a = b = nothing(), nothing(), nothing(), nothing()
    for j in range(0, n_groups - 1, 2):
        a, b = four(step, a, pair(row, j), record, stride), four(step, b, pair(row2, j), record, stride)
        record += 256
    if n_groups % 2:
        j = n_groups - 1
        a, b = four(step, a, single(row, j), record, stride), four(step, b, single(row2, j), record, stride)
    return (whole(a[0]), whole(a[1]), whole(a[2]), whole(a[3])), (whole(b[0]), whole(b[1]), whole(b[2]), whole(b[3]))


# Float rows with float activations, CHUNK at a time.


@inline
def step_floats(acc, v, x):
    return fma(v, load_f32x16(x), acc)


@inline
def step_pairs(acc, v, x):
    """As the instruction VDPBF16PS: of each pair first the second product."""
    y = load_f32x32(x)
    return fma(even(v), even(y), fma(odd(v), odd(y), acc))


def dot_floats(row, n, x):
    if n % CHUNK:
        return vec_dot(row, n, x)
    acc = f32x16(0)
    for i in range(0, n, CHUNK):
        acc = step(acc, weights(row + SIZE * i), x + 4 * i)
    return total(acc)


def tile_floats(row, row2, n, x, stride):
    if n % CHUNK:
        y, z = x + 2 * stride, x + 3 * stride
        a = dot(row, n, x), dot(row, n, x + stride), dot(row, n, y), dot(row, n, z)
        b = dot(row2, n, x), dot(row2, n, x + stride), dot(row2, n, y), dot(row2, n, z)
        return a, b
    a = b = f32x16(0), f32x16(0), f32x16(0), f32x16(0)
    for i in range(0, n, CHUNK):
        v, w, at = weights(row + SIZE * i), weights(row2 + SIZE * i), x + 4 * i
        a, b = four(step, a, v, at, stride), four(step, b, w, at, stride)
    return (total(a[0]), total(a[1]), total(a[2]), total(a[3])), (total(b[0]), total(b[1]), total(b[2]), total(b[3]))


# The order of ggml_vec_dot_*: 64 weights at a time in several sums, which are added up at the end; the rest one by one.


@inline
def nothing_floats():
    return f32x16(0), f32x16(0), f32x16(0), f32x16(0)


def add_64_floats(acc, row, x):
    a, b = step(acc[0], weights(row), x), step(acc[1], weights(row + 16 * SIZE), x + 64)
    c, d = step(acc[2], weights(row + 32 * SIZE), x + 128), step(acc[3], weights(row + 48 * SIZE), x + 192)
    return a, b, c, d


@inline
def whole_floats(acc):
    return total((acc[0] + acc[2]) + (acc[1] + acc[3]))


@inline
def nothing_pairs():
    return f32x16(0), f32x16(0)


def add_64_pairs(acc, row, x):
    return step(acc[0], weights(row), x), step(acc[1], weights(row + 32 * SIZE), x + 128)


@inline
def whole_pairs(acc):
    return np.float64(total(acc[0])) + np.float64(total(acc[1]))


def vec_dot_floats(row, n, x):
    acc = nothing()
    for i in range(0, n - 63, 64):
        acc = add_64(acc, row + SIZE * i, x + 4 * i)
    return rest(whole(acc), row, n, x)


def vec_dot_then_zeros(row, n, x):
    """vec_dot of a row of n weights, a multiple of 16, that zeros fill up to a multiple of 64; not for pairs."""
    acc, most = nothing(), n & -64
    for i in range(0, most, 64):
        acc = add_64(acc, row + SIZE * i, x + 4 * i)
    a, b, c, d = acc
    at, y = row + SIZE * most, x + 4 * most
    if n - most > 0:
        a = step(a, weights(at), y)
    if n - most > 16:
        b = step(b, weights(at + 16 * SIZE), y + 64)
    if n - most > 32:
        c = step(c, weights(at + 32 * SIZE), y + 128)
    return whole((a, b, c, d))


def rest_f32(acc, row, n, x):
    """Products rounded by themselves, but for the last up to 7: so a compiler makes ggml's loop."""
    for i in range(n - n % 64, n - n % 8):
        acc += first(weight(row + SIZE * i) * load_f32x1(x + 4 * i))
    for i in range(n - n % 8, n):
        acc = first(fma(weight(row + SIZE * i), load_f32x1(x + 4 * i), acc))
    return acc


def rest_f64(acc, row, n, x):
    """Products in float32, their sum in float64."""
    acc = np.float64(acc)
    for i in range(n - n % 64, n):
        acc += first(weight(row + SIZE * i) * load_f32x1(x + 4 * i))
    return np.float32(acc)
