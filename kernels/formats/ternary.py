"""TQ1_0 and TQ2_0: superblocks of 256 weights that are -1, 0 or 1 times one scale."""

from ..machine.bits import quants_of_2_bits
from ..machine.half import half_at
from ..machine.jit import inline
from ..machine.lanes import concat, shuffle
from ..machine.template import part
from ..machine.vectors import i32x16, load_u8x16, load_u8x32, to_i16, to_u8
from ..products.superblock_sums import BiasBy16


@inline
def digit(v, power):
    """Digit k in base 3 of each byte of v, as 0, 1 or 2; power: 3 ** k. TQ1_0 says how bytes hold digits."""
    return to_u8(to_i16(v * power) * 3 >> 8)


last_digits = shuffle([10, 11, 12, 13])  # of 16 bytes that do not pass the end of the block


class TQ1_0(BiasBy16):
    """1.6875 bits per weight: weight = d * (quant - 1).

        byte  0-31  32-47  48-51  52-53
              a     b      c      d

    A byte of a and b is a fraction of 256 with 5 digits of base 3, a byte of c one with 4. Digit k of a byte is the
    whole part of 3 (byte 3^k mod 256) / 256. Weights 0-159 are the digits 0 to 4 of a, 160-239 those of b, 240-255 the
    digits 0 to 3 of c; the first digits of all bytes come before the second ones. d: F16.
    Source: ggml-common.h, block_tq1_0; ggml-quants.c, dequantize_row_tq1_0; ggml-cpu/arch/x86/quants.c,
    ggml_vec_dot_tq1_0_q8_K.
    """

    TYPE, SIZE, BIAS, HALVES = 34, 54, 1, (52,)

    @part
    def quants(block):
        """Take the digits of all bytes apart, in the order of the weights."""
        a, b, c = load_u8x32(block), load_u8x16(block + 32), last_digits(load_u8x16(block + 38))
        rest = concat(concat(digit(c, 1), digit(c, 3)), concat(digit(c, 9), digit(c, 27)))
        third = concat(digit(a, 81), concat(digit(b, 1), digit(b, 3)))
        fourth = concat(concat(digit(b, 9), digit(b, 27)), concat(digit(b, 81), rest))
        return concat(digit(a, 1), digit(a, 3)), concat(digit(a, 9), digit(a, 27)), third, fourth

    @part
    def scales(block):
        """Give each 16 weights the scale 1: only d scales them."""
        return i32x16(1)

    @part
    def factor(block):
        """Read d."""
        return half_at(block + 52)


class TQ2_0(BiasBy16):
    """2.0625 bits per weight: weight = d * (quant - 1).

        byte  0-63                                              64-65
              DDCCBBAA: A weight w, B w + 32, C w + 64, D w + 96   d

    The first 32 bytes hold the weights 0-127, the next 32 the weights 128-255. d: F16.
    Source: ggml-common.h, block_tq2_0; ggml-quants.c, dequantize_row_tq2_0; ggml-cpu/arch/x86/quants.c,
    ggml_vec_dot_tq2_0_q8_K.
    """

    TYPE, SIZE, BIAS, HALVES = 35, 66, 1, (64,)

    @part
    def quants(block):
        """Take 2 bits per weight from the bytes 0 to 63."""
        return quants_of_2_bits(block)

    @part
    def scales(block):
        """Give each 16 weights the scale 1: only d scales them."""
        return i32x16(1)

    @part
    def factor(block):
        """Read d."""
        return half_at(block + 64)
