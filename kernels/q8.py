"""Q8_0: 32 weights in 34 bytes, 8.5 bits a weight.

    byte  0 1   2 .. 33
          d     32 x i8 quants

    weight = d * quant

d is F16. The signed quants become unsigned by an exclusive or with 128, which adds 128: bias 128.
Source: ggml-common.h, block_q8_0; ggml-quants.c, dequantize_row_q8_0.
"""

from .formats import register_quants
from .machine.jit import inline
from .machine.vectors import half_at, load_u8x32


@inline
def quants(row, j):
    return load_u8x32(row + 34 * j + 2) ^ 128


@inline
def scale(row, j):
    return half_at(row + 34 * j)


Q8_0 = register_quants("Q8_0", 8, 32, 34, "Q8_0", 128, quants, scale)
