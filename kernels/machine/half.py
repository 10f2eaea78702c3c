"""Numbers of 16 bits: F16 and BF16 to float32 and back, by the CPU's instruction or by whole-number arithmetic.

The 16-bit numbers are bit patterns in u16 lanes.
Source: IEEE 754-2019, 3.4 (binary16); ggml-impl.h, ggml_compute_fp32_to_bf16.
"""

import platform

from llvmlite import ir

from .cpu import FEATURES
from .jit import PORTABLE, inline
from .lanes import first, shuffle, unary
from .simd import Vec
from .simd import constant_like as like
from .vectors import f32x1, load_u16x1

HAS_HALF = "f16c" in FEATURES or (platform.machine() in ("arm64", "aarch64") and not PORTABLE)


def _widen_half(b, bits, v, to):
    if HAS_HALF:
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), v.n)), to.llvm)
    u32 = Vec("u32", v.n).llvm
    wide = b.zext(bits, u32)
    size = b.shl(b.and_(wide, like(wide, 0x7FFF)), like(wide, 13))
    # A multiplication by 2 ** 112 moves the exponent from bias 15 to bias 127, and makes subnormal numbers normal.
    finite = b.bitcast(b.fmul(b.bitcast(size, to.llvm), ir.Constant(to.llvm, [2.0**112] * v.n)), u32)
    special = b.icmp_unsigned(">=", size, like(size, 0x7C00 << 13))
    value = b.select(special, b.or_(size, like(size, 0x7F800000)), finite)
    return b.bitcast(b.or_(value, b.shl(b.and_(wide, like(wide, 0x8000)), like(wide, 16))), to.llvm)


def _round_half(b, value, v, to):
    if HAS_HALF:
        return b.bitcast(b.fptrunc(value, ir.VectorType(ir.HalfType(), v.n)), to.llvm)
    u32 = Vec("u32", v.n).llvm
    bits = b.bitcast(value, u32)
    size = b.and_(bits, like(bits, 0x7FFFFFFF))
    odd = b.and_(b.lshr(size, like(size, 13)), like(size, 1))
    # Change the exponent's bias from 127 to 15, and round: add just under half of the last place, then cut off.
    normal = b.lshr(b.add(b.add(size, odd), like(size, 0xFFF - (112 << 23) & 0xFFFFFFFF)), like(size, 13))
    # Adding 0.5 rounds at the last bit of a subnormal half.
    shifted = b.fadd(b.bitcast(size, v.llvm), ir.Constant(v.llvm, [0.5] * v.n))
    small = b.sub(b.bitcast(shifted, u32), like(size, 0x3F000000))
    half = b.select(b.icmp_unsigned("<", size, like(size, 0x38800000)), small, normal)
    half = b.select(b.icmp_unsigned(">=", size, like(size, 0x47800000)), like(size, 0x7C00), half)
    half = b.select(b.icmp_unsigned(">", size, like(size, 0x7F800000)), like(size, 0x7E00), half)
    return b.trunc(b.or_(half, b.lshr(b.xor(bits, size), like(size, 16))), to.llvm)


def _widen_bf16(b, bits, v, to):
    wide = b.zext(bits, Vec("u32", v.n).llvm)
    return b.bitcast(b.shl(wide, like(wide, 16)), to.llvm)


def _round_bf16(b, value, v, to):
    bits = b.bitcast(value, Vec("u32", v.n).llvm)
    top = b.lshr(bits, like(bits, 16))
    rounded = b.lshr(b.add(b.add(bits, b.and_(top, like(bits, 1))), like(bits, 0x7FFF)), like(bits, 16))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, b.or_(top, like(bits, 64)), rounded), to.llvm)


widen_half, round_half = unary(lambda v: Vec("f32", v.n), _widen_half), unary(lambda v: Vec("u16", v.n), _round_half)
widen_bf16, round_bf16 = unary(lambda v: Vec("f32", v.n), _widen_bf16), unary(lambda v: Vec("u16", v.n), _round_bf16)

broadcast8 = shuffle([0] * 8)


@inline
def half_at(address):
    """Read the F16 number at an address: float32 in 8 lanes.

    It is broadcast before it is converted. Converting a single number would write only a part of a register, and the
    instruction would then depend on the register's old content.
    """
    return widen_half(broadcast8(load_u16x1(address)))


@inline
def to_half(x):
    """Round a float32 number to F16; the result is float32 again."""
    return first(widen_half(round_half(f32x1(x))))
