"""The vector types that kernels use, their loads, and functions on vectors: conversions, exp.

Names say what they make: `load_f32x16(address)`, `f32x16(number)`.
"""

from .cpu import round_half, widen_half
from .jit import inline
from .lanes import bitcast, convert, first, fma, maximum, minimum, shuffle, splat
from .simd import Vec, loader

load_u8x16, load_u8x32, load_i8x32 = loader(Vec("u8", 16)), loader(Vec("u8", 32)), loader(Vec("i8", 32))
load_i8x64, load_u32x1, load_u16x1 = loader(Vec("i8", 64)), loader(Vec("u32", 1)), loader(Vec("u16", 1))
load_u16x16, load_i32x16 = loader(Vec("u16", 16)), loader(Vec("i32", 16))
load_f32x1, load_f32x16, load_f32x32 = loader(Vec("f32", 1)), loader(Vec("f32", 16)), loader(Vec("f32", 32))
u8x32, i32x8, f32x1 = splat(Vec("u8", 32)), splat(Vec("i32", 8)), splat(Vec("f32", 1))
f32x8, f32x16, f64x1, f64x16 = splat(Vec("f32", 8)), splat(Vec("f32", 16)), splat(Vec("f64", 1)), splat(Vec("f64", 16))
to_f32, to_f64, to_i8, to_i32, to_u8 = convert("f32"), convert("f64"), convert("i8"), convert("i32"), convert("u8")
spread8 = shuffle([0] * 8)
as_f32, as_i32 = bitcast("f32"), bitcast("i32")


@inline
def half_at(address):
    """The F16 number at an address, as float32 in 8 lanes.

    Spread first and widened then: one number by itself goes through a register that CPUs wait for.
    """
    return widen_half(spread8(load_u16x1(address)))


@inline
def to_half(x):
    """A float32 number rounded to F16, as float32."""
    return first(widen_half(round_half(f32x1(x))))


@inline
def exp(x):
    """e ** x in float32: within 2 units in the last place, exactly 0 below -104, inf above 88.73, NaN for NaN.

    x = n ln 2 + r with a whole n and |r| <= ln 2 / 2, e ** x = 2 ** n e ** r, e ** r a polynomial.
    Source: the coefficients and the two parts of ln 2 are those of Cephes, expf.c.
    """
    x = minimum(maximum(x, -104), 89)
    shifted = fma(x, 1.44269504088896341, 12582912.0)  # 1.5 * 2 ** 23: the last bits hold n
    n = shifted - 12582912.0
    r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x))
    p = 1.9875691500e-4
    p = fma(p, r, 1.3981999507e-3)
    p = fma(p, r, 8.3334519073e-3)
    p = fma(p, r, 4.1665795894e-2)
    p = fma(p, r, 1.6666665459e-1)
    p = fma(p, r, 5.0000001201e-1)
    p = fma(p, r * r, r) + 1.0
    whole = as_i32(shifted) - 0x4B400000
    low = whole >> 1  # 2 ** n in two factors: n may be -150 or 128, beyond what one exponent holds
    return p * as_f32((low + 127) << 23) * as_f32((whole - low + 127) << 23)


# Each of 8 lanes four times: from a number per dot4 lane to a number per weight.
spread = shuffle([lane // 4 for lane in range(32)])
