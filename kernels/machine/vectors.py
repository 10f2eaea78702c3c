"""The vector types that kernels use, their loads, and functions on vectors: conversions, exp.

Names say what they make: `load_f32x16(address)`, `f32x16(number)`.
"""

from .jit import inline
from .lanes import bitcast, bitcast_to, convert, fma, larger, shuffle, smaller, splat
from .simd import Vec, loader

load_u8x1 = loader(Vec("u8", 1))
load_u8x16, load_u8x32, load_u8x64 = loader(Vec("u8", 16)), loader(Vec("u8", 32)), loader(Vec("u8", 64))
load_i8x16, load_i8x32, load_i8x64 = loader(Vec("i8", 16)), loader(Vec("i8", 32)), loader(Vec("i8", 64))
load_u32x1, load_i32x1, load_u16x1 = loader(Vec("u32", 1)), loader(Vec("i32", 1)), loader(Vec("u16", 1))
load_i16x8, load_i16x16, load_i16x32 = loader(Vec("i16", 8)), loader(Vec("i16", 16)), loader(Vec("i16", 32))
load_u16x16, load_u16x32 = loader(Vec("u16", 16)), loader(Vec("u16", 32))
load_i32x4, load_i32x16 = loader(Vec("i32", 4)), loader(Vec("i32", 16))
load_f32x1, load_f32x16, load_f32x32 = loader(Vec("f32", 1)), loader(Vec("f32", 16)), loader(Vec("f32", 32))
u8x32, u8x64, i16x1 = splat(Vec("u8", 32)), splat(Vec("u8", 64)), splat(Vec("i16", 1))
i32x8, i32x16 = splat(Vec("i32", 8)), splat(Vec("i32", 16))
f32x1, f32x4 = splat(Vec("f32", 1)), splat(Vec("f32", 4))
f32x8, f32x16, f64x1, f64x16 = splat(Vec("f32", 8)), splat(Vec("f32", 16)), splat(Vec("f64", 1)), splat(Vec("f64", 16))
to_f32, to_f64, to_u8, to_u16 = convert("f32"), convert("f64"), convert("u8"), convert("u16")
to_i8, to_i16, to_i32 = convert("i8"), convert("i16"), convert("i32")
as_f32, as_i32 = bitcast("f32"), bitcast("i32")


LOG2_E, LN2_HIGH, LN2_LOW = map(float.fromhex, ("0x1.715476p+0", "0x1.62e4p-1", "0x1.7f7d1cp-20"))
E1, E2, E3 = map(float.fromhex, ("0x1.ffffecp-1", "0x1.fffdb6p-2", "0x1.555e66p-3"))
E4, E5 = map(float.fromhex, ("0x1.573e2ep-5", "0x1.0e4020p-7"))


@inline
def exp(x):
    """e ** x in float32: within 2.3 units in the last place, exactly 0 below -104, inf above 88.73, NaN for NaN.

    x = n ln 2 + r with a whole n and |r| <= ln 2 / 2, e ** x = 2 ** n e ** r, e ** r a polynomial.
    Source: the coefficients are those of Arm's optimized-routines, which ggml_v_expf in ggml-cpu/vec.h uses too; the
    steps are those of its AVX-512 form, so that each bit is the same.
    """
    x = smaller(larger(x, -104), 89)
    shifted = fma(x, LOG2_E, 12582912.0)  # 1.5 * 2 ** 23: the last bits hold n
    n = shifted - 12582912.0
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = fma(fma(r, E5, E4), r * r, fma(r, E3, E2))
    p = fma(p, r * r, fma(r, E1, 1.0))
    whole = as_i32(shifted) - 0x4B400000
    low = whole >> 1  # 2 ** n as two factors: n may be -150 or 128, too far for the exponent of one float32
    return p * as_f32((low + 127) << 23) * as_f32((whole - low + 127) << 23)


# Each of 8 lanes four times: one number per lane of dot4 becomes one number per weight.
spread = shuffle([lane // 4 for lane in range(32)])


everywhere = shuffle([0] * 16)  # broadcast lane 0 to 16 lanes
as_bytes = bitcast_to(Vec("u8", 64))


@inline
def bytes_everywhere(at):
    """Broadcast the four bytes at an address to all 16 lanes of dot4: u8x64."""
    return as_bytes(everywhere(load_u32x1(at)))
