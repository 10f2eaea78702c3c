"""Q2_K to Q6_K: superblocks of 256 weights; each 16 or 32 of them share a small whole-number scale.

Bits are drawn with letters, bit 7 first: each letter stands for one number, and each place for one of its bits. Quants
lie in this order:

    2 bits   DDCCBBAA              A quant w, B quant w + 32, C quant w + 64, D quant w + 96;  32 bytes for 128 weights
    4 bits   BBBBAAAA              A quant w, B quant w + 32;                                  32 bytes for 64 weights
    1 bit    HGFEDCBA              A quant w, B quant w + 32, ... H quant w + 224;             32 bytes for 256 weights

Source: ggml-common.h, block_q2_K to block_q6_K; ggml-quants.c, dequantize_row_q2_K to dequantize_row_q6_K.
"""

from ..machine.bits import high_pairs, low_pairs, nibbles, quants_of_2_bits, quants_of_4_bits, single_bits
from ..machine.half import half_at
from ..machine.jit import inline
from ..machine.lanes import concat, shuffle
from ..machine.template import part
from ..machine.vectors import load_i8x16, load_u8x16, load_u8x32, load_u8x64, to_i32
from ..products.superblock_sums import BiasBy16, BiasByLane, MinimumsInOne, MinimumsOf16, MinimumsOf32
from ..products.superblocks_many import ManyTokensWithBias, ManyTokensWithMinimums


class Q2_K(MinimumsOf16, ManyTokensWithMinimums):
    """2.625 bits per weight: weight = d * s * quant - dmin * m; one s and one m per 16 weights.

        byte  0-15      16-79     80-81  82-83
              mmmmssss  quants    d      dmin

    quants: 2 bits. d, dmin: F16.
    """

    TYPE, SIZE, SPAN, HALVES = 10, 84, 16, (80, 82)

    @part
    def quants(block):
        """Take 2 bits per weight from the bytes 16 to 79."""
        return quants_of_2_bits(block + 16)

    @part
    def scales(block):
        """Take s from the low nibbles of the bytes 0 to 15."""
        return to_i32(load_u8x16(block) & 15)

    @part
    def minimums(block):
        """Take m from the high nibbles of the bytes 0 to 15."""
        return to_i32(load_u8x16(block) >> 4)

    @part
    def factor(block):
        """Read d."""
        return half_at(block + 80)

    @part
    def min_factor(block):
        """Read dmin."""
        return half_at(block + 82)


bytes_0_to_7, bytes_8_to_11 = shuffle(range(2, 10)), shuffle(range(10, 14))


class Q3_K(BiasByLane, ManyTokensWithBias):
    """3.4375 bits per weight: weight = d * (s - 32) * (quant - 4); one s of 6 bits per 16 weights.

        byte  0-31      32-95            96-107  108-109
              high bit  low 2 bits       s       d

        s     IIIIAAAA JJJJBBBB KKKKCCCC LLLLDDDD MMMMEEEE NNNNFFFF OOOOGGGG PPPPHHHH    the low four bits of A to P
              mmiieeaa nnjjffbb ookkggcc ppllhhdd                                        the high two bits of them

    d: F16.
    """

    TYPE, SIZE, BIAS, SPAN, HALVES = 11, 110, 4, 16, (108,)

    @part
    def quants(block):
        """Put the low 2 bits and the high bit of each quant together."""
        q, h = quants_of_2_bits(block + 32), single_bits(load_u8x32(block))
        return q[0] | h[0] << 2, q[1] | h[1] << 2, q[2] | h[2] << 2, q[3] | h[3] << 2

    @part
    def scales(block):
        """Put s - 32 together from its low four and its high two bits."""
        s = load_u8x16(block + 94)  # not 96: 16 bytes from there would pass the end of the block
        h = bytes_8_to_11(s)
        high = concat(concat(h, h >> 2), concat(h >> 4, h >> 6)) & 3
        return to_i32(nibbles(bytes_0_to_7(s)) | high << 4) - 32

    @part
    def factor(block):
        """Read d."""
        return half_at(block + 108)


bytes_4_to_11, bytes_12_to_15 = shuffle(range(4, 12)), shuffle(range(12, 16))
each_scale = shuffle([0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11])
each_minimum = shuffle([4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15])


@inline
def six_bits(block):
    """The 16 numbers of 6 bits in the bytes 4 to 15 of a Q4_K or Q5_K block, in the order ABCD abcd EFGH efgh."""
    v = load_u8x16(block)
    whole = bytes_4_to_11(v)
    return concat(whole & 63, nibbles(bytes_12_to_15(v)) | (whole >> 6) << 4)


class Q4_K(MinimumsOf32, ManyTokensWithMinimums):
    """4.5 bits per weight: weight = d * s * quant - dmin * m; one s and one m of 6 bits per 32 weights.

        byte  0-1   2-3    4-15      16-143
              d     dmin   s and m   quants

        s, m  EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD    s of the groups A to D; the high two bits of s of E to H
              eeaaaaaa ffbbbbbb ggcccccc hhdddddd    m of the groups A to D; the high two bits of m of E to H
              eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH    the low four bits of s (capitals) and of m of E to H

    quants: 4 bits. d, dmin: F16.
    """

    TYPE, SIZE, SPAN, HALVES = 12, 144, 32, (0, 2)

    @part
    def quants(block):
        """Take 4 bits per weight from the bytes 16 to 143."""
        return quants_of_4_bits(block + 16)

    @part
    def scales(block):
        """Take s of each group of 32, for both its halves of 16 weights."""
        return to_i32(each_scale(six_bits(block)))

    @part
    def minimums(block):
        """Take m of each group of 32, for both its halves of 16 weights."""
        return to_i32(each_minimum(six_bits(block)))

    @part
    def factor(block):
        """Read d."""
        return half_at(block)

    @part
    def min_factor(block):
        """Read dmin."""
        return half_at(block + 2)


class Q5_K(MinimumsInOne, ManyTokensWithMinimums):
    """5.5 bits per weight: weight = d * s * quant - dmin * m; one s and one m of 6 bits per 32 weights.

        byte  0-1   2-3    4-15      16-47        48-175
              d     dmin   s and m   fifth bit    low 4 bits

    s, m, d, dmin: as in Q4_K.
    """

    TYPE, SIZE, SPAN, HALVES = 13, 176, 32, (0, 2)
    scales, minimums, factor, min_factor = Q4_K.scales, Q4_K.minimums, Q4_K.factor, Q4_K.min_factor

    @part
    def quants(block):
        """Put the low 4 bits and the fifth bit of each quant together."""
        q, h = quants_of_4_bits(block + 48), single_bits(load_u8x32(block + 16))
        return q[0] | h[0] << 4, q[1] | h[1] << 4, q[2] | h[2] << 4, q[3] | h[3] << 4


class Q6_K(BiasBy16, ManyTokensWithBias):
    """6.5625 bits per weight: weight = d * s * (quant - 32); one s per 16 weights.

        byte  0-127       128-191      192-207   208-209
              low 4 bits  high 2 bits  s, i8     d

        low   BBBBAAAA    A quant w, B quant w + 64; 64 bytes for 128 weights
        high  DDCCBBAA    A quant w, B quant w + 32, C quant w + 64, D quant w + 96; 32 bytes for 128 weights

    d: F16.
    """

    TYPE, SIZE, BIAS, SPAN, HALVES = 14, 210, 32, 16, (208,)

    @part
    def quants(block):
        """Put the low 4 bits and the high 2 bits of each quant together."""
        a, b, h, k = load_u8x64(block), load_u8x64(block + 64), load_u8x32(block + 128), load_u8x32(block + 160)
        first = a & 15 | low_pairs(h) << 4, a >> 4 | high_pairs(h) << 4
        return first[0], first[1], b & 15 | low_pairs(k) << 4, b >> 4 | high_pairs(k) << 4

    @part
    def scales(block):
        """Load the signed bytes 192 to 207."""
        return to_i32(load_i8x16(block + 192))

    @part
    def factor(block):
        """Read d."""
        return half_at(block + 208)
