"""TQ1_0 and TQ2_0: superblocks of 256 weights that are -1, 0 or 1 times one scale, d (F16).

            bytes  bits a weight   layout (bytes)               formula
    TQ1_0      54       1.6875     a 0-31  b 32-47  c 48-51  d 52-53     weight = d (quant - 1)
    TQ2_0      66       2.0625     q 0-63  d 64-65                       weight = d (quant - 1)

TQ2_0: weight w is in byte 32 (w // 128) + w % 32 of q, bits 2 (w // 32 % 4) and the next.
TQ1_0: a byte is a fraction of 256 with 5 digits of base 3, c's with 4. Digit k of a byte is the whole part of
3 (byte 3^k mod 256) / 256. Weights 0-159 are digits 0 to 4 of a, 160-239 those of b, 240-255 digits 0 to 3 of c, all
first digits before all second ones.
Source: ggml-common.h, block_tq1_0 and block_tq2_0; ggml-quants.c, dequantize_row_tq1_0 and _tq2_0;
ggml-cpu/arch/x86/quants.c, ggml_vec_dot_tq1_0_q8_K and _tq2_0_q8_K.
"""

from .formats import register_superblocks
from .k_quants import two_bits
from .machine.jit import inline
from .machine.lanes import concat, shuffle
from .machine.vectors import half_at, i32x16, load_u8x16, load_u8x32, to_i16, to_u8
from .superblocks import BIAS_BY_16


@inline
def digit(v, power):
    return to_u8(to_i16(v * power) * 3 >> 8)


last_digits = shuffle([10, 11, 12, 13])  # of 16 bytes that do not pass the end of the block


@inline
def quants_tq1(block):
    a, b, c = load_u8x32(block), load_u8x16(block + 32), last_digits(load_u8x16(block + 38))
    rest = concat(concat(digit(c, 1), digit(c, 3)), concat(digit(c, 9), digit(c, 27)))
    third = concat(digit(a, 81), concat(digit(b, 1), digit(b, 3)))
    fourth = concat(concat(digit(b, 9), digit(b, 27)), concat(digit(b, 81), rest))
    return concat(digit(a, 1), digit(a, 3)), concat(digit(a, 9), digit(a, 27)), third, fourth


@inline
def factor_tq1(block):
    return half_at(block + 52)


@inline
def quants_tq2(block):
    return two_bits(block)


@inline
def factor_tq2(block):
    return half_at(block + 64)


@inline
def one(block):
    return i32x16(1)


TQ1_0 = register_superblocks("TQ1_0", 34, 54, 1, 0, BIAS_BY_16, quants_tq1, one, factor_tq1)
TQ2_0 = register_superblocks("TQ2_0", 35, 66, 1, 0, BIAS_BY_16, quants_tq2, one, factor_tq2)
