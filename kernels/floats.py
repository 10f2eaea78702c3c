"""F32, F16, BF16: rows of single numbers, little-endian, any length.

    F32   32 bits a weight   1 sign   8 exponent   23 fraction    IEEE 754 binary32
    F16   16 bits a weight   1 sign   5 exponent   10 fraction    IEEE 754 binary16
    BF16  16 bits a weight   1 sign   8 exponent    7 fraction    the upper half of an F32
"""

from .formats import register_floats
from .machine.cpu import widen_bf16, widen_half
from .machine.jit import inline
from .machine.vectors import load_f32x1, load_f32x16, load_u16x1, load_u16x16, load_u16x32


@inline
def f16_weights(address):
    return widen_half(load_u16x16(address))


@inline
def f16_weight(address):
    return widen_half(load_u16x1(address))


@inline
def bf16_weights(address):
    return widen_bf16(load_u16x32(address))


@inline
def bf16_weight(address):
    return widen_bf16(load_u16x1(address))


F32 = register_floats("F32", 0, 4, load_f32x16, load_f32x1)
F16 = register_floats("F16", 1, 2, f16_weights, f16_weight)
BF16 = register_floats("BF16", 30, 2, bf16_weights, bf16_weight, pairs=True)
