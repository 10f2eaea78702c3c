"""Superblocks with many tokens at once: 4 rows with a panel of 16 tokens, one token per lane.

The rows are unpacked to bytes once for all tokens, and the activations are rearranged so that a vector holds four
neighbouring quants of each of 16 tokens. The lanes add up whole numbers over a superblock. Each superblock then
adds to the dot product of a row and a token

    (float(sum of scale * quant * q) * factor - float(sum of minimum * q) * min_factor) * d

in float32, superblock after superblock. ggml sums in this way from 8 tokens on (for fewer tokens lane by lane, see
superblock_sums.py), and so does this file, bit for bit.
Source: ggml-cpu/tiled/tiled-kernel.cpp, tiled_run_micro_vnni_8x16; tiled.cpp, ggml_tiled_min_batch.

Per superblock, a panel has 4672 bytes (left), and an unpacked row 384 (right):

    byte    0  q   64 x 16 x 4 i8    quants 4k to 4k + 3 of each token        byte   0  quants     256 x u8
    byte 4096  b    8 x 16 x 2 i16   two sums of 16 quants of each token      byte 256  scales      16 x i32
    byte 4608  d        16 x f32     the scale of each token                  byte 320  beside      16 x i16
                                                                              byte 352  factor       4 x f32
                                                                              byte 368  min_factor   4 x f32
`beside` holds the numbers that multiply the sums of 16 activations: the minimums or, where a format has a BIAS, the
scales once more.
"""

from typing import Any

import numpy as np

from ..machine.cpu import dot4
from ..machine.jit import inline, kernel
from ..machine.lanes import bitcast_to, even, fma, low, odd
from ..machine.simd import Vec, address_of, keep, store
from ..machine.template import STAMPED, abstract, entry, part
from ..machine.vectors import (
    bytes_everywhere,
    everywhere,
    f32x16,
    i32x16,
    load_f32x1,
    load_f32x16,
    load_i8x64,
    load_i16x32,
    load_i32x1,
    load_u32x1,
    to_f32,
    to_i16,
    to_i32,
    u8x64,
)
from .activations import RECORD_K, first_record
from .superblocks import Superblocks

PANEL, UNPACKED = 4672, 384  # bytes per superblock of a panel, and of an unpacked row

as_pairs = bitcast_to(Vec("i16", 32))


def superblock_panel_bytes(n_tok: int, n_in: int) -> int:
    """Bytes of the panels of n_tok tokens of n_in activations, and 63 more so that they can be aligned."""
    return -(-n_tok // 16) * (n_in // 256) * PANEL + 63


@kernel
def fill_superblock_panels(records, n_tok, n_blocks, panels, p0, p1):
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


@inline
def pair_sums(at, panel):
    """The sum over k of the k-th i16 number at an address times each token's k-th sum of 16 quants: i32x16."""
    sums = i32x16(0)
    for k in range(8):
        products = to_i32(as_pairs(everywhere(load_u32x1(at + 4 * k)))) * to_i32(load_i16x32(panel + 64 * k))
        sums = sums + (even(products) + odd(products))
    return sums


class ManyTokensOfSuperblocks(Superblocks):
    """A format of superblocks with a kernel for MANY_FROM tokens or more."""

    MANY_FROM = 8
    SPAN: int  # weights that share a scale: 16 or 32

    @abstract
    def beside(block):
        """i32x16: the whole numbers that are multiplied with the sums of 16 activations."""

    @abstract
    def result(sums, row, panel):
        """f32x16: what a superblock of a row contributes to each token's sum, before the factor d of the token."""

    @part
    def unpack_to_bytes(row, n_blocks, to):
        """Write the superblocks of a row as bytes and whole-number scales to an address."""
        for block in range(row, row + n_blocks * fmt.SIZE, fmt.SIZE):
            q = fmt.quants(block)
            store(to, q[0])
            store(to + 64, q[1])
            store(to + 128, q[2])
            store(to + 192, q[3])
            store(to + 256, fmt.scales(block))
            store(to + 320, to_i16(fmt.beside(block)))
            store(to + 352, low(fmt.factor(block)))
            store(to + 368, low(fmt.min_factor(block)))
            to += UNPACKED

    @part
    def block_sums(row, row2, row3, row4, panel):
        """Sums of scale * quant * q over a superblock, for four rows."""
        s = s2 = s3 = s4 = i32x16(0)
        for group in range(256 // fmt.SPAN):
            a = b = c = d = i32x16(0)
            for k in range(group * fmt.SPAN // 4, (group + 1) * fmt.SPAN // 4):
                x = load_i8x64(panel + 64 * k)
                a, b = dot4(a, bytes_everywhere(row + 4 * k), x), dot4(b, bytes_everywhere(row2 + 4 * k), x)
                c, d = dot4(c, bytes_everywhere(row3 + 4 * k), x), dot4(d, bytes_everywhere(row4 + 4 * k), x)
            at = 256 + group * fmt.SPAN // 4
            s, s2 = s + a * everywhere(load_i32x1(row + at)), s2 + b * everywhere(load_i32x1(row2 + at))
            s3, s4 = s3 + c * everywhere(load_i32x1(row3 + at)), s4 + d * everywhere(load_i32x1(row4 + at))
        return s, s2, s3, s4

    @part
    def panel_sums(row, stride, n_blocks, panel):
        """Dot products of four unpacked rows, `stride` bytes apart, with 16 tokens."""
        a = b = c = d = f32x16(0)
        for _ in range(n_blocks):
            row2, row3, row4 = row + stride, row + 2 * stride, row + 3 * stride
            s, scale = fmt.block_sums(row, row2, row3, row4, panel), load_f32x16(panel + 4608)
            a, b = fma(fmt.result(s[0], row, panel), scale, a), fma(fmt.result(s[1], row2, panel), scale, b)
            c, d = fma(fmt.result(s[2], row3, panel), scale, c), fma(fmt.result(s[3], row4, panel), scale, d)
            row += UNPACKED
            panel += PANEL
        return a, b, c, d

    @entry
    def matmul_many(y, stride, w, row_bytes, n_blocks, out, i0, i1):
        """Write out[t, i] = row i of w . activations t, for the rows i0 to i1; y: panels of n_blocks superblocks."""
        unpacked, sums = np.empty(4 * n_blocks * UNPACKED + 63, np.uint8), np.empty((4, 16), np.float32)
        n_tok, w, y = out.shape[0], address_of(w), first_record(y)
        rows, row_stride, at = first_record(unpacked), n_blocks * UNPACKED, address_of(sums)
        for i in range(i0, i1, 4):
            n = min(4, i1 - i)
            for k in range(4):
                fmt.unpack_to_bytes(w + min(i + k, i1 - 1) * row_bytes, n_blocks, rows + k * row_stride)
            for t in range(0, n_tok, 16):
                a, b, c, d = fmt.panel_sums(rows, row_stride, n_blocks, y + t // 16 * n_blocks * PANEL)
                store(at, a)
                store(at + 64, b)
                store(at + 128, c)
                store(at + 192, d)
                for m in range(min(16, n_tok - t)):
                    for k in range(n):
                        out[t + m, i + k] = sums[k, m]
        keep(unpacked)
        keep(sums)

    @classmethod
    def kernels(cls) -> dict[str, Any]:
        """The kernels that Python calls, by their names in Format."""
        return super().kernels() | {"matmul_many": cls.matmul_many}


class ManyTokensWithBias(ManyTokensOfSuperblocks):
    """BIAS is subtracted with the sums of 16 activations."""

    @part
    def beside(block):
        """The scales once more: BIAS times them is subtracted."""
        return fmt.scales(block)

    @part
    def result(sums, row, panel):
        """(sums - BIAS * scale * sums of 16 activations) * factor."""
        whole = sums - pair_sums(row + 320, panel + 4096) * fmt.BIAS
        return to_f32(whole) * everywhere(load_f32x1(row + 352))


class ManyTokensWithMinimums(ManyTokensOfSuperblocks):
    """Minimums times the sums of 16 activations are subtracted."""

    @part
    def beside(block):
        """The minimums."""
        return fmt.minimums(block)

    @part
    def result(sums, row, panel):
        """sums * factor - minimum * sums of 16 activations * min_factor."""
        below = to_f32(pair_sums(row + 320, panel + 4096))
        return fma(below, everywhere(load_f32x1(row + 368)) * -1, to_f32(sums) * everywhere(load_f32x1(row + 352)))


fmt: ManyTokensOfSuperblocks = STAMPED
