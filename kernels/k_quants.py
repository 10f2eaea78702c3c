"""Q2_K to Q6_K: superblocks of 256 weights; every 16 or 32 of them have a small whole-number scale of their own.

           bytes  bits a weight   layout (bytes)                                           formula
    Q2_K      84       2.625      s 0-15   q 16-79   d 80-81   dmin 82-83                  d s quant - dmin m
    Q3_K     110       3.4375     h 0-31   q 32-95   s 96-107  d 108-109                   d (s - 32) (quant - 4)
    Q4_K     144       4.5        d 0-1    dmin 2-3  s 4-15    q 16-143                    d s quant - dmin m
    Q5_K     176       5.5        d 0-1    dmin 2-3  s 4-15    h 16-47     q 48-175        d s quant - dmin m
    Q6_K     210       6.5625     q 0-127  h 128-191 s 192-207 d 208-209                   d s (quant - 32)

d and dmin are F16. In group g of 16 weights (Q2_K, Q3_K, Q6_K) or of 32 (Q4_K, Q5_K), s and m are

    Q2_K   byte g of s                m in bits 4-7, s in bits 0-3
    Q6_K   byte g of s                signed
    Q4_K, Q5_K, bits 7 6 | 5 4 3 2 1 0, g < 4:     Q3_K, bits 7 6 5 4 | 3 2 1 0, g < 8:
        byte g        s[g+4] high | s[g]               byte g       s[g+8] low | s[g] low
        byte g + 4    m[g+4] high | m[g]           and 7 6 | 5 4 | 3 2 | 1 0, g < 4:
        byte g + 8    m[g+4] low (7-4), s[g+4] low     byte g + 8   high bits of s[g+12], s[g+8], s[g+4], s[g]

The quants' bits, of weight w:

    Q2_K, Q3_K   q: byte 32 (w // 128) + w % 32, bits 2 (w // 32 % 4) and the next
    Q3_K         h: byte w % 32, bit w // 32: the third bit
    Q4_K, Q5_K   q: byte 32 (w // 64) + w % 32, the low nibble when w % 64 < 32, else the high one
    Q5_K         h: byte w % 32, bit w // 32: the fifth bit
    Q6_K         q: byte 64 (w // 128) + w % 64, the low nibble when w % 128 < 64, else the high one
                 h: byte 32 (w // 128) + w % 32, bits 2 (w // 32 % 4) and the next: bits five and six
Source: ggml-common.h, block_q2_K to block_q6_K; ggml-quants.c, dequantize_row_q2_K to dequantize_row_q6_K.
"""

from .formats import register_superblocks
from .machine.jit import inline
from .machine.lanes import concat, shuffle
from .machine.vectors import half_at, load_i8x16, load_u8x16, load_u8x32, load_u8x64, nibbles, to_i32
from .superblocks import BIAS_BY_16, BIAS_BY_LANE, MINIMUMS_IN_ONE, MINIMUMS_OF_16, MINIMUMS_OF_32


@inline
def low_halves(v):
    """Bits 0 and 1 of all bytes, then bits 2 and 3."""
    return concat(v, v >> 2) & 3


@inline
def high_halves(v):
    return concat(v >> 4, v >> 6) & 3


# Q2_K.


@inline
def two_bits(at):
    a, b = load_u8x32(at), load_u8x32(at + 32)
    return low_halves(a), high_halves(a), low_halves(b), high_halves(b)


@inline
def quants_q2(block):
    return two_bits(block + 16)


@inline
def scales_q2(block):
    return to_i32(load_u8x16(block) & 15)


@inline
def minimums_q2(block):
    return to_i32(load_u8x16(block) >> 4)


@inline
def factor_q2(block):
    return half_at(block + 80)


@inline
def min_factor_q2(block):
    return half_at(block + 82)


# Q3_K.


@inline
def bits_0_to_7(h):
    """Bit k of all bytes, as 0 or 1: four times two of the bits."""
    return (concat(h, h >> 1) & 1, concat(h >> 2, h >> 3) & 1, concat(h >> 4, h >> 5) & 1, concat(h >> 6, h >> 7) & 1)


@inline
def quants_q3(block):
    q, h = two_bits(block + 32), bits_0_to_7(load_u8x32(block))
    return q[0] | h[0] << 2, q[1] | h[1] << 2, q[2] | h[2] << 2, q[3] | h[3] << 2


bytes_0_to_7, bytes_8_to_11 = shuffle(range(2, 10)), shuffle(range(10, 14))


@inline
def scales_q3(block):
    s = load_u8x16(block + 94)  # not 96: 16 bytes from there would pass the end
    h = bytes_8_to_11(s)
    high = concat(concat(h, h >> 2), concat(h >> 4, h >> 6)) & 3
    return to_i32(nibbles(bytes_0_to_7(s)) | high << 4) - 32


@inline
def factor_q3(block):
    return half_at(block + 108)


# Q4_K and Q5_K.

bytes_4_to_11, bytes_12_to_15 = shuffle(range(4, 12)), shuffle(range(12, 16))
each_scale = shuffle([0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11])
each_minimum = shuffle([4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15])


@inline
def six_bits(block):
    """s[0-3], m[0-3], s[4-7], m[4-7]"""
    v = load_u8x16(block)
    whole = bytes_4_to_11(v)
    return concat(whole & 63, nibbles(bytes_12_to_15(v)) | (whole >> 6) << 4)


@inline
def scales_q4(block):
    return to_i32(each_scale(six_bits(block)))


@inline
def minimums_q4(block):
    return to_i32(each_minimum(six_bits(block)))


@inline
def min_factor_q4(block):
    return half_at(block + 2)


@inline
def four_nibbles(at):
    a, b, c, d = load_u8x32(at), load_u8x32(at + 32), load_u8x32(at + 64), load_u8x32(at + 96)
    return nibbles(a), nibbles(b), nibbles(c), nibbles(d)


@inline
def quants_q4(block):
    return four_nibbles(block + 16)


@inline
def quants_q5(block):
    q, h = four_nibbles(block + 48), bits_0_to_7(load_u8x32(block + 16))
    return q[0] | h[0] << 4, q[1] | h[1] << 4, q[2] | h[2] << 4, q[3] | h[3] << 4


# Q6_K.


@inline
def quants_q6(block):
    a, b, h, k = load_u8x64(block), load_u8x64(block + 64), load_u8x32(block + 128), load_u8x32(block + 160)
    first = a & 15 | low_halves(h) << 4, a >> 4 | high_halves(h) << 4
    return first[0], first[1], b & 15 | low_halves(k) << 4, b >> 4 | high_halves(k) << 4


@inline
def scales_q6(block):
    return to_i32(load_i8x16(block + 192))


@inline
def factor_q6(block):
    return half_at(block + 208)


Q2_K = register_superblocks(
    "Q2_K", 10, 84, 0, 16, MINIMUMS_OF_16, quants_q2, scales_q2, factor_q2, minimums_q2, min_factor_q2
)
Q3_K = register_superblocks("Q3_K", 11, 110, 4, 16, BIAS_BY_LANE, quants_q3, scales_q3, factor_q3)
Q4_K = register_superblocks(
    "Q4_K", 12, 144, 0, 32, MINIMUMS_OF_32, quants_q4, scales_q4, half_at, minimums_q4, min_factor_q4
)
Q5_K = register_superblocks(
    "Q5_K", 13, 176, 0, 32, MINIMUMS_IN_ONE, quants_q5, scales_q4, half_at, minimums_q4, min_factor_q4
)
Q6_K = register_superblocks("Q6_K", 14, 210, 32, 16, BIAS_BY_16, quants_q6, scales_q6, factor_q6)
