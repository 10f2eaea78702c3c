"""Q8_0: blocks of 32 weights with one byte each."""

from ..machine.half import half_at
from ..machine.template import part
from ..machine.vectors import load_u8x32
from ..products.blocks_many import ManyTokens


class Q8_0(ManyTokens):
    """8.5 bits per weight: weight = d * quant.

        byte  0-1   2-33
              d     quants, i8

    d: F16. The signed quants become unsigned by an exclusive or with 128, which adds 128: that is BIAS.
    Source: ggml-common.h, block_q8_0; ggml-quants.c, dequantize_row_q8_0.
    """

    TYPE, SIZE, BIAS, HALVES = 8, 34, 128, (0,)

    @part
    def quants(row, j):
        """Load the 32 signed bytes of block j, and add 128 to each."""
        return load_u8x32(row + 34 * j + 2) ^ 128

    @part
    def scale(row, j):
        """Read d of block j."""
        return half_at(row + 34 * j)
