"""MXFP4: 32 weights in 17 bytes, 4.25 bits a weight: floats of 4 bits with one power of two.

    byte  0   1 .. 16
          e   quants

    weight = 2^(e - 128) VALUES[quant]        VALUES  0 1 2 3 4 6 8 12 0 -1 -2 -3 -4 -6 -8 -12

Byte k of the quants holds quant k in its low four bits and quant k + 16 in the high ones. A quant is a sign, two bits
of exponent and one of fraction; VALUES are its numbers doubled, so that they are whole, hence the power e - 128 and not
e - 127. What the dot products see is VALUES + 12, which is unsigned: bias 12.
Source: ggml-common.h, block_mxfp4 and kvalues_mxfp4; ggml-impl.h, ggml_e8m0_to_fp32_half; OCP Microscaling Formats
(MX) Specification 1.0; ggml-cpu/arch/x86/quants.c, ggml_vec_dot_mxfp4_q8_0 (even and odd groups in sums apart).
"""

import numpy as np

from . import rows
from .formats import register_quants
from .machine.cpu import lookup
from .machine.jit import inline
from .machine.lanes import first
from .machine.vectors import as_f32, i32x8, load_u8x1, load_u8x16, nibbles

VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

values = lookup([value + 12 for value in VALUES])


@inline
def quants(row, j):
    return values(nibbles(load_u8x16(row + 17 * j + 1)))


@inline
def scale(row, j):
    e = np.int64(first(load_u8x1(row + 17 * j)))
    return as_f32(i32x8(0x200000 << e if e < 2 else (e - 1) << 23))


MXFP4 = register_quants("MXFP4", 39, 32, 17, "Q8_0", 12, quants, scale, sums=rows.TWO_SUMS)
