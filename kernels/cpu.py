"""What only some CPUs do in one instruction, each beside a portable form: products of bytes, and 16-bit floats.

Which form is compiled is decided once, at import, from the CPU that numba compiles for: the host, or what
NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say. TINYMIA_PORTABLE=1 chooses the portable forms everywhere.
"""

import platform

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config
from numba.extending import intrinsic

from .jit import PORTABLE, inline
from .lanes import convert, unary
from .simd import Vec, lanes


def _target_features() -> set[str]:
    if config.CPU_FEATURES is not None:
        listed = config.CPU_FEATURES.split(",")
    elif config.CPU_NAME not in (None, "host"):
        listed = []  # a CPU model by name: LLVM knows what it has, we do not ask
    else:
        listed = [f"+{name}" for name, has in llvm.get_host_cpu_features().items() if has]
    return {name[1:] for name in listed if name.startswith("+")}


FEATURES = set() if PORTABLE else _target_features()
HAS_VNNI = "avx512vnni" in FEATURES and "avx512vl" in FEATURES
HAS_HALF = "f16c" in FEATURES or (platform.machine() in ("arm64", "aarch64") and not PORTABLE)


# Sums of four products of bytes: result[k] = acc[k] + q[4k] x[4k] + ... + q[4k+3] x[4k+3], q unsigned, x signed.


def _every_second(first):
    def emit(b, value, v, to):
        return b.shuffle_vector(value, value, lanes(range(first, v.n, 2)))

    return unary(lambda v: Vec(v.element, v.n // 2), emit)


even, odd = _every_second(0), _every_second(1)
to_i32 = convert("i32")


@inline
def dot4_portable(acc, q, x):
    products = to_i32(q) * to_i32(x)
    pairs = even(products) + odd(products)
    return acc + (even(pairs) + odd(pairs))


@intrinsic
def dot4_vnni(_, acc, q, x):
    """Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD (no saturation)."""

    def codegen(context, builder, sig, args):
        # From LLVM 22 on, the operands are vectors of bytes; before, vectors of i32.
        old = llvm.llvm_version_info[0] < 22
        operands = [args[0]] + [builder.bitcast(v, acc.llvm) if old else v for v in args[1:]]
        function_type = ir.FunctionType(acc.llvm, [v.type for v in operands])
        name = f"llvm.x86.avx512.vpdpbusd.{32 * acc.n}"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), operands)

    return acc(acc, q, x), codegen


dot4 = dot4_vnni if HAS_VNNI else dot4_portable


# Looking bytes up in a table of 16.

SHUFFLES = {16: ("ssse3", "llvm.x86.ssse3.pshuf.b.128"), 32: ("avx2", "llvm.x86.avx2.pshuf.b"),
            64: ("avx512bw", "llvm.x86.avx512.pshuf.b.512")}  # fmt: skip


def lookup_portable(table):
    """f(bytes 0 to 15) -> table[byte]: 15 choices, bit by bit of the byte."""

    def emit(b, index, v, to):
        options = [_constant(index, number) for number in table]
        for k in range(4):
            bit = b.trunc(b.lshr(index, _constant(index, k)), ir.VectorType(ir.IntType(1), v.n))
            options = [b.select(bit, one, zero) for zero, one in zip(options[::2], options[1::2], strict=True)]
        return options[0]

    return unary(lambda v: v, emit)


def lookup_shuffle(table):
    """The same by an instruction that shuffles bytes.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PSHUFB.
    """

    def emit(b, index, v, to):
        numbers = ir.Constant(index.type, [table[k % 16] for k in range(v.n)])
        function_type = ir.FunctionType(index.type, [index.type] * 2)
        function = cgutils.get_or_insert_function(b.module, function_type, SHUFFLES[v.n][1])
        return b.call(function, [numbers, index])

    return unary(lambda v: v, emit)


HAS_SHUFFLES = {feature for feature, _ in SHUFFLES.values()} <= FEATURES
lookup = lookup_shuffle if HAS_SHUFFLES else lookup_portable


# F16 and BF16 as bit patterns in u16 lanes.
# Source: IEEE 754-2019, 3.4 (binary16); ggml-impl.h, ggml_compute_fp32_to_bf16.


def _constant(value, number):
    """`number` in every lane of a vector like `value`, of the same width."""
    return ir.Constant(value.type, [number] * value.type.count)


def _widen_half(b, bits, v, to):
    if HAS_HALF:
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), v.n)), to.llvm)
    u32 = Vec("u32", v.n).llvm
    wide = b.zext(bits, u32)
    size = b.shl(b.and_(wide, _constant(wide, 0x7FFF)), _constant(wide, 13))
    # Exponents move from bias 15 to bias 127 by a product, which also turns subnormal numbers into normal ones.
    finite = b.bitcast(b.fmul(b.bitcast(size, to.llvm), ir.Constant(to.llvm, [2.0**112] * v.n)), u32)
    special = b.icmp_unsigned(">=", size, _constant(size, 0x7C00 << 13))
    value = b.select(special, b.or_(size, _constant(size, 0x7F800000)), finite)
    return b.bitcast(b.or_(value, b.shl(b.and_(wide, _constant(wide, 0x8000)), _constant(wide, 16))), to.llvm)


def _round_half(b, value, v, to):
    if HAS_HALF:
        return b.bitcast(b.fptrunc(value, ir.VectorType(ir.HalfType(), v.n)), to.llvm)
    u32 = Vec("u32", v.n).llvm
    bits = b.bitcast(value, u32)
    size = b.and_(bits, _constant(bits, 0x7FFFFFFF))
    odd = b.and_(b.lshr(size, _constant(size, 13)), _constant(size, 1))
    # The exponent's bias goes from 127 to 15; just under half a last place is added, and the rest cut off.
    normal = b.lshr(b.add(b.add(size, odd), _constant(size, 0xFFF - (112 << 23) & 0xFFFFFFFF)), _constant(size, 13))
    # A sum with 0.5 rounds at the place of the last bit of a subnormal half.
    shifted = b.fadd(b.bitcast(size, v.llvm), ir.Constant(v.llvm, [0.5] * v.n))
    small = b.sub(b.bitcast(shifted, u32), _constant(size, 0x3F000000))
    half = b.select(b.icmp_unsigned("<", size, _constant(size, 0x38800000)), small, normal)
    half = b.select(b.icmp_unsigned(">=", size, _constant(size, 0x47800000)), _constant(size, 0x7C00), half)
    half = b.select(b.icmp_unsigned(">", size, _constant(size, 0x7F800000)), _constant(size, 0x7E00), half)
    return b.trunc(b.or_(half, b.lshr(b.xor(bits, size), _constant(size, 16))), to.llvm)


def _widen_bf16(b, bits, v, to):
    wide = b.zext(bits, Vec("u32", v.n).llvm)
    return b.bitcast(b.shl(wide, _constant(wide, 16)), to.llvm)


def _round_bf16(b, value, v, to):
    bits = b.bitcast(value, Vec("u32", v.n).llvm)
    top = b.lshr(bits, _constant(bits, 16))
    rounded = b.lshr(b.add(b.add(bits, b.and_(top, _constant(bits, 1))), _constant(bits, 0x7FFF)), _constant(bits, 16))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, b.or_(top, _constant(bits, 64)), rounded), to.llvm)


widen_half, round_half = unary(lambda v: Vec("f32", v.n), _widen_half), unary(lambda v: Vec("u16", v.n), _round_half)
widen_bf16, round_bf16 = unary(lambda v: Vec("f32", v.n), _widen_bf16), unary(lambda v: Vec("u16", v.n), _round_bf16)
