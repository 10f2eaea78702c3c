"""MXFP4: blocks of 32 floats of 4 bits with one power of two."""

import numpy as np

from ..machine.bits import nibbles
from ..machine.cpu import lookup
from ..machine.lanes import first
from ..machine.template import part
from ..machine.vectors import as_f32, i32x8, load_u8x1, load_u8x16
from ..products.blocks_many import ManyTokensInTwoSums

VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

values = lookup([value + 12 for value in VALUES])


class MXFP4(ManyTokensInTwoSums):
    """4.25 bits per weight: weight = 2^(e - 128) * VALUES[quant].

        byte  0   1-16
              e   BBBBAAAA: A quant k, B quant k + 16

        quant     S EE F       sign, exponent, fraction
        VALUES    0 1 2 3 4 6 8 12 0 -1 -2 -3 -4 -6 -8 -12

    VALUES are twice the numbers that quants stand for, so that they are whole; the power is e - 128 and not e - 127 for
    that reason. The dot products need unsigned bytes, so they use VALUES + 12, and BIAS is 12.
    Source: ggml-common.h, block_mxfp4 and kvalues_mxfp4; ggml-impl.h, ggml_e8m0_to_fp32_half; OCP Microscaling Formats
    (MX) Specification 1.0; ggml-cpu/arch/x86/quants.c, ggml_vec_dot_mxfp4_q8_0 (even and odd groups in separate sums).
    """

    TYPE, SIZE, BIAS = 39, 17, 12

    @part
    def quants(row, j):
        """Look the 32 nibbles of block j up in VALUES."""
        return values(nibbles(load_u8x16(row + 17 * j + 1)))

    @part
    def scale(row, j):
        """Make the float32 number 2 ** (e - 128) from its exponent bits; for e < 2 it is subnormal."""
        e = np.int64(first(load_u8x1(row + 17 * j)))
        return as_f32(i32x8(0x200000 << e if e < 2 else (e - 1) << 23))
