"""IQ4_NL and IQ4_XS: four bits of a weight are a number in a table, whose steps grow with the distance from zero.

    VALUES  -127 -104 -83 -65 -49 -35 -22 -10  1  13  25  38  53  69  89  113

             bytes  bits a weight   layout (bytes)                           formula
    IQ4_NL      18       4.5        d 0-1   q 2-17                           weight = d VALUES[quant]
    IQ4_XS     136       4.25       d 0-1   h 2-3   l 4-7   q 8-135          weight = d (s - 32) VALUES[quant]

d is F16. A block of IQ4_NL holds 32 weights, one of IQ4_XS 8 groups of 32. Byte k of a group's 16 bytes of q holds the
low four bits for weight k, the high four for weight k + 16. Group g of IQ4_XS has a scale s of six bits: the lower four
are the low (g even) or high (g odd) nibble of byte g // 2 of l, the upper two are bits 2 g and 2 g + 1 of the u16 h.

What the dot products see of a quant is VALUES + 128, which is unsigned: bias 128.
Source: ggml-common.h, block_iq4_nl, block_iq4_xs, kvalues_iq4nl; ggml-quants.c, dequantize_row_iq4_nl and _xs.
"""

from .cpu import lookup
from .formats import register_quants, register_superblocks
from .jit import inline
from .lanes import constant, shuffle
from .simd import Vec
from .stacks import Fours, four_halves, four_halves_of_18, four_loads, stack_two_sums
from .superblocks import BIAS_BY_LANE
from .vectors import half_at, load_u8x16, load_u8x32, load_u16x1, load_u32x1, nibbles, to_i32

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

values = lookup([value + 128 for value in VALUES])


@inline
def quants_nl(row, j):
    return values(nibbles(load_u8x16(row + 18 * j + 2)))


@inline
def four_nl(row, stride, j):
    v = four_loads(row + 18 * j + 2, stride)
    return values(v & 15), values(v >> 4)


@inline
def scales_nl(row, stride, j):
    return four_halves(row + 18 * j, stride)


@inline
def scale_nl(row, j):
    return half_at(row + 18 * j)


@inline
def scales_of_four_nl(row, stride, j):
    return four_halves_of_18(row + 18 * j, stride)


by_group = shuffle([*range(16), *range(32, 48), *range(16, 32), *range(48, 64)])


@inline
def two_groups(at):
    return values(by_group(nibbles(load_u8x32(at))))


@inline
def quants_xs(block):
    return two_groups(block + 8), two_groups(block + 40), two_groups(block + 72), two_groups(block + 104)


spread16 = shuffle([0] * 16)
place_in_l = constant(Vec("i32", 16), [4 * (lane // 2) for lane in range(16)])
place_in_h = constant(Vec("i32", 16), [2 * (lane // 2) for lane in range(16)])


@inline
def scales_xs(block):
    l, h = to_i32(spread16(load_u32x1(block + 4))), to_i32(spread16(load_u16x1(block + 2)))
    return (l >> place_in_l() & 15 | (h >> place_in_h() & 3) << 4) - 32


FOURS_NL = Fours(four_nl, scales_nl, scales_of_four=scales_of_four_nl)
IQ4_NL = register_quants("IQ4_NL", 20, 32, 18, "Q8_0", 128, quants_nl, scale_nl, fours=FOURS_NL, one=stack_two_sums)
IQ4_XS = register_superblocks("IQ4_XS", 23, 136, 128, 32, BIAS_BY_LANE, quants_xs, scales_xs, half_at)
