"""Dot products of rows of superblocks, 256 weights each: the templates from which each such format gets its kernels.

A format brings, for the superblock at address `block`,
    quants(block)      -> 4 u8x64   64 quants each, unsigned, in the order of the weights
    scales(block)      -> i32x16    a whole number for each 16 weights
    minimums(block)    -> i32x16    the same, or no_minimums
    factor(block)      -> f32x8     the float by which scales are multiplied, in all lanes
    min_factor(block)  -> f32x8     the same for minimums, or no_factor
    BIAS, SIZE         weight = (factor * scale) * (quant - BIAS) - min_factor * minimum; bytes of a superblock
and a Sums, which says how its dot product is put together from the records that activations.py describes. In all of
them, lane k of 8 adds up, in whole numbers,
    scale * (dot4(quants, q) of weights 4k to 4k + 3 of each 32)
over a superblock, and only then comes the float product with factor * d. What BIAS and the minimums contribute enters
where, and in as many lanes, as ggml's code for x86-64 has it, so that results are ggml's bit for bit.
Source: ggml-cpu/arch/x86/quants.c, ggml_vec_dot_q2_K_q8_K and the other functions named ggml_vec_dot_*_q8_K.
"""

from typing import Any, NamedTuple

import numpy as np

from .activations import RECORD_K
from .machine.cpu import dot4, even, odd
from .machine.jit import inline
from .machine.lanes import first, fma, high, low, shuffle, total
from .rows import four

from .machine.vectors import (  # isort: skip
    f32x1, f32x4, f32x8, i32x16, load_f32x1, load_i8x64, load_i16x8, load_i16x16, load_i32x16, to_f32, to_i16, to_i32,
)  # fmt: skip

quants = scales = minimums = factor = min_factor = rest = open_block = nothing = step = whole = None
SIZE = BIAS = 0  # see jit.specialise

# From a number for each 16 weights to the dot4 lanes of each 64.
lanes0, lanes1, lanes2, lanes3 = (shuffle([4 * k + lane // 4 for lane in range(16)]) for k in range(4))


@inline
def no_minimums(block):
    return i32x16(0)


@inline
def no_factor(block):
    return f32x8(0)


def open_template(block):
    """What a superblock brings to every dot product with it."""
    s = scales(block)
    return quants(block), (lanes0(s), lanes1(s), lanes2(s), lanes3(s)), factor(block), rest(block)


@inline
def pairs(a, b):
    """Sums of two products each: i16 lanes in, half as many i32 lanes out."""
    products = to_i32(a) * to_i32(b)
    return even(products) + odd(products)


@inline
def products(q, s, record):
    a = dot4(i32x16(0), q[0], load_i8x64(record)) * s[0] + dot4(i32x16(0), q[1], load_i8x64(record + 64)) * s[1]
    b = dot4(i32x16(0), q[2], load_i8x64(record + 128)) * s[2] + dot4(i32x16(0), q[3], load_i8x64(record + 192)) * s[3]
    return low(a + b) + high(a + b)


@inline
def biased(q, record, k):
    """dot4 of the k-th 64 quants, less BIAS by the sums c of the record."""
    return dot4(load_i32x16(record + 320 + 64 * k), q, load_i8x64(record + 64 * k))


@inline
def biased_products(q, s, record):
    a = biased(q[0], record, 0) * s[0] + biased(q[1], record, 1) * s[1]
    b = biased(q[2], record, 2) * s[2] + biased(q[3], record, 3) * s[3]
    return low(a + b) + high(a + b)


@inline
def scale_of(record):
    return first(load_f32x1(record + 304))


class Sums(NamedTuple):
    """A way to sum: rest(block), nothing() -> acc, step(acc, opened block, record) -> acc, whole(acc) -> number."""

    rest: Any
    nothing: Any
    step: Any
    whole: Any


def rest_none(block):
    return 0


@inline
def nothing8():
    return f32x8(0)


@inline
def step_bias(acc, opened, record):
    q, s, d, _ = opened
    return fma(to_f32(biased_products(q, s, record)), d * scale_of(record), acc)


# The bias comes off lane by lane.
BIAS_BY_LANE = Sums(rest_none, nothing8, step_bias, total)


def rest_scales(block):
    return to_i16(scales(block)), BIAS


@inline
def step_bias_by_16(acc, opened, record):
    q, s, d, (s16, bias) = opened
    sums = products(q, s, record) - pairs(s16, load_i16x16(record + 256)) * bias
    return fma(to_f32(sums), d * scale_of(record), acc)


# The bias comes off by the sums of 16 quants, two of them in each lane.
BIAS_BY_16 = Sums(rest_scales, nothing8, step_bias_by_16, total)


def rest_minimums(block):
    return to_i16(minimums(block)), min_factor(block)


@inline
def step_minimums_in_lanes(acc, opened, record):
    q, s, d, (m, dmin) = opened
    scale = scale_of(record)
    acc = fma(to_f32(pairs(m, load_i16x16(record + 256))), dmin * -scale, acc)
    return fma(to_f32(products(q, s, record)), d * scale, acc)


# Minimums times sums of 16 quants, two of them in each lane, before the products.
MINIMUMS_OF_16 = Sums(rest_minimums, nothing8, step_minimums_in_lanes, total)


def rest_minimums_of_32(block):
    return to_i16(even(minimums(block))), low(min_factor(block))


@inline
def nothing8_and_4():
    return f32x8(0), f32x4(0)


@inline
def step_minimums_apart(acc, opened, record):
    q, s, d, (m, dmin) = opened
    scale = scale_of(record)
    below = fma(to_f32(pairs(m, load_i16x8(record + 288))), dmin * -scale, acc[1])
    return fma(to_f32(products(q, s, record)), d * scale, acc[0]), below


@inline
def whole_two(acc):
    return total(acc[0]) + total(acc[1])


# Minimums times sums of 32 quants, in 4 lanes by themselves.
MINIMUMS_OF_32 = Sums(rest_minimums_of_32, nothing8_and_4, step_minimums_apart, whole_two)


@inline
def nothing8_and_1():
    return f32x8(0), f32x1(0)


@inline
def step_minimums_in_one(acc, opened, record):
    q, s, d, (m, dmin) = opened
    scale = scale_of(record)
    below = f32x1(np.float32(total(pairs(m, load_i16x8(record + 288)))))
    below = fma(below, first(dmin) * -scale, acc[1])
    return fma(to_f32(products(q, s, record)), d * scale, acc[0]), below


# The same, added up for each superblock before the float product.
MINIMUMS_IN_ONE = Sums(rest_minimums_of_32, nothing8_and_1, step_minimums_in_one, whole_two)


# What formats.py makes dot products of.


def dot_superblocks(row, n_blocks, record):
    acc = nothing()
    for j in range(n_blocks):
        acc = step(acc, open_block(row + SIZE * j), record + RECORD_K * j)
    return whole(acc)


def tile_superblocks(row, row2, n_blocks, record, stride):
    a = b = nothing(), nothing(), nothing(), nothing()
    for j in range(n_blocks):
        a = four(step, a, open_block(row + SIZE * j), record, stride)
        b = four(step, b, open_block(row2 + SIZE * j), record, stride)
        record += RECORD_K
    return (whole(a[0]), whole(a[1]), whole(a[2]), whole(a[3])), (whole(b[0]), whole(b[1]), whole(b[2]), whole(b[3]))
