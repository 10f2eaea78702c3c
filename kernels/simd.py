"""A small SIMD layer: LLVM vectors as numba values, so that kernels read like formulas on vectors.

    v = load_f32x16(address)         16 floats from anywhere in memory
    acc = fma(v, x, acc)             + - * / & | ^ << >> work too, with vectors or with numbers

Only generic LLVM IR is emitted here, which LLVM lowers for every CPU it knows. Addresses are numbers and nothing checks
them: the functions that Python calls check shapes and lengths first.
"""

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

ELEMENTS = {
    "i8": (ir.IntType(8), types.int8), "u8": (ir.IntType(8), types.uint8), "u16": (ir.IntType(16), types.uint16),
    "i16": (ir.IntType(16), types.int16), "i32": (ir.IntType(32), types.int32), "u32": (ir.IntType(32), types.uint32),
    "f32": (ir.FloatType(), types.float32), "f64": (ir.DoubleType(), types.float64),
}  # fmt: skip
INDEX = ir.IntType(32)


class Vec(types.Type):
    """The numba type of `n` lanes of one element type, e.g. Vec("u8", 32)."""

    def __init__(self, element: str, n: int):
        self.element, self.n = element, n
        self.scalar, self.is_float, self.is_signed = ELEMENTS[element][1], element[0] == "f", element[0] != "u"
        self.llvm = ir.VectorType(ELEMENTS[element][0], n)
        super().__init__(name=f"{element}x{n}")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, vec):
        super().__init__(dmm, vec, vec.llvm)


def lanes(numbers) -> ir.Constant:
    return ir.Constant(ir.VectorType(INDEX, len(numbers)), list(numbers))


def call(builder, name: str, result, args):
    """Call an LLVM function; `name` is completed with the first argument's type."""
    suffix = {"i32": "i32", "float": "f32", "double": "f64", "i8": "i8", "i16": "i16", "half": "f16"}
    vector = args[0].type
    full = f"{name}.v{vector.count}{suffix[str(vector.element)]}"
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full), args)


def broadcast(builder, scalar, vector_type):
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(first, first, lanes([0] * vector_type.count))


# Operators: vector with vector, vector with number (the number is converted to the vector's element type).

OPERATORS = {  # operator: (IR instruction for floats, for signed, for unsigned)
    operator.add: ("fadd", "add", "add"), operator.sub: ("fsub", "sub", "sub"), operator.mul: ("fmul", "mul", "mul"),
    operator.truediv: ("fdiv", None, None), operator.and_: (None, "and_", "and_"), operator.or_: (None, "or_", "or_"),
    operator.xor: (None, "xor", "xor"), operator.lshift: (None, "shl", "shl"), operator.rshift: (None, "ashr", "lshr"),
}  # fmt: skip


class _Binary(AbstractTemplate):
    def generic(self, args, kws):
        a, b = (types.unliteral(t) for t in args)
        if isinstance(a, Vec) and (a == b or isinstance(b, types.Number)):
            return signature(a, a, b)
        if isinstance(b, Vec) and isinstance(a, types.Number):
            return signature(b, a, b)


def _operands(context, builder, vec, arg_types, args):
    return [
        arg if t == vec else broadcast(builder, context.cast(builder, arg, t, vec.scalar), vec.llvm)
        for t, arg in zip(arg_types, args, strict=True)
    ]


def _lower(op, instructions):
    def codegen(context, builder, sig, args):
        vec = sig.return_type
        instruction = instructions[0 if vec.is_float else 1 if vec.is_signed else 2]
        return getattr(builder, instruction)(*_operands(context, builder, vec, sig.args, args))

    infer_global(op)(type(f"_{op.__name__}", (_Binary,), {}))
    for pair in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *pair)(codegen)


for _op, _instructions in OPERATORS.items():
    _lower(_op, _instructions)


# Memory, by address: parts of kernels that took arrays would count references all the time.


@intrinsic
def address_of(_, array):
    """The address of an array's first element. The array must live on: see keep."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), codegen


@intrinsic
def keep(_, array):
    """Nothing; but an array made inside a kernel lives until here."""
    return types.none(array), lambda context, builder, sig, args: context.get_dummy_value()


def loader(vec: Vec):
    """load(address) -> vec"""

    @intrinsic
    def load(_, address):
        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[0], vec.llvm.as_pointer()), align=1)
            value.align = 1
            return value

        return vec(types.intp), codegen

    return load


@intrinsic
def store(_, address, vector):
    """store(address, vector)"""

    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], vector.llvm.as_pointer()), align=1).align = 1
        return context.get_dummy_value()

    return types.none(types.intp, vector), codegen


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


def convert(element: str):
    """f(vector) -> the same numbers in another element type; floats that do not fit saturate, NaN becomes 0"""

    def emit(b, value, v, to):
        if v.is_float:
            return call(b, f"llvm.fptosi.sat.v{to.n}{to.element}", to.llvm, [value]) if not to.is_float else (
                b.fpext if to.element == "f64" else b.fptrunc)(value, to.llvm)  # fmt: skip
        if to.is_float:
            return (b.sitofp if v.is_signed else b.uitofp)(value, to.llvm)
        if to.llvm.element.width <= v.llvm.element.width:
            return b.trunc(value, to.llvm) if to.llvm != v.llvm else value
        return (b.sext if v.is_signed else b.zext)(value, to.llvm)

    return unary(lambda v: Vec(element, v.n), emit)


def bitcast(element: str):
    """f(vector) -> the same bits in another element type of the same width"""
    return unary(lambda v: Vec(element, v.n), lambda b, value, v, to: b.bitcast(value, to.llvm))


def shuffle(mask):
    """f(vector) -> lanes `mask` of it"""
    emit = lambda b, value, v, to: b.shuffle_vector(value, value, lanes(mask))  # noqa: E731
    return unary(lambda v: Vec(v.element, len(mask)), emit)


@intrinsic
def concat(_, low, high):
    """The lanes of `low`, then the lanes of `high`."""

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(*args, lanes(range(2 * low.n)))

    return Vec(low.element, 2 * low.n)(low, high), codegen


# Arithmetic that is no operator.


def nary(n, emit):
    """f(vectors and numbers, at least one vector) -> vector"""

    def typed(args):
        vec = next(t for t in args if isinstance(t, Vec))

        def codegen(context, builder, sig, values):
            return emit(builder, vec, *_operands(context, builder, vec, sig.args, values))

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
