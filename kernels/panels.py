"""Products of superblock rows with many tokens at once: 4 rows with a panel of 16 tokens, a token in each lane.

The rows are unpacked to bytes once for all tokens, and the activations turned around so that a vector holds four
neighbouring quants of each of 16 tokens. What lanes add up are whole numbers over a superblock, of which the sum is

    float of (sum of scale * quant * q) * factor - float of (sum of minimum * q) * min_factor, all that times d

in float32, superblock after superblock. From 8 tokens on, ggml sums in this way (and not lane by lane as superblocks.py
does for fewer tokens), so from 8 tokens on this is done, bit for bit.
Source: ggml-cpu/tiled/tiled-kernel.cpp, tiled_run_micro_vnni_8x16; tiled.cpp, ggml_tiled_min_batch.

A panel has for each superblock 4672 bytes, and an unpacked row 384:

    byte    0  q   64 x 16 x 4 i8    quants 4k to 4k + 3 of each token        byte   0  quants     256 x u8
    byte 4096  b    8 x 16 x 2 i16   two sums of 16 quants of each token      byte 256  scales      16 x i32
    byte 4608  d        16 x f32     the scale of each token                  byte 320  beside      16 x i16
                                                                              byte 352  factor       4 x f32
                                                                              byte 368  min_factor   4 x f32
`beside` are the numbers that go with the sums of 16: minimums, or, when there is a BIAS, the scales once more.
"""

import numpy as np

from .activations import RECORD_K, first_record
from .machine.cpu import dot4, even, odd
from .machine.jit import inline, kernel
from .machine.lanes import bitcast_to, fma, low, shuffle
from .machine.simd import Vec, address_of, keep, store

from .machine.vectors import (  # isort: skip
    f32x16, i32x16, load_f32x1, load_f32x16, load_i8x64, load_i16x32, load_i32x1, load_u32x1, to_f32, to_i16, to_i32,
    u8x64,
)  # fmt: skip

PANEL, UNPACKED = 4672, 384
quants = scales = minimums = factor = min_factor = beside = unpack_row = result = block_sums = panel_sums = None
SIZE = SPAN = BIAS = 0  # see jit.specialise; SPAN weights have one scale

everywhere = shuffle([0] * 16)
as_bytes, as_pairs = bitcast_to(Vec("u8", 64)), bitcast_to(Vec("i16", 32))


def panel_bytes(n_tok: int, n_in: int) -> int:
    """Room for the panels of so many tokens, with what it takes to align them."""
    return -(-n_tok // 16) * (n_in // 256) * PANEL + 63


@kernel
def make_panels(records, n_tok, n_blocks, panels, p0, p1):
    """Fill the panels p0 to p1 from the Q8_K records of the tokens; zeros where there is no token."""
    y, to = first_record(records), first_record(panels) + p0 * n_blocks * PANEL
    for p in range(p0, p1):
        for j in range(n_blocks):
            for i in range(0, PANEL, 64):
                store(to + i, u8x64(0))
            for t in range(min(16, n_tok - 16 * p)):
                record = y + ((16 * p + t) * n_blocks + j) * RECORD_K
                for k in range(72):  # quants and sums of 16 follow each other in both
                    store(to + 64 * k + 4 * t, load_u32x1(record + 4 * k))
                store(to + 4608 + 4 * t, load_u32x1(record + 304))
            to += PANEL


def unpack_row_template(row, n_blocks, to):
    for block in range(row, row + n_blocks * SIZE, SIZE):
        q = quants(block)
        store(to, q[0])
        store(to + 64, q[1])
        store(to + 128, q[2])
        store(to + 192, q[3])
        store(to + 256, scales(block))
        store(to + 320, to_i16(beside(block)))
        store(to + 352, low(factor(block)))
        store(to + 368, low(min_factor(block)))
        to += UNPACKED


@inline
def quad(at):
    """Four bytes, in all lanes."""
    return as_bytes(everywhere(load_u32x1(at)))


@inline
def pair_sums(at, panel):
    """Sum over the sums of 16 of each token, times the numbers beside them."""
    sums = i32x16(0)
    for k in range(8):
        products = to_i32(as_pairs(everywhere(load_u32x1(at + 4 * k)))) * to_i32(load_i16x32(panel + 64 * k))
        sums = sums + (even(products) + odd(products))
    return sums


def result_bias(sums, row, panel):
    """What a superblock adds to the sums of a row, but for the tokens' d."""
    whole = sums - pair_sums(row + 320, panel + 4096) * BIAS
    return to_f32(whole) * everywhere(load_f32x1(row + 352))


def result_minimums(sums, row, panel):
    below = to_f32(pair_sums(row + 320, panel + 4096))
    return fma(below, everywhere(load_f32x1(row + 368)) * -1, to_f32(sums) * everywhere(load_f32x1(row + 352)))


def block_sums_template(row, row2, row3, row4, panel):
    """Sums of scale * quant * q over a superblock, for four rows."""
    s = s2 = s3 = s4 = i32x16(0)
    for group in range(256 // SPAN):
        a = b = c = d = i32x16(0)
        for k in range(group * SPAN // 4, (group + 1) * SPAN // 4):
            x = load_i8x64(panel + 64 * k)
            a, b = dot4(a, quad(row + 4 * k), x), dot4(b, quad(row2 + 4 * k), x)
            c, d = dot4(c, quad(row3 + 4 * k), x), dot4(d, quad(row4 + 4 * k), x)
        at = 256 + group * SPAN // 4
        s, s2 = s + a * everywhere(load_i32x1(row + at)), s2 + b * everywhere(load_i32x1(row2 + at))
        s3, s4 = s3 + c * everywhere(load_i32x1(row3 + at)), s4 + d * everywhere(load_i32x1(row4 + at))
    return s, s2, s3, s4


def panel_sums_template(row, stride, n_blocks, panel):
    """Dot products of four unpacked rows, `stride` bytes apart, with 16 tokens."""
    a = b = c = d = f32x16(0)
    for _ in range(n_blocks):
        row2, row3, row4 = row + stride, row + 2 * stride, row + 3 * stride
        s, scale = block_sums(row, row2, row3, row4, panel), load_f32x16(panel + 4608)
        a, b = fma(result(s[0], row, panel), scale, a), fma(result(s[1], row2, panel), scale, b)
        c, d = fma(result(s[2], row3, panel), scale, c), fma(result(s[3], row4, panel), scale, d)
        row += UNPACKED
        panel += PANEL
    return a, b, c, d


def matmul_panels(y, stride, w, row_bytes, n_blocks, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; y as make_panels fills it."""
    unpacked, sums = np.empty(4 * n_blocks * UNPACKED + 63, np.uint8), np.empty((4, 16), np.float32)
    n_tok, w, y = out.shape[0], address_of(w), first_record(y)
    rows, row_stride, at = first_record(unpacked), n_blocks * UNPACKED, address_of(sums)
    for i in range(i0, i1, 4):
        n = min(4, i1 - i)
        for k in range(4):
            unpack_row(w + min(i + k, i1 - 1) * row_bytes, n_blocks, rows + k * row_stride)
        for t in range(0, n_tok, 16):
            a, b, c, d = panel_sums(rows, row_stride, n_blocks, y + t // 16 * n_blocks * PANEL)
            store(at, a)
            store(at + 64, b)
            store(at + 128, c)
            store(at + 192, d)
            for m in range(min(16, n_tok - t)):
                for k in range(n):
                    out[t + m, i + k] = sums[k, m]
    keep(unpacked)
    keep(sums)
