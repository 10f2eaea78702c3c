"""Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 weights with one scale, and in the _1 formats one minimum.

Byte k of the quants' 16 bytes, 0 <= k < 16, holds the low four bits of two of them:

    BBBBAAAA        A: quant k, B: quant k + 16; bit 7 first

Bit k of the 32-bit number h in the Q5 formats is the fifth bit of quant k, 0 <= k < 32.
"""

from ..machine.bits import fifth_bits, nibbles
from ..machine.half import half_at
from ..machine.template import part
from ..machine.vectors import load_u8x16
from ..products.blocks_many import ManyTokens, ManyTokensWithMinimum
from ..products.blocks_stacked import (
    StackedBlocks,
    StackedByFour,
    StackedWithMinimum,
    four_fifth_bits,
    four_halves,
    four_nibbles,
    sixteen_halves,
)


class Q4_0(StackedByFour, ManyTokens):
    """4.5 bits per weight: weight = d * (quant - 8).

        byte  0-1   2-17
              d     BBBBAAAA: two quants per byte

    d: F16. Source: ggml-common.h, block_q4_0; ggml-quants.c, dequantize_row_q4_0.
    """

    TYPE, SIZE, BIAS, HALVES = 2, 18, 8, (0,)

    @part
    def quants(row, j):
        """Take the 32 nibbles of block j."""
        return nibbles(load_u8x16(row + 18 * j + 2))

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 18 * j)

    @part
    def stacked_quants(row, stride, j):
        """Take the nibbles of block j of four rows."""
        return four_nibbles(row + 18 * j + 2, stride)

    @part
    def stacked_scales(row, stride, j):
        """Read d of block j of four rows."""
        return four_halves(row + 18 * j, stride)

    @part
    def sixteen_scales(row, stride, j):
        """Read d of the blocks j to j + 3 of four rows."""
        return sixteen_halves(row + 18 * j, stride)


class Q4_1(StackedWithMinimum, ManyTokensWithMinimum):
    """5 bits per weight: weight = d * quant + m.

        byte  0-1   2-3   4-19
              d     m     BBBBAAAA: two quants per byte

    d, m: F16. Source: ggml-common.h, block_q4_1; ggml-quants.c, dequantize_row_q4_1.
    """

    TYPE, SIZE, HALVES = 3, 20, (0, 2)

    @part
    def quants(row, j):
        """Take the 32 nibbles of block j."""
        return nibbles(load_u8x16(row + 20 * j + 4))

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 20 * j)

    @part
    def minimum(row, j):
        """Read m of block j."""
        return half_at(row + 20 * j + 2)

    @part
    def stacked_quants(row, stride, j):
        """Take the nibbles of block j of four rows."""
        return four_nibbles(row + 20 * j + 4, stride)

    @part
    def stacked_scales(row, stride, j):
        """Read d of block j of four rows."""
        return four_halves(row + 20 * j, stride)

    @part
    def stacked_minimums(row, stride, j):
        """Read m of block j of four rows."""
        return four_halves(row + 20 * j + 2, stride)


class Q5_0(StackedBlocks, ManyTokens):
    """5.5 bits per weight: weight = d * (quant - 16).

        byte  0-1   2-5   6-21
              d     h     BBBBAAAA: the low four bits of two quants per byte

    d: F16; h: the fifth bits. Source: ggml-common.h, block_q5_0; ggml-quants.c, dequantize_row_q5_0.
    """

    TYPE, SIZE, BIAS, HALVES = 6, 22, 16, (0,)

    @part
    def quants(row, j):
        """Put the low four bits and the fifth bit of the quants of block j together."""
        return nibbles(load_u8x16(row + 22 * j + 6)) | fifth_bits(row + 22 * j + 2)

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 22 * j)

    @part
    def stacked_quants(row, stride, j):
        """Put the low four bits and the fifth bit of the quants of block j of four rows together."""
        q, h = four_nibbles(row + 22 * j + 6, stride), four_fifth_bits(row + 22 * j + 2, stride)
        return q[0] | h[0], q[1] | h[1]

    @part
    def stacked_scales(row, stride, j):
        """Read d of block j of four rows."""
        return four_halves(row + 22 * j, stride)


class Q5_1(StackedWithMinimum, ManyTokensWithMinimum):
    """6 bits per weight: weight = d * quant + m.

        byte  0-1   2-3   4-7   8-23
              d     m     h     BBBBAAAA: the low four bits of two quants per byte

    d, m: F16; h: the fifth bits. Source: ggml-common.h, block_q5_1; ggml-quants.c, dequantize_row_q5_1.
    """

    TYPE, SIZE, HALVES = 7, 24, (0, 2)

    @part
    def quants(row, j):
        """Put the low four bits and the fifth bit of the quants of block j together."""
        return nibbles(load_u8x16(row + 24 * j + 8)) | fifth_bits(row + 24 * j + 4)

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 24 * j)

    @part
    def minimum(row, j):
        """Read m of block j."""
        return half_at(row + 24 * j + 2)

    @part
    def stacked_quants(row, stride, j):
        """Put the low four bits and the fifth bit of the quants of block j of four rows together."""
        q, h = four_nibbles(row + 24 * j + 8, stride), four_fifth_bits(row + 24 * j + 4, stride)
        return q[0] | h[0], q[1] | h[1]

    @part
    def stacked_scales(row, stride, j):
        """Read d of block j of four rows."""
        return four_halves(row + 24 * j, stride)

    @part
    def stacked_minimums(row, stride, j):
        """Read m of block j of four rows."""
        return four_halves(row + 24 * j + 2, stride)
