"""IQ4_NL and IQ4_XS: four bits per weight, an index into a table whose steps grow with the distance from 0.

    VALUES  -127 -104 -83 -65 -49 -35 -22 -10  1  13  25  38  53  69  89  113

The dot products need unsigned bytes, so they use VALUES + 128, and BIAS is 128.
Source: ggml-common.h, block_iq4_nl, block_iq4_xs, kvalues_iq4nl; ggml-quants.c, dequantize_row_iq4_nl and _xs.
"""

from ..machine.bits import nibbles
from ..machine.cpu import lookup
from ..machine.half import half_at
from ..machine.jit import inline
from ..machine.lanes import constant, shuffle
from ..machine.simd import Vec
from ..machine.template import part
from ..machine.vectors import load_u8x16, load_u8x32, load_u16x1, load_u32x1, to_i32
from ..products.blocks_many import ManyTokens
from ..products.blocks_stacked import StackedWithOneApart, four_halves, four_nibbles, sixteen_halves
from ..products.superblock_sums import BiasByLane
from ..products.superblocks_many import ManyTokensWithBias

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

values = lookup([value + 128 for value in VALUES])


class IQ4_NL(StackedWithOneApart, ManyTokens):
    """4.5 bits per weight: weight = d * VALUES[quant].

        byte  0-1   2-17
              d     BBBBAAAA: A quant k, B quant k + 16

    d: F16.
    """

    TYPE, SIZE, BIAS, HALVES = 20, 18, 128, (0,)

    @part
    def quants(row, j):
        """Look the 32 nibbles of block j up in VALUES."""
        return values(nibbles(load_u8x16(row + 18 * j + 2)))

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 18 * j)

    @part
    def stacked_quants(row, stride, j):
        """Look the nibbles of block j of four rows up in VALUES."""
        q = four_nibbles(row + 18 * j + 2, stride)
        return values(q[0]), values(q[1])

    @part
    def stacked_scales(row, stride, j):
        """Read d of block j of four rows."""
        return four_halves(row + 18 * j, stride)

    @part
    def sixteen_scales(row, stride, j):
        """Read d of the blocks j to j + 3 of four rows."""
        return sixteen_halves(row + 18 * j, stride)


by_group = shuffle([*range(16), *range(32, 48), *range(16, 32), *range(48, 64)])


@inline
def quants_of_two_groups(at):
    """64 numbers of VALUES + 128 from the 32 bytes at an address, in the order of the weights."""
    return values(by_group(nibbles(load_u8x32(at))))


sixteen_times = shuffle([0] * 16)
place_in_l = constant(Vec("i32", 16), [4 * (lane // 2) for lane in range(16)])
place_in_h = constant(Vec("i32", 16), [2 * (lane // 2) for lane in range(16)])


class IQ4_XS(BiasByLane, ManyTokensWithBias):
    """4.25 bits per weight: weight = d * (s - 32) * VALUES[quant]; 8 groups of 32 weights have one s each.

        byte  0-1   2-3   4-7   8-135
              d     h     l     BBBBAAAA: in byte k of the 16 bytes of a group, A quant k, B quant k + 16

        l     BBBBAAAA DDDDCCCC FFFFEEEE HHHHGGGG      the low four bits of s of the groups A to H
        h     ddccbbaa hhggffee                        the high two bits

    d: F16.
    """

    TYPE, SIZE, BIAS, SPAN, HALVES = 23, 136, 128, 32, (0,)

    @part
    def quants(block):
        """Look the 256 nibbles up in VALUES, two groups of 32 at a time."""
        a, b = quants_of_two_groups(block + 8), quants_of_two_groups(block + 40)
        return a, b, quants_of_two_groups(block + 72), quants_of_two_groups(block + 104)

    @part
    def scales(block):
        """Put s - 32 together from its low four bits in l and its high two in h, for both halves of a group."""
        l, h = to_i32(sixteen_times(load_u32x1(block + 4))), to_i32(sixteen_times(load_u16x1(block + 2)))
        return (l >> place_in_l() & 15 | (h >> place_in_h() & 3) << 4) - 32

    @part
    def factor(block):
        """Read d."""
        return half_at(block)
