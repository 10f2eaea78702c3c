"""Two operations for which some CPUs have an instruction, each with a portable form: products of bytes, table look-up.

The form is chosen once, at import, for the CPU that numba compiles for: this computer's, or the one that NUMBA_CPU_NAME
and NUMBA_CPU_FEATURES name. TINYMIA_PORTABLE=1 chooses the portable forms on every CPU.
"""

from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import config
from numba.extending import intrinsic

from .jit import PORTABLE, inline
from .lanes import even, odd, unary
from .simd import Vec, call, constant_like, indices
from .vectors import to_i32


def _target_features() -> set[str]:
    if config.CPU_FEATURES is not None:
        listed = config.CPU_FEATURES.split(",")
    elif config.CPU_NAME not in (None, "host"):
        listed = []  # a CPU model by name, without features: nothing beyond the portable forms is assumed
    else:
        listed = [f"+{name}" for name, has in llvm.get_host_cpu_features().items() if has]
        name = llvm.get_host_cpu_name()
        if name.startswith("apple-m"):  # LLVM lists no features on a Mac: all have SDOT, all but the M1 have USDOT
            listed += ["+dotprod"] + ["+i8mm"] * (name != "apple-m1")
    return {name[1:] for name in listed if name.startswith("+")}


FEATURES = set() if PORTABLE else _target_features()


# Sums of four products of bytes: result[k] = acc[k] + q[4k] x[4k] + ... + q[4k+3] x[4k+3], q unsigned, x signed.


@inline
def dot4_portable(acc, q, x):
    """Sum four products of bytes per lane with widening multiplications, which every CPU has."""
    products = to_i32(q) * to_i32(x)
    pairs = even(products) + odd(products)
    return acc + (even(pairs) + odd(pairs))


def _dot4_by(size, emit):
    """Make dot4 from `emit(builder, acc, q, x)`, which takes vectors of up to `size` bytes; longer ones are cut up."""

    def cut(b, v, n):
        return [b.shuffle_vector(v, v, indices(range(k, k + n))) for k in range(0, v.type.count, n)]

    @intrinsic
    def dot4(_, acc, q, x):
        def codegen(context, builder, sig, args):
            n = min(size, q.n)
            pieces = [emit(builder, *p) for p in zip(*(cut(builder, v, k) for v, k in zip(args, (n // 4, n, n))))]
            while len(pieces) > 1:
                both = indices(range(2 * pieces[0].type.count))
                pieces = [builder.shuffle_vector(*two, both) for two in zip(pieces[::2], pieces[1::2])]
            return pieces[0]

        return acc(acc, q, x), codegen

    return dot4


def _vpdpbusd(b, acc, q, x):
    """Multiply and sum bytes by VPDPBUSD, which does not saturate.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD.
    """
    # From LLVM 22 on, the operands are vectors of bytes; before, vectors of i32.
    old = llvm.llvm_version_info[0] < 22
    args = [acc] + [b.bitcast(v, acc.type) if old else v for v in (q, x)]
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, args)


def _vpmaddubsw(b, acc, q, x):
    """Multiply and sum bytes by VPMADDUBSW, in two steps: the low 7 bits of q, then its top bit.

    A sum of two products fits i16 only if q < 128. LLVM drops the second step where it can tell that the top bit is 0.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW and VPMADDWD.
    """
    i16 = Vec("i16", 16).llvm
    for bits in (127, 128):
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", i16, [b.and_(q, constant_like(q, bits)), x])
        acc = b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, constant_like(pairs, 1)]))
    return acc


def _usdot(b, acc, q, x):
    """Multiply and sum bytes by USDOT. Source: Arm Architecture Reference Manual, USDOT (vector)."""
    return call(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, [acc, q, x])


def _sdot(b, acc, q, x):
    """Multiply and sum bytes by SDOT, whose operands are both signed: with q - 128, and 128 x added to acc beforehand.

    Source: Arm Architecture Reference Manual, SDOT (vector).
    """
    name, zero = "llvm.aarch64.neon.sdot.v4i32.v16i8", constant_like(acc, 0)
    acc = b.sub(acc, call(b, name, acc.type, [zero, constant_like(x, -128), x]))
    return call(b, name, acc.type, [acc, b.xor(q, constant_like(q, 128)), x])


class Dot4(NamedTuple):
    """One way to compute dot4."""

    needs: frozenset[str]  # what the CPU must have, in LLVM's names
    instruction: str
    function: Any


DOT4 = (  # the best one first
    Dot4(frozenset({"avx512vnni", "avx512vl"}), "VPDPBUSD of AVX-512 VNNI, 64 bytes", _dot4_by(64, _vpdpbusd)),
    Dot4(frozenset({"avxvnni"}), "VPDPBUSD of AVX-VNNI, 32 bytes", _dot4_by(32, _vpdpbusd)),
    Dot4(frozenset({"avx2"}), "VPMADDUBSW and VPMADDWD of AVX2, 32 bytes", _dot4_by(32, _vpmaddubsw)),
    Dot4(frozenset({"i8mm"}), "USDOT of Arm's I8MM, 16 bytes", _dot4_by(16, _usdot)),
    Dot4(frozenset({"dotprod"}), "SDOT of Arm's DotProd, 16 bytes", _dot4_by(16, _sdot)),
    Dot4(frozenset(), "widening multiplications (no instruction for products of bytes)", dot4_portable),
)
CHOSEN_DOT4 = next(way for way in DOT4 if way.needs <= FEATURES)
dot4 = CHOSEN_DOT4.function
HAS_VNNI = CHOSEN_DOT4 is DOT4[0]


# Looking up bytes in a table of 16.

SHUFFLES = {16: ("ssse3", "llvm.x86.ssse3.pshuf.b.128"), 32: ("avx2", "llvm.x86.avx2.pshuf.b"),
            64: ("avx512bw", "llvm.x86.avx512.pshuf.b.512")}


def lookup_portable(table):
    """Make f(bytes 0 to 15) -> table[byte], by 15 selections: one of two for each bit of the byte."""

    def emit(b, index, v, to):
        options = [constant_like(index, number) for number in table]
        for k in range(4):
            bit = b.trunc(b.lshr(index, constant_like(index, k)), ir.VectorType(ir.IntType(1), v.n))
            options = [b.select(bit, one, zero) for zero, one in zip(options[::2], options[1::2], strict=True)]
        return options[0]

    return unary(lambda v: v, emit)


def lookup_shuffle(table):
    """Make f(bytes 0 to 15) -> table[byte], by an instruction that shuffles bytes.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PSHUFB.
    """

    def emit(b, index, v, to):
        numbers = ir.Constant(index.type, [table[k % 16] for k in range(v.n)])
        return call(b, SHUFFLES[v.n][1], index.type, [numbers, index])

    return unary(lambda v: v, emit)


HAS_SHUFFLES = {feature for feature, _ in SHUFFLES.values()} <= FEATURES
lookup = lookup_shuffle if HAS_SHUFFLES else lookup_portable
