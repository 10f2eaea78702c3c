"""Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 weights with one scale, and in the _1 formats one minimum.

           bytes  bits a weight   layout (bytes)                     formula
    Q4_0      18       4.5        d 0-1             q 2-17           weight = d * (quant - 8)
    Q4_1      20       5.0        d 0-1  m 2-3      q 4-19           weight = d * quant + m
    Q5_0      22       5.5        d 0-1  h 2-5      q 6-21           weight = d * (quant - 16)
    Q5_1      24       6.0        d 0-1  m 2-3  h 4-7  q 8-23        weight = d * quant + m

d and m are F16. Byte k of q holds the low four bits of two quants, 0 <= k < 16:

    bit   7 6 5 4           3 2 1 0
          quant k + 16      quant k

Bit k of the 32-bit number h is the fifth bit of quant k, 0 <= k < 32.
Source: ggml-common.h, block_q4_0 to block_q5_1; ggml-quants.c, dequantize_row_q4_0 to dequantize_row_q5_1.
"""

from .formats import register_quants
from .machine.jit import inline
from .machine.lanes import bits_of
from .machine.vectors import half_at, load_u8x16, load_u32x1, nibbles
from .stacks import Fours, four_fifth_bits, four_halves, four_halves_of_18, four_loads


@inline
def fifth_bits(address):
    return bits_of(load_u32x1(address)) << 4


@inline
def quants_q4_0(row, j):
    return nibbles(load_u8x16(row + 18 * j + 2))


@inline
def scale_q4_0(row, j):
    return half_at(row + 18 * j)


@inline
def quants_q4_1(row, j):
    return nibbles(load_u8x16(row + 20 * j + 4))


@inline
def scale_q4_1(row, j):
    return half_at(row + 20 * j)


@inline
def minimum_q4_1(row, j):
    return half_at(row + 20 * j + 2)


@inline
def quants_q5_0(row, j):
    return nibbles(load_u8x16(row + 22 * j + 6)) | fifth_bits(row + 22 * j + 2)


@inline
def scale_q5_0(row, j):
    return half_at(row + 22 * j)


@inline
def quants_q5_1(row, j):
    return nibbles(load_u8x16(row + 24 * j + 8)) | fifth_bits(row + 24 * j + 4)


@inline
def scale_q5_1(row, j):
    return half_at(row + 24 * j)


@inline
def minimum_q5_1(row, j):
    return half_at(row + 24 * j + 2)


# The same of four rows, see stacks.py.


@inline
def four_nibbles(at, stride):
    v = four_loads(at, stride)
    return v & 15, v >> 4


@inline
def four_q4_0(row, stride, j):
    return four_nibbles(row + 18 * j + 2, stride)


@inline
def scales_q4_0(row, stride, j):
    return four_halves(row + 18 * j, stride)


@inline
def scales_of_four_q4_0(row, stride, j):
    return four_halves_of_18(row + 18 * j, stride)


@inline
def four_q4_1(row, stride, j):
    return four_nibbles(row + 20 * j + 4, stride)


@inline
def scales_q4_1(row, stride, j):
    return four_halves(row + 20 * j, stride)


@inline
def minimums_q4_1(row, stride, j):
    return four_halves(row + 20 * j + 2, stride)


@inline
def four_q5_0(row, stride, j):
    q, h = four_nibbles(row + 22 * j + 6, stride), four_fifth_bits(row + 22 * j + 2, stride)
    return q[0] | h[0], q[1] | h[1]


@inline
def scales_q5_0(row, stride, j):
    return four_halves(row + 22 * j, stride)


@inline
def four_q5_1(row, stride, j):
    q, h = four_nibbles(row + 24 * j + 8, stride), four_fifth_bits(row + 24 * j + 4, stride)
    return q[0] | h[0], q[1] | h[1]


@inline
def scales_q5_1(row, stride, j):
    return four_halves(row + 24 * j, stride)


@inline
def minimums_q5_1(row, stride, j):
    return four_halves(row + 24 * j + 2, stride)


FOURS_Q4_0 = Fours(four_q4_0, scales_q4_0, scales_of_four=scales_of_four_q4_0)
FOURS_Q4_1 = Fours(four_q4_1, scales_q4_1, minimums_q4_1)
FOURS_Q5_0 = Fours(four_q5_0, scales_q5_0)
FOURS_Q5_1 = Fours(four_q5_1, scales_q5_1, minimums_q5_1)
Q4_0 = register_quants("Q4_0", 2, 32, 18, "Q8_0", 8, quants_q4_0, scale_q4_0, fours=FOURS_Q4_0)
Q4_1 = register_quants("Q4_1", 3, 32, 20, "Q8_1", 0, quants_q4_1, scale_q4_1, minimum_q4_1, fours=FOURS_Q4_1)
Q5_0 = register_quants("Q5_0", 6, 32, 22, "Q8_0", 16, quants_q5_0, scale_q5_0, fours=FOURS_Q5_0)
Q5_1 = register_quants("Q5_1", 7, 32, 24, "Q8_1", 0, quants_q5_1, scale_q5_1, minimum_q5_1, fours=FOURS_Q5_1)
