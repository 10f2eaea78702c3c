"""Functions on vectors: made for every element type and number of lanes from a few lines of LLVM IR each."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import INDEX, Vec, broadcast, lanes, operands


def call(builder, name: str, result, args):
    """Call an LLVM function; `name` is completed with the first argument's type."""
    suffix = {"i32": "i32", "float": "f32", "double": "f64", "i8": "i8", "i16": "i16", "half": "f16"}
    vector = args[0].type
    full = f"{name}.v{vector.count}{suffix[str(vector.element)]}"
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full), args)


# Making vectors out of others.


def unary(result, emit):
    """f(vector) -> result(vector's type), by `emit(builder, value, from, to)`."""

    @intrinsic
    def f(_, v):
        to = result(v)
        return to(v), lambda context, builder, sig, args: emit(builder, args[0], v, to)

    return f


def splat(vec: Vec):
    """f(number) -> vec with that number in every lane"""

    @intrinsic
    def f(_, x):
        def codegen(context, builder, sig, args):
            return broadcast(builder, context.cast(builder, args[0], sig.args[0], vec.scalar), vec.llvm)

        return vec(types.unliteral(x)), codegen

    return f


def constant(vec: Vec, numbers):
    """f() -> vec of these numbers"""
    value = ir.Constant(vec.llvm, list(numbers))

    @intrinsic
    def f(_):
        return vec(), lambda context, builder, sig, args: value

    return f


def convert(element: str):
    """f(vector) -> the same numbers in another element type; floats that do not fit saturate, NaN becomes 0"""

    def emit(b, value, v, to):
        if v.is_float and to.is_float:
            return (b.fpext if to.element == "f64" else b.fptrunc)(value, to.llvm)
        if v.is_float:
            return call(b, f"llvm.fptosi.sat.v{to.n}{to.element}", to.llvm, [value])
        if to.is_float:
            return (b.sitofp if v.is_signed else b.uitofp)(value, to.llvm)
        if to.llvm.element.width < v.llvm.element.width:
            return b.trunc(value, to.llvm)
        return (b.sext if v.is_signed else b.zext)(value, to.llvm)

    return unary(lambda v: Vec(element, v.n), emit)


def bitcast(element: str):
    """f(vector) -> the same bits in another element type of the same width"""
    return unary(lambda v: Vec(element, v.n), lambda b, value, v, to: b.bitcast(value, to.llvm))


def bitcast_to(vec: Vec):
    """f(vector) -> the same bits as a vec"""
    return unary(lambda v: vec, lambda b, value, v, to: b.bitcast(value, to.llvm))


def shuffle(mask):
    """f(vector) -> lanes `mask` of it"""
    emit = lambda b, value, v, to: b.shuffle_vector(value, value, lanes(mask))  # noqa: E731
    return unary(lambda v: Vec(v.element, len(mask)), emit)


def shuffle2(mask):
    """f(a, b) -> lanes `mask` of those of a followed by those of b"""

    @intrinsic
    def f(_, a, b):
        def codegen(context, builder, sig, args):
            return builder.shuffle_vector(*args, lanes(mask))

        return Vec(a.element, len(mask))(a, b), codegen

    return f


@intrinsic
def concat(_, low, high):
    """The lanes of `low`, then the lanes of `high`."""

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(*args, lanes(range(2 * low.n)))

    return Vec(low.element, 2 * low.n)(low, high), codegen


def _half(part):
    def emit(b, value, v, to):
        return b.shuffle_vector(value, value, lanes(range(part * to.n, (part + 1) * to.n)))

    return unary(lambda v: Vec(v.element, v.n // 2), emit)


low, high = _half(0), _half(1)  # half of the lanes each


# Arithmetic that is no operator.


def nary(n, emit):
    """f(vectors and numbers, at least one vector) -> vector"""

    def typed(args):
        vec = next(t for t in args if isinstance(t, Vec))

        def codegen(context, builder, sig, values):
            return emit(builder, vec, *operands(context, builder, vec, sig.args, values))

        return vec(*(types.unliteral(t) for t in args)), codegen

    if n == 2:
        return intrinsic(lambda _, a, b: typed((a, b)))
    return intrinsic(lambda _, a, b, c: typed((a, b, c)))


def _larger(b, v, x, y):
    return b.select(b.or_(b.fcmp_ordered(">", x, y), b.fcmp_unordered("uno", x, x)), x, y)


def _smaller(b, v, x, y):
    return b.select(b.or_(b.fcmp_ordered("<", x, y), b.fcmp_unordered("uno", x, x)), x, y)


fma = nary(3, lambda b, v, x, y, z: call(b, "llvm.fmuladd", v.llvm, [x, y, z]))  # rounded once where the CPU can
maximum, minimum = nary(2, _larger), nary(2, _smaller)  # NaN where one of the two is NaN


def _llvm(name):
    return unary(lambda v: v, lambda b, value, v, to: call(b, name, to.llvm, [value]))


rint, fabs = _llvm("llvm.rint"), _llvm("llvm.fabs")


def _fold(instruction):
    """f(vector) -> one number; halves onto each other, so in the same order on every CPU"""

    def emit(b, value, v, to):
        n = v.n
        while n > 1:
            n //= 2
            value = instruction(b, v, *(b.shuffle_vector(value, value, lanes(range(k, k + n))) for k in (0, n)))
        return b.extract_element(value, ir.Constant(INDEX, 0))

    return unary(lambda v: v.scalar, emit)


first = unary(lambda v: v.scalar, lambda b, value, v, to: b.extract_element(value, ir.Constant(INDEX, 0)))
total = _fold(lambda b, v, x, y: b.fadd(x, y) if v.is_float else b.add(x, y))
largest = _fold(_larger)


# The 32 bits of a number in 32 bytes, each 0 or 1.
bits_of = unary(
    lambda v: Vec("u8", v.n * v.llvm.element.width),
    lambda b, value, v, to: b.zext(b.bitcast(value, ir.VectorType(ir.IntType(1), to.n)), to.llvm),
)
