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
        name = llvm.get_host_cpu_name()
        if name.startswith("apple-m"):  # LLVM lists nothing on a Mac; all have products of bytes, the M1 not mixed ones
            listed += ["+dotprod"] + ["+i8mm"] * (name != "apple-m1")
    return {name[1:] for name in listed if name.startswith("+")}


FEATURES = set() if PORTABLE else _target_features()
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


def _call(b, name, result, args):
    function_type = ir.FunctionType(result, [v.type for v in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), args)


def _dot4_by(size, emit):
    """dot4 by instructions that take `size` bytes: emit(builder, acc, q, x) -> acc, for vectors no longer than that."""

    def cut(b, v, n):
        return [b.shuffle_vector(v, v, lanes(range(k, k + n))) for k in range(0, v.type.count, n)]

    @intrinsic
    def dot4(_, acc, q, x):
        def codegen(context, builder, sig, args):
            n = min(size, q.n)
            pieces = [emit(builder, *p) for p in zip(*(cut(builder, v, k) for v, k in zip(args, (n // 4, n, n))))]
            while len(pieces) > 1:
                both = lanes(range(2 * pieces[0].type.count))
                pieces = [builder.shuffle_vector(*two, both) for two in zip(pieces[::2], pieces[1::2])]
            return pieces[0]

        return acc(acc, q, x), codegen

    return dot4


def _vpdpbusd(b, acc, q, x):
    """Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD (no saturation)."""
    # From LLVM 22 on, the operands are vectors of bytes; before, vectors of i32.
    old = llvm.llvm_version_info[0] < 22
    args = [acc] + [b.bitcast(v, acc.type) if old else v for v in (q, x)]
    return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, args)


def _vpmaddubsw(b, acc, q, x):
    """Sums of two products fit i16 when q < 128, so its top bit is taken by itself; LLVM leaves it out where it is 0.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW and VPMADDWD.
    """
    i16 = Vec("i16", 16).llvm
    for bits in (127, 128):
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", i16, [b.and_(q, _constant(q, bits)), x])
        acc = b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, _constant(pairs, 1)]))
    return acc


def _usdot(b, acc, q, x):
    """Source: Arm Architecture Reference Manual, USDOT (vector)."""
    return _call(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, [acc, q, x])


def _sdot(b, acc, q, x):
    """Both operands signed: q - 128, and what that lacks is taken from acc first.

    Source: Arm Architecture Reference Manual, SDOT (vector).
    """
    name, zero = "llvm.aarch64.neon.sdot.v4i32.v16i8", _constant(acc, 0)
    acc = b.sub(acc, _call(b, name, acc.type, [zero, _constant(x, -128), x]))
    return _call(b, name, acc.type, [acc, b.xor(q, _constant(q, 128)), x])


DOT4 = (  # what the CPU must have, and the form: the best one first
    ({"avx512vnni", "avx512vl"}, _dot4_by(64, _vpdpbusd)), ({"avxvnni"}, _dot4_by(32, _vpdpbusd)),
    ({"avx2"}, _dot4_by(32, _vpmaddubsw)),
    ({"i8mm"}, _dot4_by(16, _usdot)), ({"dotprod"}, _dot4_by(16, _sdot)),
    (set(), dot4_portable),
)  # fmt: skip
dot4 = next(form for needs, form in DOT4 if needs <= FEATURES)
HAS_VNNI = dot4 is DOT4[0][1]


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
        return _call(b, SHUFFLES[v.n][1], index.type, [numbers, index])

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
