"""Functions on vectors: conversions, shuffles, arithmetic and folds, for every element type and number of lanes.

Each is made from a few lines of LLVM IR by a function such as `unary`, `nary` or `shuffle`.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import INDEX, Vec, broadcast, call, indices, operands


def call_typed(builder, name: str, result, args):
    """Call an LLVM function whose name ends with the type of its first argument, a vector: `llvm.rint.v16f32`."""
    suffix = {"i32": "i32", "float": "f32", "double": "f64", "i8": "i8", "i16": "i16", "half": "f16"}
    vector = args[0].type
    return call(builder, f"{name}.v{vector.count}{suffix[str(vector.element)]}", result, args)


# Functions that make one vector from others.


def unary(result, emit):
    """Make f(vector) -> result(the vector's type) from `emit(builder, value, from, to)`, which writes instructions."""

    @intrinsic
    def f(_, v):
        to = result(v)
        return to(v), lambda context, builder, sig, args: emit(builder, args[0], v, to)

    return f


def splat(vec: Vec):
    """Make f(number) -> vec with that number in every lane (broadcast)."""

    @intrinsic
    def f(_, x):
        def codegen(context, builder, sig, args):
            return broadcast(builder, context.cast(builder, args[0], sig.args[0], vec.scalar), vec.llvm)

        return vec(types.unliteral(x)), codegen

    return f


def constant(vec: Vec, numbers):
    """Make f() -> a vector of type vec with these numbers."""
    value = ir.Constant(vec.llvm, list(numbers))

    @intrinsic
    def f(_):
        return vec(), lambda context, builder, sig, args: value

    return f


def convert(element: str):
    """Make f(vector) -> the same numbers in another element type; floats that do not fit saturate, NaN becomes 0."""

    def emit(b, value, v, to):
        if v.is_float and to.is_float:
            return (b.fpext if to.element == "f64" else b.fptrunc)(value, to.llvm)
        if v.is_float:
            return call_typed(b, f"llvm.fptosi.sat.v{to.n}{to.element}", to.llvm, [value])
        if to.is_float:
            return (b.sitofp if v.is_signed else b.uitofp)(value, to.llvm)
        if to.llvm.element.width < v.llvm.element.width:
            return b.trunc(value, to.llvm)
        return (b.sext if v.is_signed else b.zext)(value, to.llvm)

    return unary(lambda v: Vec(element, v.n), emit)


def bitcast(element: str):
    """Make f(vector) -> the same bits in another element type of the same width."""
    return unary(lambda v: Vec(element, v.n), lambda b, value, v, to: b.bitcast(value, to.llvm))


def bitcast_to(vec: Vec):
    """Make f(vector) -> the same bits as a vector of type vec."""
    return unary(lambda v: vec, lambda b, value, v, to: b.bitcast(value, to.llvm))


def shuffle(mask):
    """Make f(vector) -> the lanes that `mask` lists, in that order."""
    emit = lambda b, value, v, to: b.shuffle_vector(value, value, indices(mask))  # noqa: E731
    return unary(lambda v: Vec(v.element, len(mask)), emit)


def shuffle2(mask):
    """Make f(a, b) -> the lanes that `mask` lists, counted through the lanes of a and then those of b."""

    @intrinsic
    def f(_, a, b):
        def codegen(context, builder, sig, args):
            return builder.shuffle_vector(*args, indices(mask))

        return Vec(a.element, len(mask))(a, b), codegen

    return f


@intrinsic
def concat(_, low, high):
    """The lanes of `low`, then the lanes of `high`."""

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(*args, indices(range(2 * low.n)))

    return Vec(low.element, 2 * low.n)(low, high), codegen


def _half(part):
    def emit(b, value, v, to):
        return b.shuffle_vector(value, value, indices(range(part * to.n, (part + 1) * to.n)))

    return unary(lambda v: Vec(v.element, v.n // 2), emit)


low, high = _half(0), _half(1)  # the lower and the upper half of the lanes


def _every_second(first):
    emit = lambda b, value, v, to: b.shuffle_vector(value, value, indices(range(first, v.n, 2)))  # noqa: E731
    return unary(lambda v: Vec(v.element, v.n // 2), emit)


even, odd = _every_second(0), _every_second(1)  # lanes 0, 2, 4 ... and 1, 3, 5 ...


# Arithmetic for which Python has no operator.


def nary(n, emit):
    """Make f(n vectors and numbers, at least one of them a vector) -> vector from `emit`."""

    def typed(args):
        vec = next(t for t in args if isinstance(t, Vec))

        def codegen(context, builder, sig, values):
            return emit(builder, vec, *operands(context, builder, vec, sig.args, values))

        return vec(*(types.unliteral(t) for t in args)), codegen

    if n == 2:
        return intrinsic(lambda _, a, b: typed((a, b)))
    return intrinsic(lambda _, a, b, c: typed((a, b, c)))


def _select_larger(b, v, x, y):
    return b.select(b.or_(b.fcmp_ordered(">", x, y), b.fcmp_unordered("uno", x, x)), x, y)


def _select_smaller(b, v, x, y):
    return b.select(b.or_(b.fcmp_ordered("<", x, y), b.fcmp_unordered("uno", x, x)), x, y)


fma = nary(3, lambda b, v, x, y, z: call_typed(b, "llvm.fmuladd", v.llvm, [x, y, z]))  # fused where the CPU can
larger, smaller = nary(2, _select_larger), nary(2, _select_smaller)  # lane by lane; NaN where one of the two is NaN


def _llvm(name):
    return unary(lambda v: v, lambda b, value, v, to: call_typed(b, name, to.llvm, [value]))


rint, fabs = _llvm("llvm.rint"), _llvm("llvm.fabs")


def _fold(instruction):
    """Make f(vector) -> one number: halves are combined until one lane is left, in the same order on every CPU."""

    def emit(b, value, v, to):
        n = v.n
        while n > 1:
            n //= 2
            value = instruction(b, v, *(b.shuffle_vector(value, value, indices(range(k, k + n))) for k in (0, n)))
        return b.extract_element(value, ir.Constant(INDEX, 0))

    return unary(lambda v: v.scalar, emit)


first = unary(lambda v: v.scalar, lambda b, value, v, to: b.extract_element(value, ir.Constant(INDEX, 0)))
total = _fold(lambda b, v, x, y: b.fadd(x, y) if v.is_float else b.add(x, y))
largest = _fold(_select_larger)


@intrinsic
def add_in_turn(_, number, v):
    """Add the lanes to a number of their type one after another, each sum rounded before the next lane is added."""

    def codegen(context, builder, sig, args):
        value, lanes = args
        for k in range(v.n):
            value = builder.fadd(value, builder.extract_element(lanes, ir.Constant(INDEX, k)))
        return value

    return v.scalar(v.scalar, v), codegen


# The bits of each lane as bytes that are 0 or 1; a lane of 32 bits gives 32 bytes.
bits_of = unary(
    lambda v: Vec("u8", v.n * v.llvm.element.width),
    lambda b, value, v, to: b.zext(b.bitcast(value, ir.VectorType(ir.IntType(1), to.n)), to.llvm),
)
