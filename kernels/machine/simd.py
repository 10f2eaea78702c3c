"""A small SIMD layer: LLVM vectors as numba values, so that kernels read like formulas on vectors.

    v = load_f32x16(address)         16 floats from anywhere in memory
    acc = fma(v, x, acc)             + - * / & | ^ << >> work too, with vectors or with numbers

This file writes only generic LLVM IR, which LLVM translates for every CPU that it supports. Addresses are plain numbers
that are not checked here: the functions that Python calls check shapes and lengths first.
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
}
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


def indices(numbers) -> ir.Constant:
    """The mask of an LLVM shuffle: for each lane of the result, the number of the lane that it takes."""
    return ir.Constant(ir.VectorType(INDEX, len(numbers)), list(numbers))


def call(builder, name: str, result, args):
    """Call the LLVM function of this full name."""
    function_type = ir.FunctionType(result, [value.type for value in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def broadcast(builder, scalar, vector_type):
    """A vector with a number in every lane."""
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(first, first, indices([0] * vector_type.count))


# Operators: vector with vector, vector with number (the number is converted to the vector's element type).

OPERATORS = {  # operator: (IR instruction for floats, for signed, for unsigned)
    operator.add: ("fadd", "add", "add"), operator.sub: ("fsub", "sub", "sub"), operator.mul: ("fmul", "mul", "mul"),
    operator.truediv: ("fdiv", None, None), operator.and_: (None, "and_", "and_"), operator.or_: (None, "or_", "or_"),
    operator.xor: (None, "xor", "xor"), operator.lshift: (None, "shl", "shl"), operator.rshift: (None, "ashr", "lshr"),
}


class _Binary(AbstractTemplate):
    def generic(self, args, kws):
        a, b = (types.unliteral(t) for t in args)
        if isinstance(a, Vec) and (a == b or isinstance(b, types.Number)):
            return signature(a, a, b)
        if isinstance(b, Vec) and isinstance(a, types.Number):
            return signature(b, a, b)


def operands(context, builder, vec, arg_types, args):
    """The arguments as vectors of one type: numbers are broadcast."""
    return [
        arg if t == vec else broadcast(builder, context.cast(builder, arg, t, vec.scalar), vec.llvm)
        for t, arg in zip(arg_types, args, strict=True)
    ]


def _lower(op, instructions):
    def codegen(context, builder, sig, args):
        vec = sig.return_type
        instruction = instructions[0 if vec.is_float else 1 if vec.is_signed else 2]
        return getattr(builder, instruction)(*operands(context, builder, vec, sig.args, args))

    infer_global(op)(type(f"_{op.__name__}", (_Binary,), {}))
    for pair in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *pair)(codegen)


for _op, _instructions in OPERATORS.items():
    _lower(_op, _instructions)


# Memory, by address: numba would count references for every array that is passed to a part of a kernel.


@intrinsic
def address_of(_, array):
    """The address of an array's first element. The caller must keep the array alive, see `keep`."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), codegen


@intrinsic
def keep(_, array):
    """Keep an array that was made inside a kernel alive up to this line."""
    return types.none(array), lambda context, builder, sig, args: context.get_dummy_value()


def loader(vec: Vec):
    """Make load(address) -> a vector of type vec, from any address (it need not be aligned)."""

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
    """Write a vector to an address, which need not be aligned."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], vector.llvm.as_pointer()), align=1).align = 1
        return context.get_dummy_value()

    return types.none(types.intp, vector), codegen


def constant_like(value, number):
    """A vector of the type of `value` with `number` in every lane."""
    return ir.Constant(value.type, [number] * value.type.count)
